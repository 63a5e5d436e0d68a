/* One token through all blocks of a decoder, in one call. Layers whose kernels are not here, other
   libraries' or torch's, are asked for by a call back. */

#include "products.h"
#include "vectors.h"

typedef struct {
  const void *codes, *pairs, *bias; /* bias: (out) in the type of the inputs, or NULL */
  int64_t out, in, size, block;     /* block: of rounded inputs; 0 where they stay as they are */
  int32_t bits;                     /* of a code, 4 or 8; 16, 32: a weight; 0: not computed here */
  int32_t wide, offset;
  int32_t integers; /* inputs are quantized first, to 8 bits with a scale and a zero each vector */
} matrix;

typedef struct {
  const void *weight, *bias;
  float eps;
} norm;

#define MANY 16 /* vectors; see kernel_choice.py */
enum { QKV, OUT, UP, DOWN, INNER };
enum { OTHER, GATE, GELU };

typedef struct {
  norm norms[2];
  matrix layers[4];
  int64_t heads, key_heads;
  int64_t up;    /* rows of up, from which `inner` is made */
  int32_t inner; /* what stands between up and down */
} block;

typedef struct {
  const block *blocks;
  norm last;
  int64_t count, batch, columns, width;
  float scale;
  int32_t bfloat16;
  void *x, *normed, *wide, *inner, *delta; /* (batch, ...): see token_step.py */
  void *const *caches;                     /* one a block; see attend */
  int (*call)(int64_t block, int32_t layer);
} decoder;

/* y = x W^T for `count` vectors, without the bias. Returns 0, or 1 if memory is short. */
int product(const matrix *m, const void *x, void *y, long count, int bfloat16) {
  if (m->bits > 8) return dense_rows(m->codes, x, y, count, m->out, m->in, bfloat16);
#ifdef __AVX2__
  if (m->block && count >= MANY && !m->offset)
    return rounded_many(m->codes, m->pairs, x, y, count, m->out, m->in, m->size, m->block, m->bits,
                        m->wide, bfloat16);
  if (m->block)
    return rounded_rows(m->codes, m->pairs, x, y, count, m->out, m->in, m->size, m->block, m->bits,
                        m->wide, m->offset, bfloat16);
#endif
  if (m->bits == 4)
    return int4_rows(m->codes, m->pairs, x, y, count, m->out, m->in, m->size, m->wide, m->offset,
                     bfloat16);
  return int8_rows(m->codes, m->pairs, x, y, count, m->out, m->in, m->size, m->wide, bfloat16);
}

/* dynamic_linear.quantized_tokens for one vector: code - zero as float32; returns the scale. */
static float quantize(float *to, const void *x, long in, int bfloat16) {
  float low = 0, high = 0;
  for (long at = 0; at < in; at++) {
    float each = to[at] = load_one(x, at, bfloat16);
    low = each < low ? each : low, high = each > high ? each : high;
  }
  float scale = (high - low) / 255;
  scale = scale > 1.17549435e-38f ? scale : 1.17549435e-38f;
  float zero = rintf(-128 - low / scale);
  for (long at = 0; at < in; at++) {
    float each = rintf(to[at] / scale);
    each = each < -128 - zero ? -128 - zero : each; /* NaN stays */
    to[at] = each > 127 - zero ? 127 - zero : each;
  }
  return scale;
}

/* The same product of quantized inputs. */
static int integer_product(const matrix *m, const void *x, void *y, long count, int bfloat16) {
  long bytes = bfloat16 ? 2 : 4;
  float *steps = aligned_alloc(64, ((m->in + m->out) * sizeof(float) + 63) / 64 * 64);
  if (steps == NULL) return 1;
  float *whole = steps + m->in;
  int short_of_memory = 0;
  for (long t = 0; t < count && !short_of_memory; t++) {
    float scale = quantize(steps, (const char *)x + t * m->in * bytes, m->in, bfloat16);
    short_of_memory = product(m, steps, whole, 1, 0);
    for (long at = 0; at < m->out; at++)
      store_one(y, t * m->out + at, whole[at] * scale, bfloat16);
  }
  free(steps);
  return short_of_memory;
}

static int layer(const decoder *d, long number, int which, const void *x, void *y) {
  const matrix *m = &d->blocks[number].layers[which];
  if (m->bits == 0) return d->call(number, which);
  int failed = (m->integers ? integer_product : product)(m, x, y, d->batch, d->bfloat16);
  if (m->bias == NULL || failed) return failed;
  for (long t = 0; t < d->batch; t++)
    for (long at = 0; at < m->out; at++)
      store_one(y, t * m->out + at,
                load_one(y, t * m->out + at, d->bfloat16) + load_one(m->bias, at, d->bfloat16),
                d->bfloat16);
  return 0;
}

/* One token of each sequence: x embedded, `normed` the answer. cos, sin, room, before: see attend.
   Returns 0; 1 if memory is short; else what `call` returned. */
int decode(const decoder *d, const void *cos, const void *sin, long room, long before) {
  const void *delta = NULL;
  int failed = 0;
#define NORM(n) \
  add_norm(d->x, delta, (n).weight, (n).bias, d->normed, d->batch, d->columns, (n).eps, d->bfloat16)
#define TRY(what) \
  if ((failed = (what))) return failed
  for (long number = 0; number < d->count; number++) {
    const block *b = d->blocks + number;
    NORM(b->norms[0]);
    TRY(layer(d, number, QKV, d->normed, d->wide));
    TRY(attend(d->wide, cos, sin, d->caches[number], d->inner, d->batch, b->heads, b->key_heads,
               d->width, room, before, d->scale, d->bfloat16));
    TRY(layer(d, number, OUT, d->inner, d->delta));
    delta = d->delta;
    NORM(b->norms[1]);
    TRY(layer(d, number, UP, d->normed, d->wide));
    if (b->inner == GATE)
      gate(d->wide, d->inner, d->batch, b->up / 2, d->bfloat16);
    else if (b->inner == GELU)
      gelu(d->wide, d->inner, d->batch * b->up, d->bfloat16);
    else
      TRY(d->call(number, INNER));
    TRY(layer(d, number, DOWN, d->inner, d->delta));
  }
  NORM(d->last);
  return failed;
}
