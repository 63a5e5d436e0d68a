/* A few vectors times rows of 8-bit codes in equal groups; see int4_rows.c, which is the same for
   codes of 4 bits. Here codes are signed bytes, one after the other. */

#include "rows.h"

#define PARTS 4
#define BYTES (PARTS * LANES)

typedef int8_t bytes __attribute__((vector_size(LANES)));

typedef struct {
  floats inputs[PARTS];
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
        floats plain = {0};
        for (int p = 0; p < PARTS; p++) {
          bytes v;
          memcpy(&v, from.codes[r] + part * BYTES + p * LANES, sizeof v);
          plain += __builtin_convertvector(__builtin_convertvector(v, signed_integers), floats) *
                   c->inputs[p];
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
    long part = number % parts;
    chunks[number].sum = (floats){0};
    chunks[number].pair = part * BYTES / size * pair_bytes(wide);
    for (int p = 0; p < PARTS; p++) {
      chunks[number].inputs[p] = load(x, number * BYTES + p * LANES, bfloat16);
      chunks[number].sum += chunks[number].inputs[p];
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
