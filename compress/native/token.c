/* What stands between the matrix products when one token is decoded: norms, attention over the
   cache, gate or GELU. */

#include "products.h"
#include "vectors.h"

#define WIDEST 512 /* of a head */

/* e^x for x up to 88, relative error below 3e-7; NaN stays NaN, and below -87 all are e^-87. */
INLINE floats exponential(floats x) {
  x = either((integers)(x < all(-87)), all(-87), x);
  floats turns = (x * 1.44269504f + 12582912.0f) - 12582912.0f; /* to the nearest whole number */
  floats rest = (x - turns * 0.693359375f) + turns * 2.12194440e-4f; /* ln 2 in two parts */
  floats power = rest * (1.0f / 5040) + 1.0f / 720;
  power = power * rest + 1.0f / 120;
  power = power * rest + 1.0f / 24;
  power = power * rest + 1.0f / 6;
  power = power * rest + 0.5f;
  power = power * rest + 1.0f;
  power = power * rest + 1.0f;
  signed_integers exponent = __builtin_convertvector(turns, signed_integers) + 127;
  return power * (floats)(exponent << 23);
}

/* x += delta, if there is one; y = norm of x. x, delta, y: (rows, width). With a bias it is
   LayerNorm, without RMSNorm. width: a multiple of 8. */
void add_norm(void *x, const void *delta, const void *weight, const void *bias, void *y, long rows,
              long width, float eps, int bfloat16) {
  for (long row = 0; row < rows; row++) {
    long start = row * width, stop = start + width;
    floats sum = {0}, squares = {0};
    for (long at = start; at < stop; at += LANES) {
      if (delta) store(x, at, load(x, at, bfloat16) + load(delta, at, bfloat16), bfloat16);
      sum += load(x, at, bfloat16);
    }
    floats mean = all(bias ? total(sum) / width : 0);
    for (long at = start; at < stop; at += LANES) {
      floats away = load(x, at, bfloat16) - mean;
      squares += away * away;
    }
    float factor = 1 / sqrtf(total(squares) / width + eps);
    for (long at = start; at < stop; at += LANES) {
      floats value = (load(x, at, bfloat16) - mean) * factor * load(weight, at - start, bfloat16);
      if (bias) value += load(bias, at - start, bfloat16);
      store(y, at, value, bfloat16);
    }
  }
}

/* x / (1 + e^-y), for any y. */
INLINE floats times_sigmoid(floats x, floats y) {
  return x / (1.0f + exponential(either((integers)(-y > all(88)), all(88), -y))); /* e^88 is finite */
}

/* y = silu(gate) * up. x: (rows, 2 inner), gate and up; y: (rows, inner). inner: a multiple of 8. */
void gate(const void *x, void *y, long rows, long inner, int bfloat16) {
  for (long row = 0; row < rows; row++) {
    for (long at = 0; at < inner; at += LANES) {
      floats g = load(x, row * 2 * inner + at, bfloat16);
      floats up = load(x, row * 2 * inner + inner + at, bfloat16);
      store(y, row * inner + at, times_sigmoid(g, g) * up, bfloat16);
    }
  }
}

/* GELU by tanh, (1 + tanh u) / 2 being 1 / (1 + e^-2u). x, y: count numbers, a multiple of 8. */
void gelu(const void *x, void *y, long count, int bfloat16) {
  for (long at = 0; at < count; at += LANES) {
    floats g = load(x, at, bfloat16);
    floats twice = 1.5957691216f * (g + 0.044715f * g * g * g); /* 2 sqrt(2 / pi) */
    store(y, at, times_sigmoid(g, twice), bfloat16);
  }
}

/* One head of one token turned to its position: channel c with c + width / 2. Without cos: as it
   is. The signs are in sin. */
INLINE void turn(float *to, const void *from, long start, const void *cos, const void *sin,
                 long width, int bfloat16) {
  for (long at = 0; at < width; at += LANES) {
    floats x = load(from, start + at, bfloat16);
    if (cos) {
      floats other = load(from, start + (at + width / 2) % width, bfloat16);
      x = x * load(cos, at, bfloat16) + other * load(sin, at, bfloat16);
    }
    store(to, at, x, 0);
  }
}

/* One query over the keys and values so far. vectors: width / LANES, a constant where inlined. */
INLINE void attend_one(const float *query, const void *keys, const void *values, float *scores,
                       void *y, long start, long count, long vectors, int bfloat16) {
  long width = vectors * LANES;
  float highest = -INFINITY;
  for (long at = 0; at < count; at++) {
    floats sum = {0};
    for (long v = 0; v < vectors; v++)
      sum += load(query, v * LANES, 0) * load(keys, at * width + v * LANES, bfloat16);
    scores[at] = total(sum);
    highest = scores[at] > highest ? scores[at] : highest;
  }
  for (long at = count; at % LANES; at++) scores[at] = -INFINITY; /* e^-87: nothing */
  floats sum = {0};
  for (long at = 0; at < count; at += LANES) {
    floats each = exponential(load(scores, at, 0) - highest);
    store(scores, at, each, 0);
    sum += each;
  }
  float share = 1 / total(sum);
  for (long first = 0; first < vectors; first += 8) { /* so many sums stay in registers */
    floats found[8] = {{0}};
    long here = vectors - first < 8 ? vectors - first : 8;
    for (long at = 0; at < count; at++)
      for (long v = 0; v < here; v++)
        found[v] += scores[at] * load(values, at * width + (first + v) * LANES, bfloat16);
    for (long v = 0; v < here; v++)
      store(y, start + (first + v) * LANES, found[v] * share, bfloat16);
  }
}

/* One token of each sequence: its key and value go into the cache, its queries over all of it.
   qkv: (batch, heads + 2 key_heads, width). cos, sin: (width) or NULL. cache: (2, batch, key_heads,
   room, width), `before` tokens of it filled. y: (batch, heads, width). width: a multiple of 16, up
   to WIDEST. Returns 0, or 1 if memory is short. */
int attend(const void *qkv, const void *cos, const void *sin, void *cache, void *y, long batch,
           long heads, long key_heads, long width, long room, long before, float scale,
           int bfloat16) {
  long count = before + 1, all_heads = heads + 2 * key_heads, bytes = bfloat16 ? 2 : 4;
  long padded = (count + LANES - 1) / LANES * LANES, vectors = width / LANES;
  float *scores = malloc(batch * heads * padded * sizeof(float));
  if (scores == NULL) return 1;
  for (long row = 0; row < batch; row++) {
    for (long head = 0; head < 2 * key_heads; head++) { /* keys, then values */
      int value = head >= key_heads;
      long number = value * batch * key_heads + row * key_heads + head % key_heads;
      float turned[WIDEST];
      long start = (row * all_heads + heads + head) * width;
      turn(turned, qkv, start, value ? NULL : cos, sin, width, bfloat16);
      for (long at = 0; at < width; at += LANES)
        store(cache, (number * room + before) * width + at, load(turned, at, 0), bfloat16);
    }
  }
#pragma omp parallel for schedule(static)
  for (long number = 0; number < batch * heads; number++) {
    long row = number / heads, head = number % heads;
    float query[WIDEST];
    turn(query, qkv, (row * all_heads + head) * width, cos, sin, width, bfloat16);
    for (long at = 0; at < width; at += LANES) store(query, at, load(query, at, 0) * scale, 0);
    long held = (row * key_heads + head / (heads / key_heads)) * room * width * bytes;
    const char *keys = (const char *)cache + held;
    const char *values = keys + batch * key_heads * room * width * bytes;
    float *own = scores + number * padded;
#define ATTEND(vectors, bfloat16) \
  attend_one(query, keys, values, own, y, number * width, count, vectors, bfloat16)
    if (vectors == 8 && bfloat16)
      ATTEND(8, 1);
    else if (vectors == 8)
      ATTEND(8, 0);
    else if (vectors == 16 && bfloat16)
      ATTEND(16, 1);
    else
      ATTEND(vectors, bfloat16);
  }
  free(scores);
  return 0;
}
