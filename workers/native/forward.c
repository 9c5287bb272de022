/* A whole pass through a dense decoder, from the embeddings to the logits: what transformers' modelling code computes for it,
 * in one call.
 *
 * On a CPU a decode step is a few hundred small operations around some weights that are read once: what each costs to
 * dispatch is more than what it computes. Here weights lie in the order they are read in, what surrounds a product is done
 * where its result is at hand, and threads meet only where one needs what another made. Attention is attention.c's.
 *
 * What flows between layers (the residual) is fp32; what is multiplied by weights has the model's type, as in transformers.
 * A row's result does not depend on the rows beside it, nor on the threads.
 */

#include <math.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "attention.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define TARGET_F32 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))

enum { PANEL = 32 }; /* outputs of a product whose weights lie together: two vectors */
enum { ROWS = 12 };  /* rows whose sums are held in registers beside them */

enum Act { SILU, GELU_TANH };
/* What becomes of a product: kept in the model's type; kept as floats; added to the residual; half of it gated by the other. */
enum Finish { KEEP, KEEP_FLOAT, ADD, GATE };

struct Linear {
    const void *weights; /* panels [N / 32][K][32], of bfloat16 [N / 32][K / 2][32][2] */
    const float *bias;   /* [N] in the panels' order, or null */
    int32_t n, k;
};

struct Norm {
    const float *weights; /* or null: there is none */
    int32_t width, unused;
};

struct Layer {
    struct Norm before_attention, query, key, after_attention, before_mlp, after_mlp;
    struct Linear qkv, out, gate_up, down;
    char *keys, *values; /* the pools */
    int32_t window, rotary; /* 0: no window; which table of angles */
};

struct Decoder {
    const struct Layer *layers;
    struct Norm last;
    struct Linear head;
    int32_t count, hidden, inner, heads, kv_heads, width, turned; /* dimensions of a head that the rotary embedding turns */
    int32_t act, dtype, level, block_size, threads;
    float eps, scaling, softcap, embedding_scale;
    const char *embeddings;       /* [vocabulary, hidden] */
    const float *cos[2], *sin[2]; /* [positions, turned] of each table */
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
    void (*barrier)(void);
};

struct Forward {
    const uint32_t *ids; /* [T] */
    int32_t *positions;  /* [T] */
    float *x;            /* [T, hidden], the residual */
    float *branch;       /* [T, hidden] */
    float *wide;         /* [T, (heads + 2 kv_heads) width] */
    char *h;             /* [T, max(hidden, heads width)] */
    char *qkv;           /* [T, (heads + 2 kv_heads) width] */
    char *gated;         /* [T, inner] */
    const struct Span *spans;
    const int32_t *tables;
    char *room;          /* scls_forward_room bytes */
    const int64_t *ends; /* [n], tokens whose logits are wanted */
    float *logits;       /* [n, vocabulary] */
    int32_t tokens, count, n, unused;
};

/* How rows draw, one entry each. */
struct Draws {
    const float *heats;     /* temperatures; 0: the likeliest */
    const uint64_t *seeds;  /* mixed once */
    const int64_t *places;  /* of the next token in the row's output */
    uint32_t *drawn;        /* [passes, n] */
};

/* Passes that follow one another without the caller: all rows have one token, and all draw. */
struct Burst {
    const uint32_t *stops;   /* ids at which some row may end */
    const int32_t *interrupt; /* not zero: somebody waits for the caller */
    uint32_t *ids;           /* as Forward's */
    struct Span *spans;      /* as Forward's */
    int64_t room;            /* bytes of Forward's */
    int32_t most, stops_count;
};

/* ---------------------------------------------------------------- numbers */

ALWAYS TARGET_F32 __m512 exp16(__m512 x) {
    const __m512 most = _mm512_set1_ps(88.0f), least = _mm512_set1_ps(-87.0f);
    x = _mm512_max_ps(_mm512_min_ps(x, most), least);
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), 0);
    x = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    x = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), x);
    __m512 y = _mm512_set1_ps(1.9875691500e-4f);
    y = _mm512_fmadd_ps(y, x, _mm512_set1_ps(1.3981999507e-3f));
    y = _mm512_fmadd_ps(y, x, _mm512_set1_ps(8.3334519073e-3f));
    y = _mm512_fmadd_ps(y, x, _mm512_set1_ps(4.1665795894e-2f));
    y = _mm512_fmadd_ps(y, x, _mm512_set1_ps(1.6666665459e-1f));
    y = _mm512_fmadd_ps(y, x, _mm512_set1_ps(5.0000001201e-1f));
    y = _mm512_fmadd_ps(y, _mm512_mul_ps(x, x), _mm512_add_ps(x, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(y, n);
}

/* x / (1 + exp(-z)): silu where z is x; gelu by tanh is the same with z = 2 sqrt(2 / pi) (x + 0.044715 x^3). */
ALWAYS TARGET_F32 __m512 act16(int act, __m512 x) {
    __m512 z = x;
    if (act == GELU_TANH) {
        const __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
        z = _mm512_mul_ps(_mm512_fmadd_ps(cube, _mm512_set1_ps(0.044715f), x), _mm512_set1_ps(1.5957691216057308f));
    }
    const __m512 one = _mm512_set1_ps(1.0f);
    return _mm512_div_ps(x, _mm512_add_ps(one, exp16(_mm512_sub_ps(_mm512_setzero_ps(), z))));
}

/* Rounded to nearest, ties to even, by integers: the same on a machine without the instruction. */
ALWAYS TARGET_F32 void store16(int dtype, void *at, int32_t offset, __mmask16 mask, __m512 values) {
    if (dtype == FLOAT32) {
        _mm512_mask_storeu_ps((float *)at + offset, mask, values);
        return;
    }
    const __m512i bits = _mm512_castps_si512(values);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    const __m512i all = _mm512_mask_set1_epi32(rounded, nan, 0x7fc0);
    _mm256_mask_storeu_epi16((uint16_t *)at + offset, mask, _mm512_cvtepi32_epi16(all));
}

ALWAYS __mmask16 first(int32_t count) { return count >= 16 ? 0xffff : (__mmask16)((1u << (count < 0 ? 0 : count)) - 1); }

/* ---------------------------------------------------------------- products */

struct Product {
    const struct Linear *linear;
    const char *in; /* [T, K], rows `stride` elements apart */
    void *out;      /* [T, N], of GATE [T, N / 2] */
    const int64_t *picked; /* rows of `in`, or null: all */
    int32_t rows, finish, stride;
};

/* `rows` rows times a panel. `ahead` is what is wanted next: it is fetched while this is computed, `pace` bytes a step. */
#define TILE_BODY(...)                                                                                                     \
    __m512 sums[ROWS][2];                                                                                                 \
    _Pragma("GCC unroll 12") for (int r = 0; r < rows; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();                \
    for (int32_t k = 0; k < steps; k++, at += 128, ahead += pace) {                                                       \
        _mm_prefetch(ahead, _MM_HINT_T1);                                                                                 \
        __VA_ARGS__                                                                                                       \
    }                                                                                                                     \
    finish(p, dtype, act, rows, row, panel, sums);

ALWAYS TARGET_F32 void finish(
    const struct Product *p, int dtype, int act, int rows, int32_t row, int32_t panel, __m512 (*sums)[2]) {
    const int32_t n = p->linear->n, column = panel * PANEL, left = n - column;
    const float *bias = p->linear->bias;
    const __mmask16 masks[2] = {first(left), first(left - 16)};
    for (int half = 0; bias && half < 2; half++) {
        const __m512 b = _mm512_maskz_loadu_ps(masks[half], bias + column + 16 * half);
        for (int r = 0; r < rows; r++) sums[r][half] = _mm512_add_ps(sums[r][half], b);
    }
    for (int r = 0; r < rows; r++) {
        const size_t line = (size_t)(row + r);
        if (p->finish == GATE) {
            const __m512 gated = _mm512_mul_ps(act16(act, sums[r][0]), sums[r][1]);
            const size_t at = line * (n / 2) + panel * 16;
            store16(dtype, (char *)p->out + at * (dtype == FLOAT32 ? 4 : 2), 0, first(n / 2 - panel * 16), gated);
            continue;
        }
        for (int half = 0; half < 2; half++) {
            const size_t at = line * n + column + 16 * half;
            float *floats = (float *)p->out + at;
            if (p->finish == KEEP)
                store16(dtype, (char *)p->out + at * (dtype == FLOAT32 ? 4 : 2), 0, masks[half], sums[r][half]);
            else if (p->finish == KEEP_FLOAT)
                _mm512_mask_storeu_ps(floats, masks[half], sums[r][half]);
            else
                _mm512_mask_storeu_ps(
                    floats, masks[half], _mm512_add_ps(_mm512_maskz_loadu_ps(masks[half], floats), sums[r][half]));
        }
    }
}

ALWAYS TARGET void tile_bf16(
    int rows, const struct Product *p, int act, int32_t row, int32_t panel, const char *const *in, const char *at,
    const char *ahead, int32_t pace) {
    enum { dtype = BFLOAT16 };
    const int32_t steps = p->linear->k / 2;
    TILE_BODY({
        const __m512bh left = (__m512bh)_mm512_loadu_si512(at), right = (__m512bh)_mm512_loadu_si512(at + 64);
        _Pragma("GCC unroll 12") for (int r = 0; r < rows; r++) {
            int32_t pair;
            memcpy(&pair, in[r] + 4 * (size_t)k, 4);
            const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
            sums[r][0] = _mm512_dpbf16_ps(sums[r][0], left, both);
            sums[r][1] = _mm512_dpbf16_ps(sums[r][1], right, both);
        }
    })
}

ALWAYS TARGET_F32 void tile_f32(
    int rows, const struct Product *p, int act, int32_t row, int32_t panel, const char *const *in, const char *at,
    const char *ahead, int32_t pace) {
    enum { dtype = FLOAT32 };
    const int32_t steps = p->linear->k;
    TILE_BODY({
        const __m512 left = _mm512_loadu_ps(at), right = _mm512_loadu_ps(at + 64);
        _Pragma("GCC unroll 12") for (int r = 0; r < rows; r++) {
            float one;
            memcpy(&one, in[r] + 4 * (size_t)k, 4);
            const __m512 value = _mm512_set1_ps(one);
            sums[r][0] = _mm512_fmadd_ps(left, value, sums[r][0]);
            sums[r][1] = _mm512_fmadd_ps(right, value, sums[r][1]);
        }
    })
}

typedef void Tile(
    const struct Product *, int act, int32_t row, int32_t panel, const char *const *in, const char *at, const char *ahead,
    int32_t pace);

#define OF_ROWS(n)                                                                                                          \
    static TARGET void bf16_##n(                                                                                            \
        const struct Product *p, int act, int32_t row, int32_t panel, const char *const *in, const char *at,               \
        const char *ahead, int32_t pace) {                                                                                 \
        tile_bf16(n, p, act, row, panel, in, at, ahead, pace);                                                             \
    }                                                                                                                       \
    static TARGET_F32 void f32_##n(                                                                                         \
        const struct Product *p, int act, int32_t row, int32_t panel, const char *const *in, const char *at,               \
        const char *ahead, int32_t pace) {                                                                                 \
        tile_f32(n, p, act, row, panel, in, at, ahead, pace);                                                              \
    }
OF_ROWS(1) OF_ROWS(2) OF_ROWS(3) OF_ROWS(4) OF_ROWS(5) OF_ROWS(6)
OF_ROWS(7) OF_ROWS(8) OF_ROWS(9) OF_ROWS(10) OF_ROWS(11) OF_ROWS(12)
static Tile *const tiles[2][ROWS] = {
    {f32_1, f32_2, f32_3, f32_4, f32_5, f32_6, f32_7, f32_8, f32_9, f32_10, f32_11, f32_12},
    {bf16_1, bf16_2, bf16_3, bf16_4, bf16_5, bf16_6, bf16_7, bf16_8, bf16_9, bf16_10, bf16_11, bf16_12},
};

/* All rows times one panel: in as few and as equal blocks as the registers allow. */
static void multiply(const struct Decoder *d, const struct Product *p, int32_t panel) {
    const int32_t element = d->dtype == FLOAT32 ? 4 : 2, k = p->linear->k;
    const size_t bytes = (size_t)k * PANEL * element; /* of a panel */
    const char *weights = (const char *)p->linear->weights + panel * bytes;
    const int32_t blocks = (p->rows + ROWS - 1) / ROWS;
    for (int32_t block = 0, row = 0; block < blocks; block++) {
        const int32_t rows = p->rows / blocks + (block < p->rows % blocks);
        const char *in[ROWS];
        for (int32_t r = 0; r < rows; r++) {
            const int64_t line = p->picked ? p->picked[row + r] : row + r;
            in[r] = p->in + (size_t)line * p->stride * element;
        }
        /* One block streams its own panel; of several the first two fetch half of the next panel each, behind their sums. */
        const char *ahead = weights + 2048;
        int32_t pace = 128;
        if (blocks > 1) {
            ahead = block < 2 ? weights + bytes + block * (bytes / 2) : weights;
            pace = block < 2 ? 64 : 0;
        }
        tiles[d->dtype][rows - 1](p, d->act, row, panel, in, weights, ahead, pace);
        row += rows;
    }
}

/* ---------------------------------------------------------------- what is done to single rows */

ALWAYS TARGET_F32 void norm(const struct Norm *norm, float eps, const float *x, int dtype, void *out) {
    const int32_t n = norm->width;
    __m512 squares = _mm512_setzero_ps();
    for (int32_t i = 0; i < n; i += 16) {
        const __m512 v = _mm512_maskz_loadu_ps(first(n - i), x + i);
        squares = _mm512_fmadd_ps(v, v, squares);
    }
    const __m512 scale = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(squares) / (float)n + eps));
    for (int32_t i = 0; i < n; i += 16) {
        const __mmask16 mask = first(n - i);
        const __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), scale);
        store16(dtype, out, i, mask, _mm512_mul_ps(v, _mm512_maskz_loadu_ps(mask, norm->weights + i)));
    }
}

/* transformers' rotate_half: dimension i turns with i + turned / 2. */
static void rotate(float *head, const float *cos, const float *sin, int32_t turned) {
    const int32_t half = turned / 2;
    for (int32_t i = 0; i < half; i++) {
        const float a = head[i], b = head[i + half];
        head[i] = a * cos[i] - b * sin[i];
        head[i + half] = b * cos[i + half] + a * sin[i + half];
    }
}

/* Queries and keys of one token: normed, turned, and in the model's type. */
static TARGET_F32 void turn(const struct Decoder *d, const struct Layer *l, const struct Forward *f, int32_t token) {
    const int32_t rows = d->heads + 2 * d->kv_heads, all = rows * d->width;
    float *wide = f->wide + (size_t)token * all;
    const struct Norm *norms[2] = {&l->query, &l->key};
    float *const parts[2] = {wide, wide + (size_t)d->heads * d->width};
    const int32_t widths[2] = {d->heads * d->width, d->kv_heads * d->width};
    for (int part = 0; part < 2; part++) {
        if (!norms[part]->weights) continue;
        for (int32_t at = 0; at < widths[part]; at += norms[part]->width)
            norm(norms[part], d->eps, parts[part] + at, FLOAT32, parts[part] + at);
    }
    const size_t angles = (size_t)f->positions[token] * d->turned;
    for (int32_t head = 0; head < d->heads + d->kv_heads; head++)
        rotate(wide + head * d->width, d->cos[l->rotary] + angles, d->sin[l->rotary] + angles, d->turned);
    char *out = f->qkv + (size_t)token * all * (d->dtype == FLOAT32 ? 4 : 2);
    for (int32_t i = 0; i < all; i += 16) store16(d->dtype, out, i, first(all - i), _mm512_maskz_loadu_ps(first(all - i), wide + i));
}

static TARGET_F32 void embed(const struct Decoder *d, const struct Forward *f, int32_t token) {
    const size_t from = (size_t)f->ids[token] * d->hidden;
    float *x = f->x + (size_t)token * d->hidden;
    for (int32_t i = 0; i < d->hidden; i++) {
        if (d->dtype == FLOAT32) {
            x[i] = ((const float *)d->embeddings)[from + i] * d->embedding_scale;
        } else {
            const uint32_t bits = (uint32_t)((const uint16_t *)d->embeddings)[from + i] << 16;
            float value;
            memcpy(&value, &bits, 4);
            x[i] = value * d->embedding_scale;
        }
    }
}

static TARGET_F32 void add(float *x, const float *branch, int32_t n) {
    for (int32_t i = 0; i < n; i++) x[i] += branch[i];
}

/* ---------------------------------------------------------------- a row's draw */

/* Of normal numbers above 0: Cephes' polynomial about 1. */
ALWAYS TARGET_F32 __m512 log16(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f);
    __m512 e = _mm512_getexp_ps(x), m = _mm512_getmant_ps(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_zero);
    const __mmask16 large = _mm512_cmp_ps_mask(m, _mm512_set1_ps(1.41421356f), _CMP_GT_OQ);
    m = _mm512_mask_mul_ps(m, large, m, _mm512_set1_ps(0.5f)), e = _mm512_mask_add_ps(e, large, e, one);
    m = _mm512_sub_ps(m, one);
    const __m512 z = _mm512_mul_ps(m, m);
    __m512 y = _mm512_set1_ps(7.0376836292e-2f);
    y = _mm512_fmadd_ps(y, m, _mm512_set1_ps(-1.1514610310e-1f));
    y = _mm512_fmadd_ps(y, m, _mm512_set1_ps(1.1676998740e-1f));
    y = _mm512_fmadd_ps(y, m, _mm512_set1_ps(-1.2420140846e-1f));
    y = _mm512_fmadd_ps(y, m, _mm512_set1_ps(1.4249322787e-1f));
    y = _mm512_fmadd_ps(y, m, _mm512_set1_ps(-1.6668057665e-1f));
    y = _mm512_fmadd_ps(y, m, _mm512_set1_ps(2.0000714765e-1f));
    y = _mm512_fmadd_ps(y, m, _mm512_set1_ps(-2.4999993993e-1f));
    y = _mm512_fmadd_ps(y, m, _mm512_set1_ps(3.3333331174e-1f));
    y = _mm512_mul_ps(_mm512_mul_ps(y, m), z);
    y = _mm512_fmadd_ps(e, _mm512_set1_ps(-2.12194440e-4f), y);
    y = _mm512_fnmadd_ps(z, _mm512_set1_ps(0.5f), y);
    return _mm512_fmadd_ps(e, _mm512_set1_ps(0.693359375f), _mm512_add_ps(m, y));
}

static uint64_t splitmix64(uint64_t x) {
    x += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

/* Eight ids' random numbers, above 0 and up to 1: 63 bits of `splitmix64(key + id)`. */
ALWAYS TARGET_F32 __m256 uniform8(__m512i x) {
    x = _mm512_add_epi64(x, _mm512_set1_epi64((int64_t)0x9E3779B97F4A7C15u));
    x = _mm512_mullo_epi64(_mm512_xor_si512(x, _mm512_srli_epi64(x, 30)), _mm512_set1_epi64((int64_t)0xBF58476D1CE4E5B9u));
    x = _mm512_mullo_epi64(_mm512_xor_si512(x, _mm512_srli_epi64(x, 27)), _mm512_set1_epi64((int64_t)0x94D049BB133111EBu));
    x = _mm512_xor_si512(x, _mm512_srli_epi64(x, 31));
    x = _mm512_or_si512(_mm512_srli_epi64(x, 1), _mm512_set1_epi64(1));
    return _mm256_mul_ps(_mm512_cvtepi64_ps(x), _mm256_set1_ps(0x1p-63f));
}

/* The logarithms of sixteen ids' exponential variates. */
ALWAYS TARGET_F32 __m512 race16(uint64_t key, int32_t id) {
    const __m512i lane = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i at = _mm512_add_epi64(lane, _mm512_set1_epi64((int64_t)(key + (uint64_t)id)));
    const __m512 u = _mm512_insertf32x8(
        _mm512_castps256_ps512(uniform8(at)), uniform8(_mm512_add_epi64(at, _mm512_set1_epi64(8))), 1);
    /* -log(1 - u) with all digits of a small u: what 1 - u lost is put back by the ratio */
    const __m512 one = _mm512_set1_ps(1.0f), rest = _mm512_sub_ps(one, u);
    const __mmask16 tiny = _mm512_cmp_ps_mask(rest, one, _CMP_EQ_OQ), never = _mm512_cmp_ps_mask(rest, _mm512_setzero_ps(), _CMP_LE_OQ);
    const __m512 ratio = _mm512_div_ps(u, _mm512_sub_ps(rest, one));
    const __m512 e = _mm512_mask_mov_ps(_mm512_mul_ps(log16(rest), ratio), tiny, u);
    return _mm512_mask_mov_ps(log16(e), never, _mm512_set1_ps(INFINITY));
}

/* The largest, and of equals the first; a NaN is larger than any number, as torch has it. */
struct Best {
    __m512 values;
    __m512i ids;
};

ALWAYS TARGET_F32 void better(struct Best *best, __m512 values, int32_t id, __mmask16 mask) {
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __mmask16 known = _mm512_cmp_ps_mask(best->values, best->values, _CMP_ORD_Q);
    /* greater, or not a number where the best is one */
    const __mmask16 wins = mask & known & _mm512_cmp_ps_mask(values, best->values, _CMP_NLE_UQ);
    best->values = _mm512_mask_mov_ps(best->values, wins, values);
    best->ids = _mm512_mask_mov_epi32(best->ids, wins, _mm512_add_epi32(lane, _mm512_set1_epi32(id)));
}

/* One row's token: the largest logit, or a draw of its temperature's distribution (sampling.py: the Gumbel-max trick as an
 * exponential race, with random bits that are a function of seed, place and id).
 */
static TARGET_F32 uint32_t draw(const float *logits, int32_t vocabulary, float heat, uint64_t key) {
    float top = 0.0f;
    for (int warm = 0; warm < 2; warm++) {
        struct Best best = {_mm512_set1_ps(-INFINITY), _mm512_setzero_si512()};
        const __m512 cold = _mm512_set1_ps(heat), most = _mm512_set1_ps(top);
        for (int32_t id = 0; id < vocabulary; id += 16) {
            const __mmask16 mask = first(vocabulary - id);
            __m512 x = _mm512_maskz_loadu_ps(mask, logits + id);
            if (warm) x = _mm512_sub_ps(_mm512_div_ps(_mm512_sub_ps(x, most), cold), race16(key, id));
            better(&best, x, id, mask);
        }
        float values[16];
        int32_t ids[16], at = 0;
        _mm512_storeu_ps(values, best.values), _mm512_storeu_si512(ids, best.ids);
        for (int i = 1; i < 16; i++) {
            const int unknown = values[i] != values[i], was = values[at] != values[at];
            const int wins = unknown > was || (unknown == was && (unknown || values[i] == values[at] ? ids[i] < ids[at] : values[i] > values[at]));
            if (wins) at = i;
        }
        if (warm || heat <= 0.0f) return (uint32_t)ids[at];
        top = values[at];
    }
    return 0;
}

/* ---------------------------------------------------------------- the pass */

struct Work {
    const struct Decoder *decoder;
    const struct Forward *forward;
    const struct Layer *layer;
    const struct Norm *norm; /* of rows */
    struct Product product;
    const struct Draws *draws;
    const float *logits; /* [n, vocabulary] */
    int32_t pass;        /* of a burst */
    int32_t what, count, each;
    atomic_int next;
};

enum What { MULTIPLY, EMBED, NORM, TURN, NORM_AND_ADD, DRAW };

static TARGET_F32 void one(struct Work *w, int32_t i) {
    const struct Decoder *d = w->decoder;
    const struct Forward *f = w->forward;
    const size_t row = (size_t)i * d->hidden;
    switch (w->what) {
    case MULTIPLY: multiply(d, &w->product, i); break;
    case EMBED: embed(d, f, i); break;
    case TURN: turn(d, w->layer, f, i); break;
    case DRAW: {
        const struct Draws *draws = w->draws;
        const uint64_t key = splitmix64(draws->seeds[i] + (uint64_t)(draws->places[i] + w->pass));
        draws->drawn[(size_t)w->pass * w->count + i] =
            draw(w->logits + (size_t)i * d->head.n, d->head.n, draws->heats[i], key);
        break;
    }
    case NORM_AND_ADD:
        norm(w->norm, d->eps, f->branch + row, FLOAT32, f->branch + row);
        add(f->x + row, f->branch + row, d->hidden);
        break;
    case NORM:
        if (w->norm->weights) {
            norm(w->norm, d->eps, f->x + row, d->dtype, f->h + row * (d->dtype == FLOAT32 ? 4 : 2));
        } else {
            char *out = f->h + row * (d->dtype == FLOAT32 ? 4 : 2);
            for (int32_t at = 0; at < d->hidden; at += 16) {
                const __mmask16 mask = first(d->hidden - at);
                store16(d->dtype, out, at, mask, _mm512_maskz_loadu_ps(mask, f->x + row + at));
            }
        }
    }
}

static void share(void *of) {
    struct Work *w = of;
    int32_t from;
    while ((from = atomic_fetch_add(&w->next, w->each)) < w->count)
        for (int32_t i = from; i < from + w->each && i < w->count; i++) one(w, i);
}

/* Few enough pieces that neighbours in memory stay together, many enough that no thread waits long for another. */
static void run(struct Work *w, int32_t what, int32_t count) {
    const struct Decoder *d = w->decoder;
    w->what = what, w->count = count;
    w->each = d->threads == 1 ? count : count / (d->threads * 8) + 1;
    atomic_store(&w->next, 0);
    /* rows of one token are less work than waking a thread */
    if (d->threads == 1 || (what != MULTIPLY && count < 4)) {
        w->each = count;
        share(w);
    } else {
        d->parallel(share, w, (unsigned)d->threads, 0);
    }
}

static void product(struct Work *w, const struct Linear *linear, const void *in, int32_t stride, void *out, int32_t finish) {
    w->product = (struct Product){linear, in, out, NULL, w->forward->tokens, finish, stride};
    run(w, MULTIPLY, (linear->n + PANEL - 1) / PANEL);
}

/* A branch's last product ends in the residual, or is normed before it is added. */
static void close_branch(struct Work *w, const struct Linear *linear, const void *in, int32_t stride, const struct Norm *after) {
    const struct Forward *f = w->forward;
    product(w, linear, in, stride, after->weights ? f->branch : f->x, after->weights ? KEEP_FLOAT : ADD);
    if (after->weights) {
        w->norm = after;
        run(w, NORM_AND_ADD, f->tokens);
    }
}

static struct Call call_of(const struct Decoder *d, const struct Forward *f, const struct Layer *l) {
    const int32_t all = (d->heads + 2 * d->kv_heads) * d->width;
    const size_t element = d->dtype == FLOAT32 ? 4 : 2;
    return (struct Call){
        .keys = l->keys, .values = l->values,
        .q = f->qkv,
        .k = f->qkv + d->heads * d->width * element,
        .v = f->qkv + (d->heads + d->kv_heads) * d->width * element,
        .out = f->h,
        .q_token = all, .q_head = d->width, .k_token = all, .k_head = d->width, .v_token = all, .v_head = d->width,
        .spans = f->spans, .tables = f->tables, .room = f->room, .parallel = d->parallel, .barrier = d->barrier,
        .count = f->count, .block_size = d->block_size, .heads = d->heads, .kv_heads = d->kv_heads, .width = d->width,
        .window = l->window, .threads = d->threads, .level = d->level, .dtype = d->dtype,
        .scaling = d->scaling, .softcap = d->softcap,
    };
}

EXPORT int64_t scls_forward_room(const struct Decoder *d, const struct Forward *f) {
    int64_t most = 0;
    for (int32_t i = 0; i < d->count; i++) {
        if (i && d->layers[i].window == d->layers[i - 1].window) continue;
        const struct Call call = call_of(d, f, d->layers + i);
        const int64_t room = scls_attention_room(&call);
        most = room > most ? room : most;
    }
    return most;
}

static struct Decoder threaded(const struct Decoder *given) {
    struct Decoder decoder = *given;
    if (!decoder.parallel || !decoder.barrier) decoder.threads = 1;
    return decoder;
}

EXPORT void scls_forward(const struct Decoder *given, const struct Forward *f) {
    const struct Decoder decoder = threaded(given), *d = &decoder;
    struct Work work = {.decoder = d, .forward = f};
    for (const struct Span *s = f->spans; s < f->spans + f->count; s++)
        for (int32_t i = 0; i < s->size; i++) f->positions[s->first + i] = s->start + i;
    run(&work, EMBED, f->tokens);
    for (int32_t i = 0; i < d->count; i++) {
        const struct Layer *l = d->layers + i;
        work.layer = l;
        work.norm = &l->before_attention;
        run(&work, NORM, f->tokens);
        product(&work, &l->qkv, f->h, d->hidden, f->wide, KEEP_FLOAT);
        run(&work, TURN, f->tokens);
        const struct Call call = call_of(d, f, l);
        scls_attend(&call);
        close_branch(&work, &l->out, f->h, d->heads * d->width, &l->after_attention);
        work.norm = &l->before_mlp;
        run(&work, NORM, f->tokens);
        product(&work, &l->gate_up, f->h, d->hidden, f->gated, GATE);
        close_branch(&work, &l->down, f->gated, d->inner, &l->after_mlp);
    }
    if (!f->n) return;
    work.norm = &d->last;
    run(&work, NORM, f->tokens);
    work.product = (struct Product){&d->head, f->h, f->logits, f->ends, f->n, KEEP_FLOAT, d->hidden};
    run(&work, MULTIPLY, (d->head.n + PANEL - 1) / PANEL);
}

/* Draws a token from each of `n` rows of logits. */
EXPORT void scls_draw(const struct Decoder *given, const struct Draws *draws, const float *logits, int32_t n) {
    const struct Decoder decoder = threaded(given);
    struct Work work = {.decoder = &decoder, .draws = draws, .logits = logits};
    run(&work, DRAW, n);
}

/* Up to `most` passes, each of what the last one drew; how many were made. It ends behind a pass in which a row drew a stop or
 * somebody interrupted, and before one that needs more memory than there is.
 */
EXPORT int32_t scls_burst(const struct Decoder *given, const struct Forward *f, const struct Draws *draws, const struct Burst *b) {
    const struct Decoder decoder = threaded(given);
    struct Work work = {.decoder = &decoder, .draws = draws, .logits = f->logits};
    while (work.pass < b->most && scls_forward_room(&decoder, f) <= b->room) {
        scls_forward(&decoder, f);
        run(&work, DRAW, f->n);
        const uint32_t *drawn = draws->drawn + (size_t)work.pass++ * f->n;
        int ended = __atomic_load_n(b->interrupt, __ATOMIC_RELAXED) != 0;
        for (int32_t i = 0; i < f->n; i++) {
            for (int32_t j = 0; j < b->stops_count; j++) ended |= drawn[i] == b->stops[j];
            b->ids[i] = drawn[i];
            b->spans[i].start++;
        }
        if (ended) break;
    }
    return work.pass;
}

/* Bytes of the structures, for who writes them elsewhere. */
EXPORT int64_t scls_forward_sizes(void) {
    return (int64_t)sizeof(struct Layer) << 48 | (int64_t)sizeof(struct Decoder) << 32 | (int64_t)sizeof(struct Forward) << 16 |
           (int64_t)sizeof(struct Draws) << 8 | (int64_t)sizeof(struct Burst);
}

/* Packs weights [N, K] of the model's type. */
EXPORT void scls_pack(const char *weights, char *panels, int32_t n, int32_t k, int32_t dtype) {
    const int32_t lanes = dtype == FLOAT32 ? 1 : 2, element = 4 / lanes;
    for (int32_t panel = 0; panel < (n + PANEL - 1) / PANEL; panel++)
        for (int32_t step = 0; step < k / lanes; step++)
            for (int32_t j = 0; j < PANEL; j++, panels += 4) {
                const int32_t row = panel * PANEL + j;
                if (row < n) memcpy(panels, weights + ((size_t)row * k + (size_t)step * lanes) * element, 4);
                else memset(panels, 0, 4);
            }
}
#endif
