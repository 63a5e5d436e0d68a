/* What the kernels for rows of codes share: rows taken ROWS at a time, and their groups' pairs. A
   pair is scale and zero, or scale and offset, two bfloat16 or, if `wide`, two float32. */

#include "vectors.h"

#define ROWS 2 /* share the loaded inputs; they lie one after the other in memory */
#define AHEAD 4096 /* bytes: what is wanted soon; measured, a quarter of the time */

typedef struct {
  const char *codes[ROWS];
  const char *pairs[ROWS];
} rows;

INLINE long pair_bytes(int wide) { return wide ? 8 : 4; }

/* The rows from `start` on; the last of `out` stands in for rows that are not there. bytes: of a
   row's codes. */
INLINE rows rows_from(long start, long out, const char *codes, long bytes, const char *pairs,
                      long groups, int wide) {
  rows found;
  for (int r = 0; r < ROWS; r++) {
    long number = start + r < out ? start + r : out - 1;
    found.codes[r] = codes + number * bytes;
    found.pairs[r] = pairs + number * groups * pair_bytes(wide);
  }
  return found;
}

/* Have memory fetch what follows: step `number` of ROWS rows, each step as many bytes of each. */
INLINE void fetch(const rows *from, long number, long bytes) {
  __builtin_prefetch(from->codes[0] + number * bytes + AHEAD);
}

/* acc + what some inputs of one group give: `plain` is inputs times codes, `sums` inputs alone.
   (code - zero) * scale or, with `offset`, code * scale + offset. */
INLINE floats finished(floats acc, floats plain, floats sums, const char *pair, int wide,
                       int offset) {
  floats scale, other;
  if (wide) {
    float both[2];
    memcpy(both, pair, sizeof both);
    scale = all(both[0]), other = all(both[1]);
  } else {
    uint32_t both;
    memcpy(&both, pair, sizeof both);
    integers bits = both - (integers){0};
    scale = (floats)(bits << 16), other = (floats)(bits & 0xffff0000);
  }
  if (offset) return acc + plain * scale + sums * other;
  return acc + (plain - sums * other) * scale;
}

/* The sums of the rows from `start` on as y[start], y[start + 1] ... */
INLINE void store_rows(void *y, long start, long out, const floats *acc, int bfloat16) {
  for (int r = 0; r < ROWS && start + r < out; r++)
    store_one(y, start + r, total(acc[r]), bfloat16);
}
