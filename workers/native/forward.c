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

enum { PANEL = 32 }; /* outputs of a product whose weights lie together */

enum Act { SILU, GELU_TANH };
/* What becomes of a product: kept as floats; added to the residual; half of it gated by the other, in the model's type. */
enum Finish { KEEP, ADD, GATE };

struct Linear {
    const void *weights; /* panels [N / 32][K][32], of bfloat16 [N / 32][K / 2][32][2]: the same at all levels */
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

struct Product {
    const struct Linear *linear;
    const char *in; /* [T, K], rows `stride` elements apart */
    void *out;      /* [T, N], of GATE [T, N / 2] */
    const int64_t *picked; /* rows of `in`, or null: all */
    int32_t rows, finish, stride;
};

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

static uint64_t splitmix64(uint64_t x) {
    x += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

/* ---------------------------------------------------------------- levels */

#define LEVEL "dense.h"
#include "levels.h"

typedef void One(const struct Work *, int32_t i);
static One *const ones[LEVELS][2] = OF_LEVELS(one);

/* ---------------------------------------------------------------- the pass */

static void share(void *of) {
    struct Work *w = of;
    One *one = ones[w->decoder->level][w->decoder->dtype];
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
    product(w, linear, in, stride, after->weights ? f->branch : f->x, after->weights ? KEEP : ADD);
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
        product(&work, &l->qkv, f->h, d->hidden, f->wide, KEEP);
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
    work.product = (struct Product){&d->head, f->h, f->logits, f->ends, f->n, KEEP, d->hidden};
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
