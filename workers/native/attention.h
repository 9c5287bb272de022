/* What attention.c takes: from Python, and from forward.c. */
#pragma once
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))
#define ALWAYS static inline __attribute__((always_inline))

enum Level { PLAIN, AVX2, AVX512, AVX512_BF16, LEVELS };
enum Dtype { FLOAT32, BFLOAT16 };

struct Span {
    int32_t start, size; /* positions */
    int32_t first;       /* its first token among the packed ones */
    int32_t table;       /* its first block among all tables */
};

/* The same in native.py: pointers first, then 32 bits each. */
struct Call {
    char *keys, *values;             /* the layer's pools */
    const char *q, *k, *v;           /* [T, heads, D] by strides, D dense */
    char *out;                       /* [T, heads, D] dense */
    int64_t q_token, q_head;         /* strides, elements */
    int64_t k_token, k_head;
    int64_t v_token, v_head;
    const struct Span *spans;
    const int32_t *tables;
    char *room;                      /* scls_attention_room bytes, 64-byte aligned */
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned); /* GOMP_parallel; null: one thread */
    void (*barrier)(void);           /* GOMP_barrier */
    int32_t count;                   /* of spans */
    int32_t block_size, heads, kv_heads, width;
    int32_t window;                  /* positions a token sees, its own among them; 0: all */
    int32_t threads;
    int32_t level, dtype;
    float scaling;
    float softcap;                   /* 0: none */
};

/* The best level of this machine. */
int32_t scls_attention_level(void);
/* Bytes that a call needs for itself. */
int64_t scls_attention_room(const struct Call *);
void scls_attend(const struct Call *);
