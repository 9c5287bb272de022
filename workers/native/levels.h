/* The levels: what is computed with vectors (LEVEL, a file) is compiled for each and each type of the model's numbers, and
 * which of them runs is chosen by the machine that it runs on.
 *
 * TARGET   the instructions its functions may use
 * LANES    floats in a vector
 * HALVES   numbers in four bytes that are multiplied one behind the other: 2 where a pair of bfloat16 is widened
 * DOTS     a pair of bfloat16 is multiplied by one instruction
 * IN       names a function of this level
 */
#pragma once

#include "attention.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

#define TARGET
#define LANES 4
#define HALVES 1
#define IN(name) JOIN(name, _plain_f32)
#include "vector.h"
#define HALVES 2
#define IN(name) JOIN(name, _plain_bf16)
#include "vector.h"
#undef TARGET
#undef LANES

#if defined(__x86_64__)
#define TARGET __attribute__((target("avx2,fma")))
#define LANES 8
#define HALVES 1
#define IN(name) JOIN(name, _avx2_f32)
#include "vector.h"
#define HALVES 2
#define IN(name) JOIN(name, _avx2_bf16)
#include "vector.h"
#undef TARGET
#undef LANES

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define LANES 16
#define HALVES 1
#define IN(name) JOIN(name, _avx512_f32)
#include "vector.h"
#define HALVES 2
#define IN(name) JOIN(name, _avx512_bf16)
#include "vector.h"
#undef TARGET

#define TARGET __attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define DOTS
#define HALVES 1
#define IN(name) JOIN(name, _dots_bf16)
#include "vector.h"
#undef DOTS
#undef TARGET
#undef LANES
#endif

/* A function of all levels, [LEVELS][2] by level and type. */
#if defined(__x86_64__)
#define OF_LEVELS(name)                                                                                                     \
    {                                                                                                                      \
        [PLAIN] = {name##_plain_f32, name##_plain_bf16}, [AVX2] = {name##_avx2_f32, name##_avx2_bf16},                     \
        [AVX512] = {name##_avx512_f32, name##_avx512_bf16}, [AVX512_BF16] = {name##_avx512_f32, name##_dots_bf16},         \
    }
#else
#define OF_LEVELS(name) {[PLAIN] = {name##_plain_f32, name##_plain_bf16}}
#endif
