// What the parts of the CPU renderer tell each other. One picture is one tri-plane with its rays; all arrays are dense,
// float32, and live as long as the call.
#pragma once
#include <cstdint>

namespace nofa {

constexpr int kMaxLayers = 3;  // two hidden layers at most
constexpr int kPlanes = 3;
constexpr int kTaps = 4 * kPlanes;  // pixels that a point reads

struct Scene {
  int64_t pictures, rays;         // rays of each picture
  int coarse, fine;               // samples of a ray; fine = 0: one pass, depths in any order
  int channels, height, width;    // of a plane
  int padded;                     // channels of `planes` in memory, a multiple of the lanes
  int layers, sizes[kMaxLayers + 1];  // of the decoder: channels, hidden layers, 1 + features
  int lattice;                    // nodes along a side of the offsets, 0: none
  int axes[2 * kPlanes];          // coordinate along the width, then along the height of each plane
  float box;                      // side of the cube that planes and lattice span
  bool white;                     // what is behind everything: white instead of black
  const float* planes;            // (pictures, 3, height, width, padded)
  const float* offsets;           // (pictures, lattice^3, 4): x, y, z, 0; x varies fastest; null: none
  const float *origins, *directions;  // (pictures, rays, 3)
  const float* depths;            // (pictures, rays, coarse), in the backward pass (pictures, rays, coarse + fine)
  const float* numbers;           // (pictures, rays, fine), in [0, 1]
  const float* weight[kMaxLayers];    // (out, in), gains folded in; the last layer's first row is the density
  const float* bias[kMaxLayers];

  int features() const { return sizes[layers] - 1; }
  int samples() const { return coarse + fine; }
};

// Per ray; `depths` are those of the fine pass, null: not wanted.
struct Seen {
  float *features, *depth, *weight, *fine;
};

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

// What a picture's gradients are added to; null: not wanted.
struct Gathered {
  float* planes;   // (pictures, 3, height, width, padded)
  float* offsets;  // (pictures, lattice^3, 4)
  float *weight[kMaxLayers], *bias[kMaxLayers];
};

bool pack_planes(const Kernels&, const float* from, int64_t planes, int channels, int padded, int64_t pixels, float* to, int threads);
void unpack_planes(const Kernels&, const float* from, int64_t planes, int channels, int padded, int64_t pixels, float* to, int threads);
bool all_finite(const float* x, int64_t n);
void render(const Kernels&, const Scene&, const Seen&, int threads);
void render_back(const Kernels&, const Scene&, Gradients, const Gathered&, bool points, int threads);

}  // namespace nofa
