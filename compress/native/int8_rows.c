/* A few vectors times rows of 8-bit codes in equal groups; see int4_rows.c, which is the same for
   codes of 4 bits. Here codes are signed bytes, one after the other: 32 are read as 8 integers, and
   two shifts cut the same byte out of all 8. */

#include "rows.h"

#define CODES 4 /* in one integer */
#define BYTES (CODES * LANES)

typedef struct {
  floats inputs[CODES]; /* in the order in which codes are cut out */
  floats sum;
  int64_t pair; /* where their group's pair is, in bytes from the row's first */
} chunk;

INLINE void multiply(long start, const char *codes, const char *pairs, const chunk *chunks,
                     void *y, long count, long out, long in, long groups, int wide, int bfloat16) {
  long parts = in / BYTES;
  rows from = rows_from(start, out, codes, in, pairs, groups, wide);
  for (long t = 0; t < count; t++) {
    floats acc[ROWS] = {{0}};
    for (long part = 0; part < parts; part++) {
      const chunk *c = chunks + t * parts + part;
      for (int r = 0; r < ROWS; r++) {
        fetch(&from, part * ROWS + r, BYTES);
        integers v;
        memcpy(&v, from.codes[r] + part * BYTES, BYTES);
        floats plain = {0};
        for (int k = 0; k < CODES; k++) {
          signed_integers code = (signed_integers)(v << (24 - 8 * k)) >> 24;
          plain += __builtin_convertvector(code, floats) * c->inputs[k];
        }
        acc[r] = finished(acc[r], plain, c->sum, from.pairs[r] + c->pair, wide, 0);
      }
    }
    store_rows((char *)y + t * out * (bfloat16 ? 2 : 4), start, out, acc, bfloat16);
  }
}

/* y = x W^T with W = (code - zero) * scale. codes (out, in), pairs (out, in / size, 2) of scale and
   zero, bfloat16 or, if `wide`, float32; x (count, in) and y (count, out) float32 or, if `bfloat16`,
   that. in and size: multiples of 32. Returns 0, or 1 if memory is short. */
int int8_rows(const void *codes, const void *pairs, const void *x, void *y, long count, long out,
              long in, long size, int wide, int bfloat16) {
  long parts = in / BYTES;
  chunk *chunks = aligned_alloc(sizeof(floats), count * parts * sizeof(chunk));
  if (chunks == NULL) return 1;
  for (long number = 0; number < count * parts; number++) {
    chunks[number].sum = (floats){0};
    chunks[number].pair = number % parts * BYTES / size * pair_bytes(wide);
    for (int k = 0; k < CODES; k++) {
      for (int lane = 0; lane < LANES; lane++)
        chunks[number].inputs[k][lane] = load_one(x, number * BYTES + CODES * lane + k, bfloat16);
      chunks[number].sum += chunks[number].inputs[k];
    }
  }
#pragma omp parallel for schedule(static)
  for (long start = 0; start < out; start += ROWS) {
    if (wide)
      multiply(start, codes, pairs, chunks, y, count, out, in, in / size, 1, bfloat16);
    else
      multiply(start, codes, pairs, chunks, y, count, out, in, in / size, 0, bfloat16);
  }
  free(chunks);
  return 0;
}
