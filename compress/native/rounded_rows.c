/* A few vectors, rounded to whole numbers, times rows of 4-bit or 8-bit codes: int4_rows.c and
   int8_rows.c in integers, twice as many products an instruction. For AVX2.

   The inputs of a block (32 to 128 of them, inside one group) are taken as q * step, q a whole
   number of up to 2^14, step the power of two that just allows the block's largest. So bfloat16,
   which has 8 bits, is exact down to 1/64 of the largest, and below that off by 2^-14 of it at most.
   Products of q and codes and their sums are exact; a block's sum is scaled and added in float32.

   An input that is not finite makes its sums NaN; blocks below 2^-95 count as zero. */

#include "rows.h"

int has_rounded_rows(void) {
#ifdef __AVX2__
  return 1;
#else
  return 0;
#endif
}

#ifdef __AVX2__
#include <immintrin.h>

#define BYTES 32 /* of codes in a step */
#define APART static __attribute__((noinline)) /* so that each has the registers to itself */

/* One vector as all rows meet it. Beyond their ends, steps and sums have room for LANES more. */
typedef struct {
  int16_t *numbers; /* q, in the order in which codes are met */
  float *steps;     /* of each block */
  float *sums;      /* of each group's inputs; zeros at the end */
} inputs;

INLINE long lines(long bytes) { return (bytes + 63) / 64 * 64; }

INLINE float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

INLINE __m256i vector(const void *from) { return _mm256_loadu_si256((const __m256i *)from); }

INLINE __m256i plus_products(__m256i sums, __m256i codes, const int16_t *numbers) {
  return _mm256_add_epi32(sums, _mm256_madd_epi16(codes, vector(numbers)));
}

/* 32 inputs from `at` on as whole numbers, 16 even and 16 odd ones or, if not `parted`, in order. */
INLINE void round_32(int16_t *to, const void *x, long at, float inverse, int parted, int bfloat16) {
  const __m256i apart = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
  __m256i q[4];
  for (int k = 0; k < 4; k++) { /* to the nearest, even */
    q[k] = _mm256_cvtps_epi32((__m256)(load(x, at + k * LANES, bfloat16) * inverse));
    if (parted) q[k] = _mm256_permutevar8x32_epi32(q[k], apart);
  }
  __m256i a = _mm256_packs_epi32(q[0], q[1]), b = _mm256_packs_epi32(q[2], q[3]);
  __m256i first = parted ? _mm256_permute2x128_si256(a, b, 0x20) : _mm256_permute4x64_epi64(a, 0xd8);
  __m256i second = parted ? _mm256_permute2x128_si256(a, b, 0x31) : _mm256_permute4x64_epi64(b, 0xd8);
  _mm256_storeu_si256((__m256i *)to, first), _mm256_storeu_si256((__m256i *)to + 1, second);
}

/* bits 4: byte j of a row holds code j and code j + in / 2; read as 16 bits, the even bytes' codes
   come before the odd ones'. */
static void round_inputs(inputs to, const void *x, long in, long block, long size, int bits,
                         int bfloat16) {
  memset(to.sums, 0, (in / size + LANES) * sizeof *to.sums);
  for (long start = 0; start < in; start += block) {
    integers largest = {0};
    for (long at = start; at < start + block; at += LANES) {
      __m256i each = (__m256i)((integers)load(x, at, bfloat16) & 0x7fffffff); /* in order as bits */
      largest = (integers)_mm256_max_epu32((__m256i)largest, each);
    }
    uint32_t exponent = 0; /* the largest is below 2^(exponent - 126) */
    for (int lane = 0; lane < LANES; lane++)
      exponent = largest[lane] >> 23 > exponent ? largest[lane] >> 23 : exponent;
    int usable = exponent >= 32 && exponent < 255;
    float step = usable ? from_bits((exponent - 13) << 23) : exponent < 255 ? 0 : NAN;
    float inverse = usable ? from_bits((267 - exponent) << 23) : 0;
    __m256i sum = _mm256_setzero_si256();
    for (long at = start; at < start + block; at += BYTES) {
      long high = bits == 4 && at >= in / 2;
      int16_t *place = to.numbers + (bits == 4 ? 2 * (at - high * (in / 2)) + high * BYTES : at);
      round_32(place, x, at, inverse, bits == 4, bfloat16);
      for (int k = 0; k < 2; k++) sum = plus_products(sum, _mm256_set1_epi16(1), place + 16 * k);
    }
    int32_t whole = 0;
    for (int lane = 0; lane < LANES; lane++) whole += ((signed_integers)sum)[lane];
    to.steps[start / block] = step;
    to.sums[start / size] += step * (float)whole;
  }
}

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
