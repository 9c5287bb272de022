/* Attention over KV in blocks, one call a layer for all spans of a pass: decode rows and prefill chunks alike.
 *
 * Two phases with a barrier between them: all new keys and values are written into the blocks, then every row attends,
 * because rows of one pass may read blocks that others write. Threads are those of the OpenMP runtime that the caller
 * hands over (a second pool would wait for the first one's cores), and take tasks from a counter; what a row computes
 * depends neither on the thread that does it nor on its company, so results are the same bit for bit.
 *
 * In a block each KV head has its own run of tiles of 16 tokens. All is in lanes of four bytes, one float or a pair of
 * bfloat16 (what one dot-product instruction takes):
 *   keys    [Hkv][block_size / 16][units][16]  a unit is one dimension or two neighbours: 16 scores at once, none summed across lanes
 *   values  [Hkv][block_size / 16][units][D]   a unit is one token or two neighbours
 * A tile of either is 16 * D elements, so a block takes what plain [slots, Hkv, D] would.
 *
 * Scores and sums are fp32. Positions that a row does not see never reach a sum: scores are selected, and values behind
 * the last position seen are zeroes in a copy, since blocks hold what others left there, NaN included.
 */

#include <math.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "attention.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

enum { TILE = 16 };            /* tokens */
enum { CHUNK = 128 };          /* positions whose scores are held at once; chunks begin at multiples of it */
enum { ROWS = 6 };             /* most rows (a token's query head) in registers */
enum { TILE_ROWS = 96 };       /* rows of a task, about: what is done with a chunk while it is in cache */
enum { CHUNK_TILES = CHUNK / TILE };
enum { AHEAD_BYTES = 1 << 18 }; /* fetched ahead at most */
enum { RUN = 4 };              /* cache lines fetched at once; a tile is a whole number of them */

/* Rows of tokens [first, last) of a span and `heads` KV heads from `head` on, over the chunks [from, to). */
struct Task {
    int32_t span, head, heads, first, last, from, to;
    int32_t split; /* among the splits; -1: this task has all chunks */
};

/* One stretch of rows whose chunks several tasks share. The last to finish puts them together. */
struct Split {
    atomic_int left;
    int32_t from, to;
    char *states; /* one State's memory a chunk */
};

/* What rows have gathered so far: the largest score, the sum of exponentials, the weighted sum of values. */
struct State {
    float *most, *sum; /* [R] */
    float *acc;        /* [R, D] */
};

struct Team {
    const struct Call *call;
    struct Task *tasks;
    struct Split *splits;
    char *rooms;
    size_t room;
    int32_t writes, count, most_rows;
    atomic_int next_room, next_write, next_task;
};

ALWAYS int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }
ALWAYS int32_t most(int32_t a, int32_t b) { return a > b ? a : b; }
ALWAYS int32_t parts(int32_t a, int32_t b) { return (a + b - 1) / b; }
ALWAYS size_t line(size_t bytes) { return (bytes + 63) & ~(size_t)63; }

ALWAYS int32_t element(const struct Call *c) { return c->dtype == FLOAT32 ? 4 : 2; }
ALWAYS int32_t group(const struct Call *c) { return c->heads / c->kv_heads; }

/* Bytes between the tiles of a block's neighbouring heads. */
ALWAYS size_t head_bytes(const struct Call *c) { return (size_t)c->block_size * c->width * element(c); }

/* Bytes from the pool's beginning to the tile of `head` that holds `position`. */
ALWAYS size_t tile_at(const struct Call *c, const int32_t *table, int32_t head, int32_t position) {
    size_t tile = (size_t)TILE * c->width * element(c);
    size_t tiles = c->block_size / TILE;
    size_t block = table[position / c->block_size];
    return ((block * c->kv_heads + head) * tiles + position % c->block_size / TILE) * tile;
}

ALWAYS size_t state_bytes(size_t rows, size_t width) { return line(4 * rows) * 2 + line(4 * rows * width); }

ALWAYS struct State state_in(char *room, size_t rows) {
    return (struct State){(float *)room, (float *)(room + line(4 * rows)), (float *)(room + 2 * line(4 * rows))};
}

/* The tiles that a task reads in one chunk, keys before values; of its first head. */
struct Reach {
    int32_t begin, end; /* positions: from a tile's first to the last that any of the task's rows sees, and one */
    int32_t tiles, heads;
    char *at[2 * CHUNK_TILES];
};

static void reach(const struct Call *c, const struct Task *task, int32_t chunk, struct Reach *r) {
    const struct Span *s = c->spans + task->span;
    const int32_t low = c->window ? most(0, s->start + task->first + 1 - c->window) : 0;
    r->begin = most(chunk * CHUNK, low / TILE * TILE), r->end = least((chunk + 1) * CHUNK, s->start + task->last);
    r->tiles = parts(r->end - r->begin, TILE), r->heads = task->heads;
    for (int32_t t = 0; t < r->tiles; t++) {
        const size_t at = tile_at(c, c->tables + s->table, task->head, r->begin + t * TILE);
        r->at[t] = c->keys + at, r->at[r->tiles + t] = c->values + at;
    }
}

/* What is read next comes from memory while this chunk is computed, into the second cache, which has room for it. It comes
 * in small runs: line by line takes longer, and a tile at once leaves no room for loads of what is computed. A tile's heads
 * come one behind the other, as they lie in a block.
 */
struct Ahead {
    struct Reach next;
    int32_t tile, head, line; /* that come next */
    int32_t lines;            /* of a tile, a multiple of RUN */
    size_t head_bytes;
    int32_t pace;             /* lines to fetch, in 256ths, for each line that is computed */
    int32_t due;              /* in 256ths */
};

ALWAYS void fetch_run(struct Ahead *ahead) {
    if (ahead->tile == 2 * ahead->next.tiles) return;
    const char *at = ahead->next.at[ahead->tile] + ahead->head * ahead->head_bytes + 64 * ahead->line;
    for (int32_t i = 0; i < RUN; i++) __builtin_prefetch(at + 64 * i, 0, 2);
    ahead->line += RUN;
    if (ahead->line < ahead->lines) return;
    ahead->line = 0;
    if (++ahead->head == ahead->next.heads) ahead->head = 0, ahead->tile++;
}

/* `lines` of this chunk are computed. */
ALWAYS void fetch(struct Ahead *ahead, int32_t lines) {
    for (ahead->due += lines * ahead->pace; ahead->due >= 256 * RUN; ahead->due -= 256 * RUN) fetch_run(ahead);
}

static void fetch_all(const struct Call *c, const struct Task *task) {
    struct Ahead ahead = {.lines = TILE * c->width * element(c) / 64, .head_bytes = head_bytes(c)};
    reach(c, task, task->from, &ahead.next);
    while (ahead.tile < 2 * ahead.next.tiles) fetch_run(&ahead);
}

/* Queries, packed, and what their rows have gathered so far: of one head. */
ALWAYS size_t head_room(const struct Call *c, int32_t rows) {
    return line(4 * (size_t)c->width * ROWS) * parts(rows, ROWS) + state_bytes(rows, c->width);
}

/* ---------------------------------------------------------------- levels */

typedef void Attend(const struct Call *, const struct Task *, const struct Task *next, struct Split *, char *room);

#define LEVEL "attend.h"
#include "levels.h"

static Attend *const attends[LEVELS][2] = OF_LEVELS(attend);

/* The best level of this machine. */
EXPORT int32_t scls_attention_level(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return PLAIN;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
        return AVX2;
    return __builtin_cpu_supports("avx512bf16") ? AVX512_BF16 : AVX512;
#else
    return PLAIN;
#endif
}

/* Memory that was never touched comes in large pages, if the system has such: tiles lie scattered, and of small pages each
 * would have to be looked up.
 */
EXPORT void scls_large_pages(char *from, int64_t size) {
#if defined(MADV_HUGEPAGE)
    char *page = (char *)(((uintptr_t)from + 4095) & ~(uintptr_t)4095);
    if (page < from + size) madvise(page, (size_t)(from + size - page), MADV_HUGEPAGE);
#else
    (void)from, (void)size;
#endif
}

/* Bytes of a Call, for who writes it elsewhere. */
EXPORT int64_t scls_attention_call_size(void) { return sizeof(struct Call); }

/* ---------------------------------------------------------------- the new keys and values */

/* Tokens [from, to) of a span, all in one tile. */
static void write(const struct Call *c, const struct Span *s, int32_t from, int32_t to) {
    const int32_t slot = (s->start + from) % TILE, count = to - from;
    const int32_t half = c->dtype == BFLOAT16;
    const int32_t units = c->width >> half;
    const size_t each = element(c);
    for (int32_t head = 0; head < c->kv_heads; head++) {
        const size_t at = tile_at(c, c->tables + s->table, head, s->start + from);
        const char *k = c->k + ((s->first + from) * c->k_token + head * c->k_head) * each;
        const char *v = c->v + ((s->first + from) * c->v_token + head * c->v_head) * each;
        for (int32_t unit = 0; unit < units; unit++)
            for (int32_t t = 0; t < count; t++)
                memcpy(c->keys + at + 4 * ((size_t)unit * TILE + slot + t), k + t * c->k_token * each + 4 * unit, 4);
        for (int32_t t = 0; t < count; t++) {
            const char *from_row = v + t * c->v_token * each;
            if (half) {
                uint16_t *pair = (uint16_t *)(c->values + at) + (size_t)(slot + t) / 2 * c->width * 2 + (slot + t) % 2;
                for (int32_t d = 0; d < c->width; d++) memcpy(pair + 2 * d, from_row + 2 * d, 2);
            } else {
                memcpy(c->values + at + 4 * (size_t)(slot + t) * c->width, from_row, 4 * (size_t)c->width);
            }
        }
    }
}

/* ---------------------------------------------------------------- tasks */

/* The tile-wide stretches of a span's tokens: a token may lie in the middle of the first. */
ALWAYS int32_t write_count(const struct Span *s) { return parts(s->start % TILE + s->size, TILE); }

static int32_t task_tokens(const struct Call *c) { return most(1, TILE_ROWS / group(c)); }

static void chunks_of(const struct Call *c, const struct Span *s, int32_t first, int32_t last, struct Task *task) {
    const int32_t low = c->window ? most(0, s->start + first + 1 - c->window) : 0;
    task->first = first, task->last = last;
    task->from = low / CHUNK, task->to = parts(s->start + last, CHUNK);
}

struct Size {
    int32_t writes, tasks, chunks, most_rows, longest; /* tasks and chunks where none is split */
};

static struct Size size_of(const struct Call *c) {
    struct Size size = {0};
    const int32_t tokens = task_tokens(c);
    for (int32_t i = 0; i < c->count; i++) {
        const struct Span *s = c->spans + i;
        size.writes += write_count(s);
        for (int32_t first = 0; first < s->size; first += tokens) {
            struct Task task;
            chunks_of(c, s, first, least(first + tokens, s->size), &task);
            size.tasks += c->kv_heads;
            size.chunks += (task.to - task.from) * c->kv_heads;
            size.longest = most(size.longest, task.to - task.from);
        }
        size.most_rows = most(size.most_rows, least(tokens, s->size) * group(c));
    }
    return size;
}

/* Chunks a task may have. Few tasks over a long context are split so that each thread has some. */
static int32_t chunks_each(const struct Call *c, const struct Size *size) {
    if (c->threads == 1 || size->tasks >= 4 * c->threads) return INT32_MAX;
    return most(1, size->chunks / (4 * c->threads));
}

/* KV heads that a single token's task has, where there are so many that no thread goes without: their tiles lie together in
 * a block, and long reads are faster. What is fetched ahead is to fit into a part of the second cache.
 */
static int32_t heads_each(const struct Call *c, const struct Size *size) {
    int32_t heads = c->kv_heads;
    while (heads > 1 && (c->kv_heads % heads || size->tasks / heads < 8 * c->threads ||
                         heads * 2 * CHUNK * c->width * element(c) > AHEAD_BYTES))
        heads--;
    return heads;
}

static size_t thread_room(const struct Call *c, int32_t rows) {
    const size_t one = head_room(c, rows), all = head_room(c, group(c)) * c->kv_heads;
    size_t bytes = one > all ? one : all;
    bytes += state_bytes(rows, c->width);              /* of one chunk */
    bytes += line(4 * CHUNK * ROWS);                   /* scores */
    bytes += line(4 * TILE * (size_t)c->width);        /* the last values */
    return bytes;
}

struct Rooms {
    size_t tasks, splits, states, threads, all;
};

static struct Rooms rooms_of(const struct Call *c, const struct Size *size) {
    const int32_t each = chunks_each(c, size);
    const int split = each < size->longest;
    struct Rooms r;
    r.tasks = 0;
    r.splits = r.tasks + line(sizeof(struct Task) * (split ? size->chunks : size->tasks));
    r.states = r.splits + (split ? line(sizeof(struct Split) * size->tasks) : 0);
    r.threads = r.states + (split ? state_bytes(size->most_rows, c->width) * size->chunks : 0);
    r.all = r.threads + thread_room(c, size->most_rows) * c->threads;
    return r;
}

EXPORT int64_t scls_attention_room(const struct Call *c) {
    const struct Size size = size_of(c);
    return (int64_t)rooms_of(c, &size).all;
}

/* Long chunks' last tokens first, which see most; single tokens fill what remains. */
static int32_t plan(const struct Call *c, const struct Size *size, const struct Rooms *rooms, struct Team *team) {
    const int32_t tokens = task_tokens(c), each = chunks_each(c, size), together = heads_each(c, size);
    char *states = c->room + rooms->states;
    int32_t count = 0, splits = 0;
    for (int32_t single = 0; single < 2; single++) {
        for (int32_t i = 0; i < c->count; i++) {
            const struct Span *s = c->spans + i;
            if ((s->size == 1) != single) continue;
            for (int32_t first = (s->size - 1) / tokens * tokens; first >= 0; first -= tokens) {
                struct Task whole = {.span = i, .heads = single ? together : 1, .split = -1};
                chunks_of(c, s, first, least(first + tokens, s->size), &whole);
                const int32_t chunks = whole.to - whole.from;
                for (whole.head = 0; whole.head < c->kv_heads; whole.head += whole.heads) {
                    if (chunks <= each) {
                        team->tasks[count++] = whole;
                        continue;
                    }
                    struct Split *split = team->splits + splits;
                    split->from = whole.from, split->to = whole.to, split->states = states;
                    states += chunks * state_bytes((whole.last - first) * group(c), c->width);
                    atomic_init(&split->left, parts(chunks, each));
                    for (int32_t from = whole.from; from < whole.to; from += each) {
                        struct Task part = whole;
                        part.from = from, part.to = least(from + each, whole.to), part.split = splits;
                        team->tasks[count++] = part;
                    }
                    splits++;
                }
            }
        }
    }
    return count;
}

static void work(void *of) {
    struct Team *team = of;
    const struct Call *c = team->call;
    const int32_t mine = atomic_fetch_add(&team->next_room, 1);
    int32_t i, before = 0, span = 0;
    while ((i = atomic_fetch_add(&team->next_write, 1)) < team->writes) {
        while (i >= before + write_count(c->spans + span)) before += write_count(c->spans + span++);
        const struct Span *s = c->spans + span;
        const int32_t from = (i - before) * TILE - s->start % TILE;
        write(c, s, most(from, 0), least(from + TILE, s->size));
    }
    i = atomic_fetch_add(&team->next_task, 1);
    if (i < team->count) fetch_all(c, team->tasks + i);
    if (c->barrier) c->barrier();
    Attend *attend = attends[c->level][c->dtype];
    while (i < team->count) {
        /* Taken one ahead, so that it can be fetched. */
        const int32_t then = atomic_fetch_add(&team->next_task, 1);
        const struct Task *task = team->tasks + i, *next = then < team->count ? team->tasks + then : NULL;
        attend(c, task, next, task->split < 0 ? NULL : team->splits + task->split, team->rooms + mine * team->room);
        i = then;
    }
}

EXPORT void scls_attend(const struct Call *given) {
    struct Call call = *given;
    if (!call.parallel || !call.barrier) call.threads = 1;
    const struct Size size = size_of(&call);
    const struct Rooms rooms = rooms_of(&call, &size);
    struct Team team = {
        .call = &call,
        .tasks = (struct Task *)(call.room + rooms.tasks),
        .splits = (struct Split *)(call.room + rooms.splits),
        .rooms = call.room + rooms.threads,
        .room = thread_room(&call, size.most_rows),
        .writes = size.writes,
    };
    team.count = plan(&call, &size, &rooms, &team);
    if (call.threads == 1) {
        call.barrier = NULL;
        work(&team);
    } else {
        call.parallel(work, &team, (unsigned)call.threads, 0);
    }
}
