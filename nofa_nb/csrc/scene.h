// What is rendered, and where the results go. One picture is one tri-plane with its rays; all arrays are dense, float32,
// and live as long as the call.
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
  bool ahead;                     // `planes` have been through the decoder's first matrix: `padded` is for its outputs
  bool white;                     // what is behind everything: white instead of black
  const float* planes;            // (pictures, 3, height, width, padded)
  const float* offsets;           // (pictures, lattice^3, 4): x, y, z, 0; x varies fastest; null: none
  const float *origins, *directions;  // (pictures, rays, 3)
  const float* depths;            // (pictures, rays, coarse), in the backward pass (pictures, rays, coarse + fine)
  const float* numbers;           // (pictures, rays, fine), in [0, 1]
  const float* weight[kMaxLayers];    // (out, in), gains folded in; the last layer's first row is the density
  const float* bias[kMaxLayers];

  constexpr int features() const { return sizes[layers] - 1; }
  constexpr int samples() const { return coarse + fine; }
};

// Per ray; `depths` are those of the fine pass, null: not wanted.
struct Seen {
  float *features, *depth, *weight, *fine;
};

// What a picture's gradients are added to; null: not wanted.
struct Gathered {
  float* planes;   // (pictures, 3, height, width, padded)
  float* offsets;  // (pictures, lattice^3, 4)
  float *weight[kMaxLayers], *bias[kMaxLayers];
};

}  // namespace nofa
