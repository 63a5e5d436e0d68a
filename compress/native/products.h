/* The kernels that several files call. Those that return int return 0, or 1 if memory is short. */

int int4_rows(const void *codes, const void *pairs, const void *x, void *y, long count, long out,
              long in, long size, int wide, int offset, int bfloat16);
int int8_rows(const void *codes, const void *pairs, const void *x, void *y, long count, long out,
              long in, long size, int wide, int bfloat16);
int has_rounded_rows(void); /* whether this processor has what the rounded ones need */
int rounded_rows(const void *codes, const void *pairs, const void *x, void *y, long count, long out,
                 long in, long size, long block, int bits, int wide, int offset, int bfloat16);
int rounded_many(const void *codes, const void *pairs, const void *x, void *y, long count, long out,
                 long in, long size, long block, int bits, int wide, int bfloat16);
int dense_rows(const void *weight, const void *x, void *y, long count, long out, long in,
               int bfloat16);

void add_norm(void *x, const void *delta, const void *weight, const void *bias, void *y, long rows,
              long width, float eps, int bfloat16);
void gate(const void *x, void *y, long rows, long inner, int bfloat16);
void gelu(const void *x, void *y, long count, int bfloat16);
int attend(const void *qkv, const void *cos, const void *sin, void *cache, void *y, long batch,
           long heads, long key_heads, long width, long room, long before, float scale,
           int bfloat16);
