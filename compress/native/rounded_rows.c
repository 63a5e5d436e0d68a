/* A few vectors, rounded to whole numbers, times rows of 4-bit or 8-bit codes: int4_rows.c and
   int8_rows.c in integers (see rounded.h), twice as many products an instruction. For AVX2.

   Products of q and codes and their sums are exact; a block's sum is scaled and added in float32. */

#include "products.h"

int has_rounded_rows(void) {
#ifdef __AVX2__
  return 1;
#else
  return 0;
#endif
}

#ifdef __AVX2__
#include "rounded.h"

/* Up to LANES pairs' scales and what stands beside them; zeros for those that are not there. */
INLINE void load_pairs(const char *pairs, long count, int wide, floats *scale, floats *other) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  __m256i there = _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lanes);
  if (wide) {
    __m256i apart = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
    __m256i first = _mm256_cmpgt_epi32(_mm256_set1_epi32(2 * count), lanes);
    __m256i second = _mm256_cmpgt_epi32(_mm256_set1_epi32(2 * count - LANES), lanes);
    __m256i a = _mm256_maskload_epi32((const int *)pairs, first);
    __m256i b = _mm256_maskload_epi32((const int *)pairs + LANES, second);
    a = _mm256_permutevar8x32_epi32(a, apart), b = _mm256_permutevar8x32_epi32(b, apart);
    *scale = (floats)_mm256_permute2x128_si256(a, b, 0x20);
    *other = (floats)_mm256_permute2x128_si256(a, b, 0x31);
  } else {
    integers both = (integers)_mm256_maskload_epi32((const int *)pairs, there);
    *scale = (floats)(both << 16), *other = (floats)(both & 0xffff0000);
  }
}

/* One row's scales times the steps, one a block; returns what zeros or offsets add. each: blocks of
   a group. */
APART float scaled_steps(float *factors, inputs x, const char *pairs, long groups, long each,
                         int wide, int offset) {
  floats added = {0};
  for (long at = 0; at < groups; at += LANES) {
    floats scale, other;
    load_pairs(pairs + at * pair_bytes(wide), groups - at, wide, &scale, &other);
    added += load(x.sums, at, 0) * (offset ? other : -other * scale);
    if (each == 1) {
      store(factors, at, scale * load(x.steps, at, 0), 0);
      continue;
    }
    for (long group = at; group < at + LANES && group < groups; group++)
      for (long block = group * each; block < (group + 1) * each; block++)
        factors[block] = scale[group - at] * x.steps[block];
  }
  return total(added);
}

/* acc += rows times x, 4 bits. owners: the blocks of a step's low and of its high halves. span:
   steps after which they may change, constant where inlined. */
INLINE void multiply4(floats *acc, rows from, const int16_t *q, float *const *factors,
                      const int32_t *owners, long steps, long span) {
  const __m256i lowest = _mm256_set1_epi16(15);
  floats other[ROWS] = {{0}}; /* two sums a row, as each addition waits for the one before */
  for (long step = 0; step < steps;) {
    const int32_t *owner = owners + 2 * step;
    __m256i low[ROWS], high[ROWS];
    for (int r = 0; r < ROWS; r++) low[r] = high[r] = _mm256_setzero_si256();
    for (long stop = step + span; step < stop; step++, q += 2 * BYTES) {
      for (int r = 0; r < ROWS; r++) {
        fetch(&from, step * ROWS + r, BYTES);
        __m256i v = vector(from.codes[r] + step * BYTES);
        low[r] = plus_products(low[r], v & lowest, q);
        low[r] = plus_products(low[r], _mm256_srli_epi16(v, 8) & lowest, q + 16);
        high[r] = plus_products(high[r], _mm256_srli_epi16(v, 4) & lowest, q + 32);
        high[r] = plus_products(high[r], _mm256_srli_epi16(v, 12), q + 48);
      }
    }
    for (int r = 0; r < ROWS; r++) {
      acc[r] += (floats)_mm256_cvtepi32_ps(low[r]) * factors[r][owner[0]];
      other[r] += (floats)_mm256_cvtepi32_ps(high[r]) * factors[r][owner[1]];
    }
  }
  for (int r = 0; r < ROWS; r++) acc[r] += other[r];
}

/* The same, 8 bits. */
INLINE void multiply8(floats *acc, rows from, const int16_t *q, float *const *factors,
                      const int32_t *owners, long steps, long span) {
  for (long step = 0; step < steps;) {
    const int32_t *owner = owners + step;
    __m256i sums[ROWS];
    for (int r = 0; r < ROWS; r++) sums[r] = _mm256_setzero_si256();
    for (long stop = step + span; step < stop; step++, q += BYTES) {
      for (int r = 0; r < ROWS; r++) {
        fetch(&from, step * ROWS + r, BYTES);
        const __m128i *v = (const __m128i *)(from.codes[r] + step * BYTES);
        sums[r] = plus_products(sums[r], _mm256_cvtepi8_epi16(_mm_loadu_si128(v)), q);
        sums[r] = plus_products(sums[r], _mm256_cvtepi8_epi16(_mm_loadu_si128(v + 1)), q + 16);
      }
    }
    for (int r = 0; r < ROWS; r++)
      acc[r] += (floats)_mm256_cvtepi32_ps(sums[r]) * factors[r][owner[0]];
  }
}

APART void multiply(floats *acc, rows from, const int16_t *q, float *const *factors,
                    const int32_t *owners, long steps, long span, int bits) {
#define MULTIPLY(span)                                                  \
  bits == 4 ? multiply4(acc, from, q, factors, owners, steps, span)     \
            : multiply8(acc, from, q, factors, owners, steps, span)
  if (span == 4)
    MULTIPLY(4);
  else if (span == 2)
    MULTIPLY(2);
  else
    MULTIPLY(1);
}

/* As int4_rows and int8_rows, which say what the arguments are; bits: 4 or 8, and 8 has no
   `offset`. block: of inputs, a multiple of 32 that size is a multiple of. Returns 0, or 1 if
   memory is short. */
int rounded_rows(const void *codes, const void *pairs, const void *x, void *y, long count, long out,
                 long in, long size, long block, int bits, int wide, int offset, int bfloat16) {
  long blocks = in / block, groups = in / size, width = bfloat16 ? 2 : 4;
  long halves = bits == 4 ? 2 : 1, steps = in / halves / BYTES;
  long span = 1;
  while (span < 4 && block % (2 * span * BYTES) == 0 && steps % (2 * span) == 0) span *= 2;
  long for_owners = lines(steps * halves * sizeof(int32_t)), for_numbers = lines(2 * in);
  long for_steps = lines(4 * (blocks + LANES)), for_sums = lines(4 * (groups + LANES));
  long bytes = for_numbers + for_steps + for_sums;
  char *room = aligned_alloc(64, for_owners + count * (bytes + lines(sizeof(inputs))));
  if (room == NULL) return 1;
  int32_t *owners = (int32_t *)room;
  for (long step = 0; step < steps; step++)
    for (long half = 0; half < halves; half++)
      owners[step * halves + half] = (half * (in / 2) + step * BYTES) / block;
  inputs *vectors = (inputs *)(room + for_owners);
  char *next = (char *)(vectors + count);
  next = room + for_owners + count * lines(sizeof(inputs));
  for (long t = 0; t < count; t++, next += bytes) {
    vectors[t] = (inputs){(int16_t *)next, (float *)(next + for_numbers),
                          (float *)(next + for_numbers + for_steps)};
    round_inputs(vectors[t], (const char *)x + t * in * width, in, block, size, bits, bfloat16);
  }
  long each = size / block;
#pragma omp parallel for schedule(static)
  for (long start = 0; start < out; start += ROWS) {
    rows from = rows_from(start, out, codes, in * bits / 8, pairs, groups, wide);
    float scaled[ROWS][blocks + LANES];
    for (long t = 0; t < count; t++) {
      inputs own = vectors[t];
      floats acc[ROWS] = {{0}};
      float *factors[ROWS], added[ROWS];
      for (int r = 0; r < ROWS; r++) {
        factors[r] = scaled[r];
        added[r] = scaled_steps(scaled[r], own, from.pairs[r], groups, each, wide, offset);
      }
      multiply(acc, from, own.numbers, factors, owners, steps, span, bits);
      for (int r = 0; r < ROWS; r++) acc[r][0] += added[r];
      store_rows((char *)y + t * out * width, start, out, acc, bfloat16);
    }
  }
  free(room);
  return 0;
}
#endif
