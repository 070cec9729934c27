// For processors with AVX2 and FMA.
#if defined(__x86_64__)
#include <immintrin.h>
#include "render_cpu.h"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define LANES 8
#define SET avx2
#include "render_kernel.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
