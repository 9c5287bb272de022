/* The vectors of one level and type, then what is computed with them (LEVEL), then the names are given back. See levels.h. */

#define INNER ALWAYS TARGET
#define UNROLL _Pragma("GCC unroll 12")

#if defined(DOTS) || HALVES == 2
#define PAIRED 1
#else
#define PAIRED 0
#endif
/* What a column is multiplied by. */
#ifdef DOTS
typedef uint32_t IN(Weight) __attribute__((may_alias));
#else
typedef float IN(Weight) __attribute__((may_alias));
#endif

typedef float IN(Floats) __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t IN(Ints) __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int16_t IN(Shorts) __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
#define Weight IN(Weight)
#define Shorts IN(Shorts)
#define Floats IN(Floats)
#define Ints IN(Ints)

/* Half `half` of every lane as floats. */
INNER Floats IN(load)(const char *at, int half) {
#if HALVES == 2
    const Ints both = *(const Ints *)at;
    return half ? (Floats)(both & (int32_t)0xffff0000) : (Floats)(both << 16);
#else
    (void)half;
    return *(const Floats *)at;
#endif
}

INNER Floats IN(madd)(Floats sum, Weight weight, Floats column) {
#ifdef DOTS
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)column, (__m512bh)_mm512_set1_epi32((int)weight));
#else
    return sum + column * weight;
#endif
}

INNER Floats IN(select)(Ints where, Floats yes, Floats no) {
    return (Floats)(((Ints)yes & where) | ((Ints)no & ~where));
}

/* `b` where either is NaN. */
INNER Floats IN(larger)(Floats a, Floats b) {
#if LANES == 16
    return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif LANES == 8
    return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return IN(select)(a > b, a, b);
#endif
}

/* 2^x, to an ulp or two; 0 below the normal numbers, NaN of NaN. Not for x > 127. */
INNER Floats IN(exp2)(Floats x) {
    x = IN(larger)((Floats){0} - 127.0f, x);
    const Floats magic = (Floats){0} + 12582912.0f; /* 1.5 * 2^23: its sum with x has x rounded in the low bits */
    const Floats rounded = x + magic;
    const Floats part = x - (rounded - magic); /* within a half */
    Floats y = part * 1.535336188319500e-4f + 1.339887440266574e-3f;
    y = y * part + 9.618437357674640e-3f;
    y = y * part + 5.550332471162809e-2f;
    y = y * part + 2.402264791363012e-1f;
    y = y * part + 6.931472028550421e-1f;
    y = y * part + 1.0f;
    return y * (Floats)(((Ints)rounded << 23) + 0x3f800000); /* of -127 this is 0 */
}

/* In the model's type: to the nearest, to even between two; a NaN stays one. By integers, the same at every level. */
INNER void IN(store)(char *to, Floats x) {
#if PAIRED
    const Ints bits = (Ints)x, odd = (bits >> 16) & 1;
    const Ints near = (Ints)IN(select)(x == x, (Floats)(bits + 0x7fff + odd), (Floats)(bits | 0x400000));
    *(Shorts *)to = __builtin_convertvector(near >> 16, Shorts);
#else
    *(Floats *)to = x;
#endif
}

#include LEVEL

#undef INNER
#undef UNROLL
#undef PAIRED
#undef Weight
#undef Floats
#undef Ints
#undef Shorts
#undef HALVES
#undef IN
