/* A few vectors times rows of plain weights, both float32 or both bfloat16: y[t][r] is the sum over
   j of x[t][j] * weight[r][j], in float32. */

#include "products.h"
#include "rows.h"

#define SUMS 4 /* a row: each addition waits for the one before */

INLINE void multiply(long start, const char *weight, const float *x, void *y, long count, long out,
                     long in, int bfloat16) {
  long width = bfloat16 ? 2 : 4, step = SUMS * LANES;
  rows from = rows_from(start, out, weight, in * width, NULL, 0, 0);
  for (long t = 0; t < count; t++, x += in) {
    floats acc[ROWS][SUMS] = {{{0}}}, whole[ROWS];
    for (long at = 0; at < in; at += step)
      for (int r = 0; r < ROWS; r++) {
        for (long bytes = 0; bytes < step * width; bytes += 64)
          __builtin_prefetch(from.codes[r] + at * width + bytes + AHEAD);
        for (int k = 0; k < SUMS; k++)
          acc[r][k] += load(x, at + k * LANES, 0) * load(from.codes[r], at + k * LANES, bfloat16);
      }
    for (int r = 0; r < ROWS; r++) whole[r] = (acc[r][0] + acc[r][1]) + (acc[r][2] + acc[r][3]);
    store_rows((char *)y + t * out * width, start, out, whole, bfloat16);
  }
}

/* weight (out, in), x (count, in), y (count, out). in: a multiple of 32. Returns 0, or 1 if memory
   is short. */
int dense_rows(const void *weight, const void *x, void *y, long count, long out, long in,
               int bfloat16) {
  float *wide = aligned_alloc(64, (count * in * sizeof(float) + 63) / 64 * 64);
  if (wide == NULL) return 1;
  for (long at = 0; at < count * in; at += LANES) store(wide, at, load(x, at, bfloat16), 0);
#pragma omp parallel for schedule(static)
  for (long start = 0; start < out; start += ROWS) {
    if (bfloat16)
      multiply(start, weight, wide, y, count, out, in, 1);
    else
      multiply(start, weight, wide, y, count, out, in, 0);
  }
  free(wide);
  return 0;
}
