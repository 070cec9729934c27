// Enough of CUDA to run the renderer's kernels on a CPU: a block's threads are fibres, run one after the other from
// barrier to barrier. It finds wrong arithmetic, wrong addresses and missing barriers that a fixed order of the threads
// reveals (tests run them forwards and backwards); it says nothing about speed.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <vector>

#define __host__
#define __device__
#define __global__ static
#define __launch_bounds__(...)

struct alignas(16) float4 { float x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
typedef void* cudaStream_t;

namespace emulator {

struct Fibre {
  ucontext_t at;
  std::unique_ptr<char[]> stack;
  bool done = true;
};

struct State {
  std::vector<Fibre> fibres;
  ucontext_t scheduler;
  int now = 0;
  std::function<void()> work;
  std::vector<float4> memory;
  dim3 thread, block, grid;
};

inline State& state() {
  static thread_local State s;
  return s;
}

inline void run_fibre() {
  State& s = state();
  s.work();
  s.fibres[s.now].done = true;
  swapcontext(&s.fibres[s.now].at, &s.scheduler);
}

inline void barrier() {
  State& s = state();
  int me = s.now;
  swapcontext(&s.fibres[me].at, &s.scheduler);
}

// Every barrier must be met by all threads or by none.
inline void run_block(int threads) {
  State& s = state();
  if ((int)s.fibres.size() < threads) s.fibres.resize(threads);
  for (int i = 0; i < threads; i++) {
    Fibre& f = s.fibres[i];
    constexpr size_t kStack = 128 << 10;
    if (!f.stack) f.stack.reset(new char[kStack]);
    getcontext(&f.at);
    f.at.uc_stack.ss_sp = f.stack.get(), f.at.uc_stack.ss_size = kStack, f.at.uc_link = nullptr;
    makecontext(&f.at, run_fibre, 0);
    f.done = false;
  }
  bool backwards = std::getenv("NOFA_BACKWARDS");
  for (int left = threads; left;) {
    int finished = 0;
    for (int k = 0; k < threads; k++) {
      int i = backwards ? threads - 1 - k : k;
      s.now = i, s.thread.x = i;
      swapcontext(&s.scheduler, &s.fibres[i].at);
      finished += s.fibres[i].done;
    }
    if (finished && finished != left) std::abort();  // some threads wait at a barrier that others never reach
    left -= finished;
  }
}

inline void launch(dim3 grid, int threads, int64_t bytes, std::function<void()> work) {
  State& s = state();
  s.work = std::move(work), s.grid = grid;
  for (s.block.y = 0; s.block.y < grid.y; s.block.y++)
    for (s.block.x = 0; s.block.x < grid.x; s.block.x++) {
      float nan = std::numeric_limits<float>::quiet_NaN();
      s.memory.assign(bytes / 16 + 1, make_float4(nan, nan, nan, nan));  // what is not written must not be read
      run_block(threads);
    }
}

}  // namespace emulator

#define threadIdx (emulator::state().thread)
#define blockIdx (emulator::state().block)
#define gridDim (emulator::state().grid)
#define NOFA_SHARED(name) float* name = (float*)emulator::state().memory.data()
#define NOFA_LAUNCH(kernel, blocks, threads, bytes, stream, ...) emulator::launch(blocks, threads, bytes, [=] { kernel(__VA_ARGS__); })

inline void __syncthreads() { emulator::barrier(); }
inline float atomicAdd(float* to, float x) { return *to += x; }
inline void atomicMin(int* to, int x) { *to = std::min(*to, x); }
inline float __log2f(float x) { return std::log2(x); }
using std::isfinite;
using std::max;
using std::min;
