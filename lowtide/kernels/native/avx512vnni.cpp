// The kernels for avx512vnni; see kernels.inc.

#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(                                                                     \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,bmi,popcnt"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,bmi,popcnt")
#endif

#define LOWTIDE_SET avx512vnni
#define LOWTIDE_WIDTH 512
#define LOWTIDE_VNNI 1
#include "kernels.inc"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
