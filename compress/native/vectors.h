/* Eight numbers at a time, of float32 or bfloat16 in memory, float32 in the arithmetic. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 8
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef float halves __attribute__((vector_size(2 * LANES)));
typedef uint32_t integers __attribute__((vector_size(4 * LANES)));
typedef int32_t signed_integers __attribute__((vector_size(4 * LANES)));
typedef uint16_t shorts __attribute__((vector_size(2 * LANES)));
#define INLINE static inline __attribute__((always_inline))

INLINE floats all(float x) { return x - (floats){0}; }

/* Where `when` has all bits set a, elsewhere b. */
INLINE floats either(integers when, floats a, floats b) {
  return (floats)(((integers)a & when) | ((integers)b & ~when));
}

INLINE float load_one(const void *from, long at, int bfloat16) {
  if (!bfloat16) return ((const float *)from)[at];
  uint32_t bits = (uint32_t)((const uint16_t *)from)[at] << 16;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

INLINE floats load(const void *from, long at, int bfloat16) {
  floats x;
  if (bfloat16) {
    shorts bits;
    memcpy(&bits, (const uint16_t *)from + at, sizeof bits);
    return (floats)(__builtin_convertvector(bits, integers) << 16);
  }
  memcpy(&x, (const float *)from + at, sizeof x);
  return x;
}

/* To nearest, even; NaN stays NaN. */
INLINE void store(void *to, long at, floats x, int bfloat16) {
  if (bfloat16) {
    integers bits = (integers)x, nan = (integers)(x != x);
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    shorts narrow = __builtin_convertvector((bits & ~nan) | (0x7fc0 & nan), shorts);
    memcpy((uint16_t *)to + at, &narrow, sizeof narrow);
  } else {
    memcpy((float *)to + at, &x, sizeof x);
  }
}

INLINE void store_one(void *to, long at, float x, int bfloat16) {
  if (!bfloat16) {
    ((float *)to)[at] = x;
    return;
  }
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  ((uint16_t *)to)[at] = x != x ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

INLINE float total(floats x) {
  halves h[2];
  memcpy(h, &x, sizeof x);
  h[0] += h[1];
  return (h[0][0] + h[0][1]) + (h[0][2] + h[0][3]);
}
