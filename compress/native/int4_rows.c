/* A few vectors times rows of 4-bit codes, straight from the order of the file (quant_math.pack).

   y[t][r] = sum over j of x[t][j] * (code[r][j] - zero) * scale, or code * scale + offset, with one
   pair (scale, zero or offset) for each group of inputs. Sums are float32; the codes are exact.

   A row is in / 2 bytes; byte j holds code j in its low half and code j + in / 2 in its high one.
   32 bytes are read as 8 integers, and masks cut out of all 8 the same one of their 8 codes. A code
   that is masked where it stands is 16^k times too large: its input is 16^k times smaller instead,
   which is exact. The inputs are laid out once a call so that input and code meet. */

#include "rows.h"

#define CODES 8 /* in one integer */
#define BYTES 32

typedef struct {
  floats codes[CODES]; /* inputs, in the order in which the masks cut out codes */
  floats sums[2];      /* of the inputs of the low halves, of the high halves */
  int32_t pairs[2];    /* where their groups' pairs are, in bytes from the row's first */
} chunk;

INLINE floats converted(integers codes) { /* below 2^31; signed is one instruction */
  return __builtin_convertvector((signed_integers)codes, floats);
}

/* One input vector as chunks. pair: bytes of a pair. */
static void lay_out(chunk *chunks, const void *x, long in, long size, long pair, int bfloat16) {
  long half = in / 2;
  for (long at = 0; at < half; at += BYTES, chunks++) {
    for (int high = 0; high < 2; high++) {
      long start = high * half + at;
      chunks->sums[high] = (floats){0};
      chunks->pairs[high] = start / size * pair;
      for (int byte = 0; byte < 4; byte++) {
        int k = 2 * byte + high;
        float factor = k < 7 ? 1.0f / (float)(1u << 4 * k) : 1.0f; /* 7 is shifted instead */
        for (int lane = 0; lane < LANES; lane++) {
          long j = start + 4 * lane + byte;
          float value = load_one(x, j, bfloat16);
          chunks->codes[k][lane] = value * factor;
          chunks->sums[high][lane] += value;
        }
      }
    }
  }
}

/* ROWS rows from `start` on. wide, offset: constants where this is inlined, so that the loop has no
   branches. */
INLINE void multiply(long start, const char *codes, const char *pairs, const chunk *chunks,
                     void *y, long count, long out, long in, long groups, int wide, int offset,
                     int bfloat16) {
  long half = in / 2, parts = half / BYTES;
  rows from = rows_from(start, out, codes, half, pairs, groups, wide);
  for (long t = 0; t < count; t++) {
    floats acc[ROWS] = {{0}};
    for (long part = 0; part < parts; part++) {
      const chunk *c = chunks + t * parts + part;
      for (int r = 0; r < ROWS; r++) {
        integers v;
        memcpy(&v, from.codes[r] + part * BYTES, BYTES);
        fetch(&from, part * ROWS + r, BYTES);
        floats low = converted(v & 0xf) * c->codes[0];
        floats high = converted(v & 0xf0) * c->codes[1];
        low += converted(v & 0xf00) * c->codes[2];
        high += converted(v & 0xf000) * c->codes[3];
        low += converted(v & 0xf0000) * c->codes[4];
        high += converted(v & 0xf00000) * c->codes[5];
        low += converted(v & 0xf000000) * c->codes[6];
        high += converted(v >> 28) * c->codes[7];
        acc[r] = finished(acc[r], low, c->sums[0], from.pairs[r] + c->pairs[0], wide, offset);
        acc[r] = finished(acc[r], high, c->sums[1], from.pairs[r] + c->pairs[1], wide, offset);
      }
    }
    store_rows((char *)y + t * out * (bfloat16 ? 2 : 4), start, out, acc, bfloat16);
  }
}

/* codes (out, in / 2), pairs (out, in / size, 2) of bfloat16 or, if `wide`, float32; x (count, in)
   and y (count, out) of float32 or, if `bfloat16`, that. in: a multiple of 64; size: of 32, and in
   a multiple of it. Returns 0, or 1 if memory is short. */
int int4_rows(const void *codes, const void *pairs, const void *x, void *y, long count, long out,
              long in, long size, int wide, int offset, int bfloat16) {
  long parts = in / 2 / BYTES, bytes = in * (bfloat16 ? 2 : 4);
  chunk *chunks = aligned_alloc(sizeof(floats), count * parts * sizeof(chunk));
  if (chunks == NULL) return 1;
  for (long t = 0; t < count; t++)
    lay_out(chunks + t * parts, (const char *)x + t * bytes, in, size, pair_bytes(wide), bfloat16);
#define MULTIPLY(wide, offset) \
  multiply(start, codes, pairs, chunks, y, count, out, in, in / size, wide, offset, bfloat16)
#pragma omp parallel for schedule(static)
  for (long start = 0; start < out; start += ROWS) {
    if (wide && offset)
      MULTIPLY(1, 1);
    else if (wide)
      MULTIPLY(1, 0);
    else if (offset)
      MULTIPLY(0, 1);
    else
      MULTIPLY(0, 0);
  }
  free(chunks);
  return 0;
}
