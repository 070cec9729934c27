// What the parts of the CPU renderer tell each other.
#pragma once
#include "scene.h"

namespace nofa {

// What the backward pass is given and makes. `feature` etc. are gradients of Seen. A gradient that is null is not wanted.
struct Gradients {
  const float *features, *depth, *weight;
  float* samples;  // of the looked-up feature, (rays of a wave, samples, padded)
  float* points;   // of the sample's position before the offsets, (rays of a wave, samples, 4)
  float* moved;    // of the position after the offsets, the same shape
  float *origins, *directions;
};

// One instruction set. `net` is the decoder as `pack` has rearranged it; `scratch` belongs to the calling thread.
// Rays are counted through all pictures; those of one call lie in one picture.
struct Kernels {
  const char* name;
  int lanes;
  int64_t (*pack_size)(const Scene&);
  void (*pack)(const Scene&, float* net);
  // Pixels `first` to `last` of all planes through the decoder's first matrix, (pixels, outputs rounded up).
  void (*ahead)(const Scene&, const float* net, int64_t first, int64_t last, float* to);
  int64_t (*forward_scratch)(const Scene&, int rays);
  void (*forward)(const Scene&, const float* net, int64_t first, int rays, const Seen&, float* scratch);
  int64_t (*backward_scratch)(const Scene&, int rays);
  int64_t (*slot_size)(const Scene&);  // of a thread's part of the decoder's gradient, null: not wanted
  void (*backward)(const Scene&, const float* net, int64_t first, int rays, int64_t first_of_wave, const Gradients&,
                   float* slot, float* scratch);
  void (*unpack_slot)(const Scene&, const float* slot, float* const* weight, float* const* bias);
  // Adds gradients of a wave's samples to channels `first` to `last` of one plane of one picture, and to its offsets.
  void (*scatter_plane)(const Scene&, int64_t picture, int plane, int first, int last, int64_t ray, int64_t rays,
                        int64_t first_of_wave, const Gradients&, float* planes);
  void (*scatter_offsets)(const Scene&, int64_t picture, int64_t ray, int64_t rays, int64_t first_of_wave,
                          const Gradients&, float* offsets);
  // (channels, pixels) to (pixels, padded) and back; the first returns whether all numbers are finite.
  bool (*to_pixels)(const float* from, int channels, int padded, int64_t pixels, int64_t first, int64_t last, float* to);
  void (*to_channels)(const float* from, int channels, int padded, int64_t pixels, int64_t first, int64_t last, float* to);
};

extern const Kernels kernels_plain;
#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx512;
#endif

// The set of that name, or of an empty name the best that this processor has; null: there is none.
const Kernels* find_kernels(const char* name);

bool pack_planes(const Kernels&, const float* from, int64_t planes, int channels, int padded, int64_t pixels, float* to, int threads);
void unpack_planes(const Kernels&, const float* from, int64_t planes, int channels, int padded, int64_t pixels, float* to, int threads);
bool ascending(const float* x, int64_t rows, int n);  // in each row of n
bool all_finite(const float* x, int64_t n);
void render(const Kernels&, const Scene&, const Seen&, int threads);
void render_back(const Kernels&, const Scene&, Gradients, const Gathered&, bool points, int threads);

}  // namespace nofa
