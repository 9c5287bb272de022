/* One level of forward.c, for one type of weights; included once for each, by vector.h. */

/* Sums that are held in registers, beside what they are made of. */
#if LANES == 16 || defined(__aarch64__)
#define SUMS 24
#else
#define SUMS 12
#endif
#define ROWS (LANES == 16 ? 12 : 6) /* of a tile at most */
#define ELEMENT (PAIRED ? 2 : 4)    /* bytes of the model's type */
/* Steps of a product (one number of a row, or a pair) behind which sums are put down. Pairs that are widened are widened once
 * for a panel, so many that they stay at hand.
 */
#if HALVES == 2
#define STEPS 256
#else
#define STEPS INT32_MAX
#endif

/* ---------------------------------------------------------------- numbers */

/* The first `left` numbers, zeroes behind them. */
INNER Floats IN(take)(const float *at, int32_t left) {
    if (left >= LANES) return *(const Floats *)at;
    float some[LANES] = {0};
    for (int32_t i = 0; i < left; i++) some[i] = at[i];
    return *(const Floats *)some;
}

INNER void IN(put)(float *at, int32_t left, Floats x) {
    if (left >= LANES) {
        *(Floats *)at = x;
    } else {
        for (int32_t i = 0; i < left; i++) at[i] = ((const float *)&x)[i];
    }
}

/* The same in the model's type. */
INNER void IN(keep)(char *at, int32_t left, Floats x) {
    char some[LANES * ELEMENT];
    IN(store)(left >= LANES ? at : some, x);
    if (left < LANES)
        for (int32_t i = 0; i < left * ELEMENT; i++) at[i] = some[i];
}

/* Of the model's type, as floats. */
INNER float IN(number)(const char *at, int32_t i) {
#if PAIRED
    const uint32_t bits = (uint32_t)((const uint16_t *)at)[i] << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
#else
    return ((const float *)at)[i];
#endif
}

INNER float IN(total)(Floats x) {
    float lanes[LANES];
    *(Floats *)lanes = x;
    for (int n = LANES / 2; n; n /= 2)
        for (int i = 0; i < n; i++) lanes[i] += lanes[i + n];
    return lanes[0];
}

/* x / (1 + exp(-z)): silu where z is x; gelu by tanh is the same with z = 2 sqrt(2 / pi) (x + 0.044715 x^3). */
INNER Floats IN(act)(int act, Floats x) {
    Floats z = x;
    if (act == GELU_TANH) z = (x * x * x * 0.044715f + x) * 1.5957691216057308f;
    z *= -1.4426950408889634f;
    return x / (1.0f + IN(exp2)(IN(select)(z > 127.0f, (Floats){0} + 127.0f, z)));
}

/* ---------------------------------------------------------------- products */

/* `rows` rows times `columns` vectors of a panel, onto `sums`. `ahead` is what is wanted next: it is fetched while this is
 * computed, `pace` bytes a step.
 */
INNER void IN(tile)(
    int rows, int columns, const Weight *const *in, int32_t steps, const char *at, const char *ahead, int32_t pace, float *sums) {
    Floats sum[ROWS][PANEL / LANES];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int j = 0; j < columns; j++) sum[r][j] = *(Floats *)(sums + r * PANEL + j * LANES);
    for (int32_t k = 0; k < steps; k++, at += 4 * PANEL, ahead += pace) {
        __builtin_prefetch(ahead, 0, 2);
        UNROLL for (int half = 0; half < HALVES; half++) {
            Floats column[PANEL / LANES];
            UNROLL for (int j = 0; j < columns; j++) column[j] = IN(load)(at + 4 * LANES * j, half);
            UNROLL for (int r = 0; r < rows; r++) {
                const Weight weight = in[r][(size_t)k * HALVES + half];
                UNROLL for (int j = 0; j < columns; j++) sum[r][j] = IN(madd)(sum[r][j], weight, column[j]);
            }
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int j = 0; j < columns; j++) *(Floats *)(sums + r * PANEL + j * LANES) = sum[r][j];
}

/* A panel's parts, as wide as registers allow, behind one another; the first brings what is ahead. */
#define WIDE(n) ((n) * PANEL / LANES <= SUMS ? PANEL / LANES : (n) * PANEL / LANES <= 2 * SUMS ? PANEL / LANES / 2 : PANEL / LANES / 4)
#define OF_ROWS(n)                                                                                                          \
    static TARGET void IN(tile_##n)(                                                                                       \
        const Weight *const *in, int32_t steps, const char *at, const char *ahead, int32_t pace, float *sums) {            \
        IN(tile)(n, WIDE(n), in, steps, at, ahead, pace, sums);                                                            \
        for (int32_t done = WIDE(n) * LANES; done < PANEL; done += WIDE(n) * LANES)                                        \
            IN(tile)(n, WIDE(n), in, steps, at + 4 * done, at + 4 * done, 0, sums + done);                                 \
    }
OF_ROWS(1) OF_ROWS(2) OF_ROWS(3) OF_ROWS(4) OF_ROWS(5) OF_ROWS(6)
#if LANES == 16
OF_ROWS(7) OF_ROWS(8) OF_ROWS(9) OF_ROWS(10) OF_ROWS(11) OF_ROWS(12)
#endif

typedef void IN(Tile)(const Weight *const *, int32_t, const char *, const char *, int32_t, float *);
static IN(Tile) *const IN(tiles)[ROWS] = {
    IN(tile_1), IN(tile_2), IN(tile_3), IN(tile_4), IN(tile_5), IN(tile_6),
#if LANES == 16
    IN(tile_7), IN(tile_8), IN(tile_9), IN(tile_10), IN(tile_11), IN(tile_12),
#endif
};

/* What becomes of rows' sums [rows, PANEL]. */
static TARGET void IN(finish)(
    const struct Product *p, int act, int32_t rows, int32_t row, int32_t panel, const float *sums) {
    const int32_t n = p->linear->n, column = panel * PANEL, left = n - column < PANEL ? n - column : PANEL;
    for (int32_t r = 0; r < rows; r++, sums += PANEL) {
        const size_t line = (size_t)(row + r);
        Floats all[PANEL / LANES];
        UNROLL for (int j = 0; j < PANEL / LANES; j++) {
            all[j] = *(const Floats *)(sums + j * LANES);
            if (p->linear->bias) all[j] += IN(take)(p->linear->bias + column + j * LANES, left - j * LANES);
        }
        if (p->finish == GATE) { /* sixteen gates, then what they are for; all panels are full */
            char *out = (char *)p->out + (line * (n / 2) + panel * PANEL / 2) * ELEMENT;
            UNROLL for (int j = 0; j < PANEL / LANES / 2; j++)
                IN(store)(out + j * LANES * ELEMENT, IN(act)(act, all[j]) * all[j + PANEL / LANES / 2]);
            continue;
        }
        float *out = (float *)p->out + line * n + column;
        UNROLL for (int j = 0; j < PANEL / LANES; j++) {
            const int32_t rest = left - j * LANES;
            if (p->finish == ADD) all[j] += IN(take)(out + j * LANES, rest);
            IN(put)(out + j * LANES, rest, all[j]);
        }
    }
}

/* All rows times one panel: in as few and as equal blocks as the registers allow. */
static TARGET void IN(multiply)(const struct Decoder *d, const struct Product *p, int32_t panel) {
    const int32_t all = p->linear->k >> PAIRED; /* steps */
    const size_t bytes = (size_t)all * 4 * PANEL; /* of a panel */
    const char *weights = (const char *)p->linear->weights + panel * bytes;
    const int32_t blocks = (p->rows + ROWS - 1) / ROWS;
    for (int32_t block = 0, row = 0; block < blocks; block++) {
        const int32_t rows = p->rows / blocks + (block < p->rows % blocks);
        /* One block streams its own panel; of several the first two fetch half of the next panel each, behind their sums. */
        const char *ahead = weights + 2048;
        int32_t pace = 4 * PANEL;
        if (blocks > 1) {
            ahead = block < 2 ? weights + bytes + block * (bytes / 2) : weights;
            pace = block < 2 ? 2 * PANEL : 0;
        }
        float sums[ROWS * PANEL] __attribute__((aligned(64)));
        memset(sums, 0, (size_t)rows * PANEL * 4);
        for (int32_t from = 0, steps; from < all; from += steps) {
            steps = all - from < STEPS ? all - from : STEPS;
            const Weight *in[ROWS];
#if HALVES == 2
            float wide[ROWS][2 * STEPS];
#endif
            for (int32_t r = 0; r < rows; r++) {
                const size_t line = p->picked ? (size_t)p->picked[row + r] : (size_t)(row + r);
                const char *at = p->in + (line * p->stride + ((size_t)from << PAIRED)) * ELEMENT;
#if HALVES == 2
                for (int32_t i = 0; i < 2 * steps; i++) wide[r][i] = IN(number)(at, i);
                in[r] = wide[r];
#else
                in[r] = (const Weight *)at;
#endif
            }
            IN(tiles)[rows - 1](
                in, steps, weights + (size_t)from * 4 * PANEL, ahead + (size_t)from * pace, pace, sums);
        }
        IN(finish)(p, d->act, rows, row, panel, sums);
        row += rows;
    }
}

/* ---------------------------------------------------------------- what is done to single rows */

/* Into floats, or numbers of the model's type. */
INNER void IN(norm)(const struct Norm *norm, float eps, const float *x, int floats, void *out) {
    const int32_t n = norm->width;
    Floats squares = {0};
    for (int32_t i = 0; i < n; i += LANES) {
        const Floats v = IN(take)(x + i, n - i);
        squares += v * v;
    }
    const float scale = 1.0f / sqrtf(IN(total)(squares) / (float)n + eps);
    for (int32_t i = 0; i < n; i += LANES) {
        const Floats v = IN(take)(x + i, n - i) * scale * IN(take)(norm->weights + i, n - i);
        if (floats) IN(put)((float *)out + i, n - i, v);
        else IN(keep)((char *)out + i * ELEMENT, n - i, v);
    }
}

INNER void IN(copy)(const float *x, int32_t n, char *out) {
    for (int32_t i = 0; i < n; i += LANES) IN(keep)(out + i * ELEMENT, n - i, IN(take)(x + i, n - i));
}

/* transformers' rotate_half: dimension i turns with i + turned / 2. */
static TARGET void IN(rotate)(float *head, const float *cos, const float *sin, int32_t turned) {
    const int32_t half = turned / 2;
    for (int32_t i = 0; i < half; i++) {
        const float a = head[i], b = head[i + half];
        head[i] = a * cos[i] - b * sin[i];
        head[i + half] = b * cos[i + half] + a * sin[i + half];
    }
}

/* Queries and keys of one token: normed, turned, and in the model's type. */
static TARGET void IN(turn)(const struct Decoder *d, const struct Layer *l, const struct Forward *f, int32_t token) {
    const int32_t rows = d->heads + 2 * d->kv_heads, all = rows * d->width;
    float *wide = f->wide + (size_t)token * all;
    const struct Norm *norms[2] = {&l->query, &l->key};
    float *const parts[2] = {wide, wide + (size_t)d->heads * d->width};
    const int32_t widths[2] = {d->heads * d->width, d->kv_heads * d->width};
    for (int part = 0; part < 2; part++) {
        if (!norms[part]->weights) continue;
        for (int32_t at = 0; at < widths[part]; at += norms[part]->width)
            IN(norm)(norms[part], d->eps, parts[part] + at, 1, parts[part] + at);
    }
    const size_t angles = (size_t)f->positions[token] * d->turned;
    for (int32_t head = 0; head < d->heads + d->kv_heads; head++)
        IN(rotate)(wide + head * d->width, d->cos[l->rotary] + angles, d->sin[l->rotary] + angles, d->turned);
    IN(copy)(wide, all, f->qkv + (size_t)token * all * ELEMENT);
}

static TARGET void IN(embed)(const struct Decoder *d, const struct Forward *f, int32_t token) {
    const char *from = d->embeddings + (size_t)f->ids[token] * d->hidden * ELEMENT;
    float *x = f->x + (size_t)token * d->hidden;
    for (int32_t i = 0; i < d->hidden; i++) x[i] = IN(number)(from, i) * d->embedding_scale;
}

static TARGET void IN(add)(float *x, const float *branch, int32_t n) {
    for (int32_t i = 0; i < n; i++) x[i] += branch[i];
}

/* ---------------------------------------------------------------- a row's draw */

/* Of normal numbers above 0: Cephes' polynomial about 1. */
INNER Floats IN(log)(Floats x) {
    Ints e = ((Ints)x >> 23) - 127;
    Floats m = (Floats)(((Ints)x & 0x7fffff) | 0x3f800000);
    const Ints large = m > 1.41421356f;
    m = IN(select)(large, m * 0.5f, m) - 1.0f;
    const Floats power = __builtin_convertvector(e - large, Floats), z = m * m; /* a mask is -1 */
    Floats y = m * 7.0376836292e-2f - 1.1514610310e-1f;
    y = y * m + 1.1676998740e-1f;
    y = y * m - 1.2420140846e-1f;
    y = y * m + 1.4249322787e-1f;
    y = y * m - 1.6668057665e-1f;
    y = y * m + 2.0000714765e-1f;
    y = y * m - 2.4999993993e-1f;
    y = y * m + 3.3333331174e-1f;
    y = y * m * z;
    y = power * -2.12194440e-4f + y;
    y = z * -0.5f + y;
    return power * 0.693359375f + (m + y);
}

/* `splitmix64` of half a vector's ids, as numbers above 0 and up to 1 from 63 of its bits. */
typedef uint64_t IN(Longs) __attribute__((vector_size(4 * LANES)));
typedef int64_t IN(Signed) __attribute__((vector_size(4 * LANES)));
typedef float IN(Half) __attribute__((vector_size(2 * LANES), aligned(4), may_alias));

INNER IN(Half) IN(uniform)(uint64_t first) {
    IN(Longs) x;
    for (int32_t i = 0; i < LANES / 2; i++) x[i] = first + (uint64_t)i;
    x += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    x = (x ^ (x >> 31)) >> 1 | 1;
    return __builtin_convertvector((IN(Signed))x, IN(Half)) * 0x1p-63f;
}

/* The logarithms of exponential variates of ids from `id` on. */
INNER Floats IN(race)(uint64_t key, int32_t id) {
    float random[LANES];
    *(IN(Half) *)random = IN(uniform)(key + (uint64_t)id);
    *(IN(Half) *)(random + LANES / 2) = IN(uniform)(key + (uint64_t)id + LANES / 2);
    /* -log(1 - u) with all digits of a small u: what 1 - u lost is put back by the ratio */
    const Floats u = *(const Floats *)random, rest = 1.0f - u;
    const Floats e = IN(select)(rest == 1.0f, u, IN(log)(rest) * (u / (rest - 1.0f)));
    return IN(select)(rest <= 0.0f, (Floats){0} + INFINITY, IN(log)(e));
}

/* The largest, and of equals the first; a NaN is larger than any number, as torch has it. */
INNER void IN(better)(Floats *best, Ints *ids, Floats values, Ints its) {
    /* greater, or not a number where the best is one */
    const Ints wins = (*best == *best) & ~(values <= *best);
    *best = IN(select)(wins, values, *best);
    *ids = (its & wins) | (*ids & ~wins);
}

/* One row's token: the largest logit, or a draw of its temperature's distribution (sampling.py: the Gumbel-max trick as an
 * exponential race, with random bits that are a function of seed, place and id).
 */
static TARGET uint32_t IN(draw)(const float *logits, int32_t vocabulary, float heat, uint64_t key) {
    const Floats none = (Floats){0} - INFINITY;
    Ints lane;
    for (int32_t i = 0; i < LANES; i++) lane[i] = i;
    float top = 0.0f;
    for (int warm = 0;; warm++) {
        Floats best = none;
        Ints best_ids = {0};
        for (int32_t id = 0; id < vocabulary; id += LANES) {
            const Ints ids = lane + id;
            Floats x = IN(take)(logits + id, vocabulary - id);
            if (warm) x = (x - top) / heat - IN(race)(key, id);
            if (vocabulary - id < LANES) x = IN(select)(ids < vocabulary, x, none);
            IN(better)(&best, &best_ids, x, ids);
        }
        int32_t at = 0;
        for (int i = 1; i < LANES; i++) {
            const int unknown = best[i] != best[i], was = best[at] != best[at];
            const int first = best_ids[i] < best_ids[at];
            if (unknown > was || (unknown == was && (unknown || best[i] == best[at] ? first : best[i] > best[at]))) at = i;
        }
        if (warm || heat <= 0.0f) return (uint32_t)best_ids[at];
        top = best[at];
    }
}

/* ---------------------------------------------------------------- a piece of work */

static TARGET void IN(one)(const struct Work *w, int32_t i) {
    const struct Decoder *d = w->decoder;
    const struct Forward *f = w->forward;
    const size_t row = (size_t)i * d->hidden;
    switch (w->what) {
    case MULTIPLY: IN(multiply)(d, &w->product, i); break;
    case EMBED: IN(embed)(d, f, i); break;
    case TURN: IN(turn)(d, w->layer, f, i); break;
    case DRAW: {
        const struct Draws *draws = w->draws;
        const uint64_t key = splitmix64(draws->seeds[i] + (uint64_t)(draws->places[i] + w->pass));
        draws->drawn[(size_t)w->pass * w->count + i] =
            IN(draw)(w->logits + (size_t)i * d->head.n, d->head.n, draws->heats[i], key);
        break;
    }
    case NORM_AND_ADD:
        IN(norm)(w->norm, d->eps, f->branch + row, 1, f->branch + row);
        IN(add)(f->x + row, f->branch + row, d->hidden);
        break;
    case NORM:
        if (w->norm->weights) IN(norm)(w->norm, d->eps, f->x + row, 0, f->h + row * ELEMENT);
        else IN(copy)(f->x + row, d->hidden, f->h + row * ELEMENT);
    }
}

#undef SUMS
#undef ROWS
#undef ELEMENT
#undef STEPS
#undef WIDE
#undef OF_ROWS
