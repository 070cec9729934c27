// The few words of CUDA that the kernels use. With NOFA_EMULATED they come from elsewhere: the tests run the kernels'
// code on a CPU, thread by thread, where there is no GPU.
#pragma once
#ifdef NOFA_EMULATED
#include "emulator.h"
#else
#include <cuda_runtime.h>
#define NOFA_SHARED(name) extern __shared__ float4 name##_memory[]; float* name = (float*)name##_memory
#define NOFA_LAUNCH(kernel, blocks, threads, bytes, stream, ...)                                 \
  (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)(bytes)),      \
   kernel<<<(blocks), (threads), (bytes), (stream)>>>(__VA_ARGS__))
#endif

#include "scene.h"

namespace nofa {
namespace cuda {

#ifndef NOFA_THREADS
#define NOFA_THREADS 256
#endif
constexpr int kThreads = NOFA_THREADS;  // of a block

// for (EACH(i, n)): the block's threads share the numbers 0 to n - 1.
#define EACH(i, n) int i = threadIdx.x, i##_end = (n); i < i##_end; i += kThreads

__host__ __device__ inline int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

__device__ inline float4& quad(float* p) { return *(float4*)p; }
__device__ inline const float4& quad(const float* p) { return *(const float4*)p; }
__device__ inline void add(float4& a, float w, const float4& b) { a.x += w * b.x, a.y += w * b.y, a.z += w * b.z, a.w += w * b.w; }
__device__ inline float dot(const float4& a, const float4& b) { return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w; }

// To numbers that other blocks may be adding to: the order of the sums is not fixed.
__device__ inline void add_together(float* to, float w, const float4& g) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  atomicAdd((float4*)to, make_float4(w * g.x, w * g.y, w * g.z, w * g.w));
#else
  atomicAdd(to, w * g.x), atomicAdd(to + 1, w * g.y), atomicAdd(to + 2, w * g.z), atomicAdd(to + 3, w * g.w);
#endif
}

constexpr float kLog2E = 1.44269504f, kLn2 = 0.69314718f;

__device__ inline float exp_of(float x) { return exp2f(x * kLog2E); }

// log(1 + e^x): the hardware's base-2 logarithm is good to 1e-7 where its argument is between 1 and 2.
__device__ inline float softplus(float x) { return fmaxf(x, 0.f) + kLn2 * __log2f(1.f + exp_of(-fabsf(x))); }

__device__ inline float sigmoid(float x) {
  float e = exp_of(-fabsf(x)), inverse = 1.f / (1.f + e);
  return x > 0.f ? inverse : e * inverse;
}

// Slope of the softplus whose value is given.
__device__ inline float slope_of_softplus(float value) { return 1.f - exp_of(-value); }

}  // namespace cuda
}  // namespace nofa
