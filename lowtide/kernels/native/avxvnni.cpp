// The kernels for avxvnni; see kernels.inc.

#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avxvnni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,avxvnni")
#endif

#define LOWTIDE_SET avxvnni
#define LOWTIDE_WIDTH 256
#define LOWTIDE_VNNI 1
#include "kernels.inc"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
