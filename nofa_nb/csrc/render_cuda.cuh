// What the CUDA kernels and their binding tell each other.
#pragma once
#include "scene.h"

namespace nofa {
namespace cuda {

// How a call is spread over the GPU.
struct Plan {
  int tile, rays;   // samples that a block evaluates at a time; rays that it takes from beginning to end
  int blocks;
  int64_t shared;   // bytes of a block's own memory; 0: the decoder is too large for this GPU
  int64_t scratch;  // numbers of device memory, for all blocks
};

Plan plan(const Scene&, bool backward);

struct Wanted {
  const float *features, *depth, *weight;  // gradients of Seen
  Gathered to;
  float *origins, *directions;  // null: not wanted
};

// All pointers are to device memory; `stream` is a cudaStream_t.
void render(const Scene&, const Seen&, float* scratch, const Plan&, void* stream);
void render_back(const Scene&, const Wanted&, float* scratch, const Plan&, void* stream);

constexpr int kMaxArrays = 16;
struct Arrays { const float* at[kMaxArrays]; int64_t size[kMaxArrays]; int count; };

// `*worst`: the smallest position of an array that holds NaN or infinity, else as it was.
void find_infinite(const Arrays&, int* worst, void* stream);

}  // namespace cuda
}  // namespace nofa
