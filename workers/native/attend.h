/* One level of attention.c, for one type of KV; included once for each, by vector.h.
 *
 * COLUMNS  vectors beside one another in registers, ROWS of them below one another
 */

#if LANES == 16 && HALVES == 1
#define COLUMNS 4
#else
#define COLUMNS 2
#endif
#define PER_TILE (TILE / LANES) /* vectors that 16 scores take */

/* ---------------------------------------------------------------- products: rows of weights times columns of KV */

/* Scores of `rows` rows with `columns` vectors of 16-token tiles. `q` is packed [units, HALVES, ROWS]. */
INNER void IN(some_scores)(
    int rows, int columns, const Weight *q, int units, const char *const *at, float *scores, struct Ahead *ahead) {
    Floats sums[ROWS][COLUMNS];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int j = 0; j < columns; j++) sums[r][j] = (Floats){0};
    for (int unit = 0; unit < units; unit++) {
        fetch(ahead, columns * LANES / 16);
        UNROLL for (int half = 0; half < HALVES; half++) {
            Floats column[COLUMNS];
            UNROLL for (int j = 0; j < columns; j++) column[j] = IN(load)(at[j] + (size_t)unit * TILE * 4, half);
            UNROLL for (int r = 0; r < rows; r++) {
                const Weight weight = q[(unit * HALVES + half) * ROWS + r];
                UNROLL for (int j = 0; j < columns; j++) sums[r][j] = IN(madd)(sums[r][j], weight, column[j]);
            }
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int j = 0; j < columns; j++) *(Floats *)(scores + r * CHUNK + j * LANES) = sums[r][j];
}

/* Of `tiles` tiles. */
INNER void IN(row_scores)(
    int rows, const Weight *q, int units, char *const *keys, int tiles, float *scores, struct Ahead *ahead) {
    const int vectors = tiles * PER_TILE;
    int done = 0;
    const char *at[COLUMNS];
#define TAKE(n)                                                                                    \
    UNROLL for (int j = 0; j < n; j++) {                                                           \
        const int vector = done + j;                                                               \
        at[j] = keys[vector / PER_TILE] + (size_t)(vector % PER_TILE) * LANES * 4;                 \
    }                                                                                              \
    IN(some_scores)(rows, n, q, units, at, scores + done * LANES, ahead);                              \
    done += n;
    while (vectors - done >= COLUMNS) { TAKE(COLUMNS) }
#if COLUMNS > 2
    if (vectors - done >= 2) { TAKE(2) }
#endif
    if (vectors - done >= 1) { TAKE(1) }
#undef TAKE
}

/* `columns` vectors of the weighted values of `tiles` tiles. */
INNER void IN(some_sums)(
    int rows, int columns, const Weight *weights, char *const *values, int tiles, size_t offset, int width, float *acc,
    struct Ahead *ahead) {
    enum { UNITS = TILE >> PAIRED };
    Floats sums[ROWS][COLUMNS];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int j = 0; j < columns; j++) sums[r][j] = (Floats){0};
    for (int tile = 0; tile < tiles; tile++) {
        const char *at = values[tile] + offset;
        for (int unit = 0; unit < UNITS; unit++, at += (size_t)width * 4) {
            fetch(ahead, columns * LANES / 16);
            UNROLL for (int half = 0; half < HALVES; half++) {
                Floats column[COLUMNS];
                UNROLL for (int j = 0; j < columns; j++) column[j] = IN(load)(at + j * LANES * 4, half);
                UNROLL for (int r = 0; r < rows; r++) {
                    const Weight weight = weights[r * CHUNK + (tile * UNITS + unit) * HALVES + half];
                    UNROLL for (int j = 0; j < columns; j++) sums[r][j] = IN(madd)(sums[r][j], weight, column[j]);
                }
            }
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int j = 0; j < columns; j++) *(Floats *)(acc + (size_t)r * width + j * LANES) = sums[r][j];
}

INNER void IN(row_sums)(
    int rows, const Weight *weights, char *const *values, int tiles, int width, float *acc, struct Ahead *ahead) {
    int done = 0;
#define TAKE(n)                                                                                                   \
    IN(some_sums)(rows, n, weights, values, tiles, (size_t)done * LANES * 4, width, acc + done * LANES, ahead); \
    done += n;
    const int vectors = width / LANES;
    while (vectors - done >= COLUMNS) { TAKE(COLUMNS) }
#if COLUMNS > 2
    if (vectors - done >= 2) { TAKE(2) }
#endif
    if (vectors - done >= 1) { TAKE(1) }
#undef TAKE
}

#define EACH(call)                                                                                 \
    switch (rows) {                                                                                \
    case 1: call(1); break;                                                                        \
    case 2: call(2); break;                                                                        \
    case 3: call(3); break;                                                                        \
    case 4: call(4); break;                                                                        \
    case 5: call(5); break;                                                                        \
    default: call(6); break;                                                                       \
    }

static TARGET void IN(scores)(
    int rows, const Weight *q, int units, char *const *keys, int tiles, float *scores, struct Ahead *ahead) {
#define CALL(n) IN(row_scores)(n, q, units, keys, tiles, scores, ahead)
    EACH(CALL)
#undef CALL
}

static TARGET void IN(sums)(
    int rows, const Weight *weights, char *const *values, int tiles, int width, float *acc, struct Ahead *ahead) {
#define CALL(n) IN(row_sums)(n, weights, values, tiles, width, acc, ahead)
    EACH(CALL)
#undef CALL
}

/* ---------------------------------------------------------------- exponentials */

/* Near zero a polynomial, since 1 - 2 / (e^2x + 1) would lose its digits. */
INNER Floats IN(tanh)(Floats x) {
    const Floats square = x * x;
    Floats near = square * -5.70498872745e-3f + 2.06390887954e-2f;
    near = near * square - 5.37397155531e-2f;
    near = near * square + 1.33314422036e-1f;
    near = near * square - 3.33332819422e-1f;
    near = near * square * x + x;
    Floats x2 = x * 2.8853900817779268f; /* 2 log2(e): beyond 40 it is 1 */
    x2 = IN(select)(x2 > 40.0f, (Floats){0} + 40.0f, x2);
    const Floats far = 1.0f - 2.0f / (IN(exp2)(x2) + 1.0f);
    return IN(select)((x < 0.625f) & (x > -0.625f), near, far);
}

/* `count` scores of positions from `base` on, of which a row sees [low, high), as powers of two; the largest. */
INNER float IN(scale)(const struct Call *c, int capped, float *scores, int32_t count, int32_t base, int32_t low, int32_t high) {
    const float log2e = 1.4426950408889634f;
    const float scaling = capped ? c->scaling / c->softcap : c->scaling * log2e, cap = c->softcap * log2e;
    const Floats none = (Floats){0} - INFINITY;
    Ints lane;
    UNROLL for (int i = 0; i < LANES; i++) lane[i] = i;
    Floats best = none;
    for (int32_t i = 0; i < count; i += LANES) {
        Floats x = *(Floats *)(scores + i) * scaling;
        if (capped) x = IN(tanh)(x) * cap;
        if (base + i < low || base + i + LANES > high) {
            const Ints position = lane + (base + i);
            x = IN(select)((position >= low) & (position < high), x, none);
        }
        *(Floats *)(scores + i) = x;
        best = IN(larger)(x, best);
    }
    float lanes[LANES];
    *(Floats *)lanes = best;
    for (int n = LANES / 2; n; n /= 2)
        for (int i = 0; i < n; i++) lanes[i] = lanes[i] > lanes[i + n] ? lanes[i] : lanes[i + n];
    return lanes[0];
}

/* The same scores become weights in the same place, pairs of bfloat16 in the first half of it; their sum. */
INNER float IN(weigh)(float *scores, int32_t count, float top) {
    Floats sum = {0};
    for (int32_t i = 0; i < count; i += LANES) {
        const Floats y = IN(exp2)(*(Floats *)(scores + i) - top);
        sum += y;
#ifdef DOTS
        _mm256_storeu_si256((__m256i *)(scores + i / 2), (__m256i)_mm512_cvtneps_pbh((__m512)y));
#else
        *(Floats *)(scores + i) = y;
#endif
    }
    float lanes[LANES];
    *(Floats *)lanes = sum;
    for (int n = LANES / 2; n; n /= 2)
        for (int i = 0; i < n; i++) lanes[i] += lanes[i + n];
    return lanes[0];
}

/* ---------------------------------------------------------------- a task */

/* A block of rows' queries as what columns are multiplied by: [units, HALVES, ROWS]. */
static TARGET void IN(pack)(
    const struct Call *c, const struct Task *task, const struct Span *s, int32_t kv_head, int32_t row, int32_t rows, Weight *q) {
    const int32_t g = group(c), weights = HALVES * (c->width >> PAIRED);
    for (int32_t r = 0; r < rows; r++) {
        const int32_t token = s->first + task->first + (row + r) / g, head = kv_head * g + (row + r) % g;
        const char *from = c->q + (token * c->q_token + head * c->q_head) * element(c);
        for (int32_t i = 0; i < weights; i++) {
#if HALVES == 2
            const uint32_t wide = (uint32_t)((const uint16_t *)from)[i] << 16;
            memcpy(q + i * ROWS + r, &wide, 4);
#else
            memcpy(q + i * ROWS + r, from + 4 * i, 4);
#endif
        }
    }
}

/* Puts a chunk's state onto what is before it. A row that saw nothing of it stays as it is. */
static TARGET void IN(merge)(struct State to, struct State of, int32_t rows, int32_t width) {
    for (int32_t r = 0; r < rows; r++) {
        const float top = to.most[r] > of.most[r] ? to.most[r] : of.most[r];
        if (of.most[r] == -INFINITY && of.sum[r] == 0.0f) continue;
        const Floats powers = IN(exp2)((Floats){to.most[r] - top, of.most[r] - top});
        const float old = powers[0], new = powers[1];
        to.most[r] = top;
        to.sum[r] = to.sum[r] * old + of.sum[r] * new;
        for (int32_t d = 0; d < width; d += LANES) {
            Floats *at = (Floats *)(to.acc + (size_t)r * width + d);
            *at = *at * old + *(Floats *)(of.acc + (size_t)r * width + d) * new;
        }
    }
}

static TARGET void IN(finish)(
    const struct Call *c, const struct Task *task, const struct Span *s, int32_t kv_head, struct State state, int32_t rows) {
    const int32_t g = group(c), width = c->width;
    for (int32_t r = 0; r < rows; r++) {
        const size_t token = s->first + task->first + r / g, head = kv_head * g + r % g;
        char *to = c->out + (token * c->heads + head) * width * element(c);
        for (int32_t d = 0; d < width; d += LANES) {
            const Floats x = *(Floats *)(state.acc + (size_t)r * width + d) / state.sum[r];
            IN(store)(to + d * (PAIRED ? 2 : 4), x);
        }
    }
}

/* One chunk's tiles of keys and values and all rows of a head. */
INNER void IN(attend_chunk)(
    const struct Call *c, const struct Task *task, const struct Reach *here, char **keys, char **values, const char *queries,
    struct State state, float *scores, struct Ahead *ahead, int32_t pace) {
    const struct Span *s = c->spans + task->span;
    const int32_t g = group(c), rows = (task->last - task->first) * g, width = c->width;
    const int32_t blocks = parts(rows, ROWS), block_rows = parts(rows, blocks);
    const size_t packed = line(4 * (size_t)width * ROWS);
    for (int32_t b = 0; b < blocks; b++) {
        const int32_t row = b * block_rows, its = least(block_rows, rows - row);
        /* Tiles that any row of the block sees. */
        const int32_t first = s->start + task->first + row / g, last = s->start + task->first + (row + its - 1) / g;
        const int32_t from = c->window ? most(0, (first + 1 - c->window - here->begin) / TILE) : 0;
        const int32_t to = least(here->tiles, parts(last + 1 - here->begin, TILE));
        if (from >= to) {
            for (int32_t r = row; r < row + its; r++) state.most[r] = -INFINITY, state.sum[r] = 0.0f;
            memset(state.acc + (size_t)row * width, 0, 4 * (size_t)width * its);
            continue;
        }
        ahead->pace = b ? 0 : pace;
        IN(scores)(its, (const Weight *)(queries + packed * b), width >> PAIRED, keys + from, to - from, scores, ahead);
        for (int32_t r = 0; r < its; r++) {
            const int32_t at = s->start + task->first + (row + r) / g;
            const int32_t since = c->window ? most(0, at + 1 - c->window) : 0;
            float *mine = scores + r * CHUNK;
            const int32_t count = (to - from) * TILE, base = here->begin + from * TILE;
            const float top = c->softcap == 0.0f ? IN(scale)(c, 0, mine, count, base, since, at + 1)
                                                 : IN(scale)(c, 1, mine, count, base, since, at + 1);
            state.most[row + r] = top;
            state.sum[row + r] = IN(weigh)(mine, count, top == -INFINITY ? 0.0f : top);
        }
        IN(sums)(its, (const Weight *)scores, values + from, to - from, width, state.acc + (size_t)row * width, ahead);
    }
}

/* A tile of values of which only `count` tokens are seen, the others made zeroes: what is weighed by nought must be a number. */
static void IN(cut)(const char *tile, int32_t count, int32_t width, char *to) {
    const size_t unit = 4 * (size_t)width;
    const int32_t whole = count >> PAIRED;
    memcpy(to, tile, unit * whole);
    memset(to + unit * whole, 0, unit * ((TILE >> PAIRED) - whole));
    if (PAIRED && count % 2)
        for (int32_t d = 0; d < width; d++) memcpy(to + unit * whole + 4 * d, tile + unit * whole + 4 * d, 2);
}

static TARGET void IN(attend)(
    const struct Call *c, const struct Task *task, const struct Task *next, struct Split *split, char *room) {
    const struct Span *s = c->spans + task->span;
    const int32_t g = group(c), rows = (task->last - task->first) * g, width = c->width;
    const int32_t blocks = parts(rows, ROWS), block_rows = parts(rows, blocks);
    const size_t packed = line(4 * (size_t)width * ROWS), each = head_room(c, rows);

    char *heads = room; /* of each its queries, then its state */
    struct State of_chunk = state_in(room += each * task->heads, rows);
    float *scores = (float *)(room += state_bytes(rows, width));
    char *tail = room + line(4 * CHUNK * ROWS);

    for (int32_t h = 0; h < task->heads; h++)
        for (int32_t b = 0; b < blocks; b++) {
            const int32_t row = b * block_rows;
            IN(pack)(c, task, s, task->head + h, row, least(block_rows, rows - row), (Weight *)(heads + each * h + packed * b));
        }
    for (int32_t chunk = task->from; chunk < task->to; chunk++) {
        struct Reach here;
        reach(c, task, chunk, &here);
        struct Ahead ahead = {.lines = TILE * width * element(c) / 64, .head_bytes = head_bytes(c)};
        const int last = chunk + 1 == task->to;
        if (!last || next) reach(c, last ? next : task, last ? next->from : chunk + 1, &ahead.next);
        const int32_t pace = 256 * ahead.next.tiles * ahead.next.heads / (here.tiles * task->heads);
        for (int32_t h = 0; h < task->heads; h++) {
            char *keys[2 * CHUNK_TILES], **values = keys + here.tiles;
            for (int32_t t = 0; t < 2 * here.tiles; t++) keys[t] = here.at[t] + h * ahead.head_bytes;
            const int32_t rest = (here.end - here.begin) % TILE;
            if (rest) {
                IN(cut)(values[here.tiles - 1], rest, width, tail);
                values[here.tiles - 1] = tail;
            }
            const char *queries = heads + each * h;
            const struct State so_far = state_in(heads + each * h + packed * blocks, rows);
            struct State state = of_chunk;
            if (split) {
                state = state_in(split->states + (chunk - split->from) * state_bytes(rows, width), rows);
            } else if (chunk == task->from) {
                state = so_far;
            }
            IN(attend_chunk)(c, task, &here, keys, values, queries, state, scores, &ahead, pace);
            if (!split && chunk > task->from) IN(merge)(so_far, of_chunk, rows, width);
        }
    }
    if (split) {
        if (atomic_fetch_sub(&split->left, 1) > 1) return;
        const struct State so_far = state_in(split->states, rows);
        for (int32_t chunk = split->from + 1; chunk < split->to; chunk++)
            IN(merge)(so_far, state_in(split->states + (chunk - split->from) * state_bytes(rows, width), rows), rows, width);
        IN(finish)(c, task, s, task->head, so_far, rows);
        return;
    }
    for (int32_t h = 0; h < task->heads; h++)
        IN(finish)(c, task, s, task->head + h, state_in(heads + each * h + packed * blocks, rows), rows);
}

#undef COLUMNS
#undef PER_TILE
#undef EACH
