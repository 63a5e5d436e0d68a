/* Inputs as whole numbers, for products in integers; AVX2.

   The inputs of a block (32 to 128 of them, inside one group) are taken as q * step, q a whole
   number of up to 2^14, step the power of two that just allows the block's largest. So bfloat16,
   which has 8 bits, is exact down to 1/64 of the largest, and below that off by 2^-14 of it at most.
   An input that is not finite makes its sums NaN; blocks below 2^-95 count as zero. */

#include <immintrin.h>

#include "rows.h"

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
