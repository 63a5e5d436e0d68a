/* Many vectors, rounded to whole numbers (see rounded.h), times a matrix of 4-bit or 8-bit codes.
   For AVX2: an instruction multiplies 16 pairs of 16 bits, where float32 has 8.

   The matrix is taken PANEL rows and one block of inputs at a time: code - zero as 16 bits, pairs of
   neighbouring inputs side by side, so that one instruction meets the same pair of LANES rows. The
   sums of a block are exact; they are scaled and added in float32. */

#include "products.h"

#ifdef __AVX2__
#include "rounded.h"

#define PANEL 16   /* rows of the matrix */
#define TILE 4     /* vectors that share what is loaded of it */
#define LONGEST 128 /* inputs of a block */

typedef struct {
  const char *codes, *pairs;
  long in, out, size, block;
  int bits, wide;
} matrix;

/* 32 codes of a row from input `at` on, as 16 bits, less `zero`. */
INLINE void unpack_32(int16_t *to, const char *row, long at, long in, int bits, __m256i zero) {
  __m256i first, second;
  if (bits == 4) {
    long high = at >= in / 2;
    __m256i v = vector(row + at - high * (in / 2));
    if (high) v = _mm256_srli_epi16(v, 4);
    v &= _mm256_set1_epi8(15);
    first = _mm256_cvtepu8_epi16(_mm256_castsi256_si128(v));
    second = _mm256_cvtepu8_epi16(_mm256_extracti128_si256(v, 1));
  } else {
    const __m128i *v = (const __m128i *)(row + at);
    first = _mm256_cvtepi8_epi16(_mm_loadu_si128(v));
    second = _mm256_cvtepi8_epi16(_mm_loadu_si128(v + 1));
  }
  _mm256_storeu_si256((__m256i *)to, _mm256_sub_epi16(first, zero));
  _mm256_storeu_si256((__m256i *)to + 1, _mm256_sub_epi16(second, zero));
}

/* Rows from `start` on of one block: panel (block / 2, PANEL) pairs, and their scales. The last row
   stands in for those that are not there. */
APART void unpack(int32_t *panel, float *scales, const matrix *m, long start, long number) {
  int16_t row[LONGEST];
  for (long r = 0; r < PANEL; r++) {
    long at = start + r < m->out ? start + r : m->out - 1;
    long pair = at * (m->in / m->size) + number * m->block / m->size;
    scales[r] = load_one(m->pairs, 2 * pair, !m->wide);
    __m256i zero = _mm256_set1_epi16(load_one(m->pairs, 2 * pair + 1, !m->wide));
    for (long k = 0; k < m->block; k += BYTES)
      unpack_32(row + k, m->codes + at * (m->in * m->bits / 8), number * m->block + k, m->in,
                m->bits, zero);
    for (long k = 0; k < m->block / 2; k++) memcpy(panel + k * PANEL + r, row + 2 * k, 4);
  }
}

/* y (TILE, PANEL) += what TILE vectors from x on give with a panel. stride: from vector to vector. */
INLINE void add_tile(float *y, const int16_t *x, long stride, const float *steps, long next,
                     const int32_t *panel, const float *scales, long pairs) {
  __m256i sums[TILE][2];
  for (int t = 0; t < TILE; t++) sums[t][0] = sums[t][1] = _mm256_setzero_si256();
#pragma GCC unroll 4
  for (long k = 0; k < pairs; k++) {
    __m256i first = vector(panel + k * PANEL), second = vector(panel + k * PANEL + LANES);
    __asm__("" : "+x"(first), "+x"(second)); /* loaded once, not with each product */
    for (int t = 0; t < TILE; t++) {
      int32_t both;
      memcpy(&both, x + t * stride + 2 * k, sizeof both);
      __m256i pair = _mm256_set1_epi32(both);
      sums[t][0] = _mm256_add_epi32(sums[t][0], _mm256_madd_epi16(pair, first));
      sums[t][1] = _mm256_add_epi32(sums[t][1], _mm256_madd_epi16(pair, second));
    }
  }
  for (int t = 0; t < TILE; t++)
    for (int half = 0; half < 2; half++) {
      float *place = y + t * PANEL + half * LANES;
      floats scale = load(scales, half * LANES, 0) * steps[t * next];
      store(place, 0, load(place, 0, 0) + (floats)_mm256_cvtepi32_ps(sums[t][half]) * scale, 0);
    }
}

/* As rounded_rows, for many vectors, without offsets. */
int rounded_many(const void *codes, const void *pairs, const void *x, void *y, long count, long out,
                 long in, long size, long block, int bits, int wide, int bfloat16) {
  const matrix m = {codes, pairs, in, out, size, block, bits, wide};
  long blocks = in / block, groups = in / size, width = bfloat16 ? 2 : 4;
  long padded = (count + TILE - 1) / TILE * TILE;
  long for_numbers = lines(padded * in * 2), for_steps = lines(padded * blocks * 4);
  char *room = aligned_alloc(64, for_numbers + for_steps + lines(padded * (groups + LANES) * 4));
  if (room == NULL) return 1;
  int16_t *numbers = (int16_t *)room;
  float *steps = (float *)(room + for_numbers), *sums = (float *)(room + for_numbers + for_steps);
  int short_of_memory = 0;
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (long t = 0; t < padded; t++) {
      long from = t < count ? t : count - 1; /* the last stands in for those that are not there */
      inputs to = {numbers + t * in, steps + t * blocks, sums + t * (groups + LANES)};
      round_inputs(to, (const char *)x + from * in * width, in, block, size, 8, bfloat16);
    }
    float *found = aligned_alloc(64, lines(padded * PANEL * sizeof(float)));
    if (found == NULL) short_of_memory = 1;
#pragma omp for schedule(static)
    for (long start = 0; start < out; start += PANEL) {
      if (found == NULL) continue;
      int32_t panel[LONGEST / 2 * PANEL];
      float scales[PANEL];
      memset(found, 0, padded * PANEL * sizeof(float));
      for (long number = 0; number < blocks; number++) {
        unpack(panel, scales, &m, start, number);
        for (long t = 0; t < padded; t += TILE)
          add_tile(found + t * PANEL, numbers + t * in + number * block, in,
                   steps + t * blocks + number, blocks, panel, scales, block / 2);
      }
      for (long t = 0; t < count; t++)
        for (long r = 0; r < PANEL && start + r < out; r++)
          store_one(y, t * out + start + r, found[t * PANEL + r], bfloat16);
    }
    free(found);
  }
  free(room);
  return short_of_memory;
}
#endif
