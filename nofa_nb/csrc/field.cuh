// Samples in space and what the planes hold there, a tile of samples at a time; see gather.h for the same on a CPU.
#pragma once
#include "gpu.cuh"

namespace nofa {
namespace cuda {

struct Point { float at[3]; };

// A set of samples: `samples` of each of `count` rays from `first` on, all in one picture.
struct Samples {
  int64_t picture, first;
  int count, samples;
  const float* depth;  // (count, samples)

  __device__ int total() const { return count * samples; }
  __device__ Point point(const Scene& s, int k) const {  // before the offsets
    const float *o = s.origins + 3 * (first + k / samples), *d = s.directions + 3 * (first + k / samples);
    return {{o[0] + depth[k] * d[0], o[1] + depth[k] * d[1], o[2] + depth[k] * d[2]}};
  }
};

// ---- offsets: a lattice of vectors over the box, corner to corner; points outside the box stay

struct Cell {
  int at[8];          // nodes, x fastest
  float weight[8];
  float slope[3][8];  // of the weights, per unit of the position
};

__device__ inline Cell cell(const Scene& s, const Point& p) {
  float part[3], slope[3], inside = 1, half = 0.5f * s.box, top = s.lattice - 1;
  int low[3];
#pragma unroll
  for (int axis = 0; axis < 3; axis++) {
    float u = (p.at[axis] / s.box + 0.5f) * top;
    if (!(fabsf(p.at[axis]) <= half)) inside = 0;
    slope[axis] = u > 0 && u < top ? top / s.box : 0.f;
    u = fminf(fmaxf(u, 0.f), top);
    low[axis] = min((int)u, s.lattice - 2);
    part[axis] = u - low[axis];
  }
  Cell c;
#pragma unroll
  for (int k = 0; k < 8; k++) {
    float w[3], d[3];
    c.at[k] = 0;
#pragma unroll
    for (int axis = 2; axis >= 0; axis--) {
      int high = k >> axis & 1;
      c.at[k] = c.at[k] * s.lattice + low[axis] + high;
      w[axis] = high ? part[axis] : 1 - part[axis];
      d[axis] = high ? slope[axis] : -slope[axis];
    }
    w[0] *= inside, d[0] *= inside;
    c.weight[k] = w[0] * w[1] * w[2];
    c.slope[0][k] = d[0] * w[1] * w[2], c.slope[1][k] = w[0] * d[1] * w[2], c.slope[2][k] = w[0] * w[1] * d[2];
  }
  return c;
}

__device__ inline int64_t lattice_of(const Scene& s, int64_t picture) { return picture * s.lattice * s.lattice * s.lattice * 4; }

__device__ inline Point moved(const Scene& s, int64_t picture, Point p) {
  if (!s.offsets) return p;
  Cell c = cell(s, p);
  float4 total = make_float4(0, 0, 0, 0);
#pragma unroll
  for (int k = 0; k < 8; k++) add(total, c.weight[k], quad(s.offsets + lattice_of(s, picture) + 4 * c.at[k]));
  return {{p.at[0] + total.x, p.at[1] + total.y, p.at[2] + total.z}};
}

// ---- planes

// One coordinate; registers cannot be indexed with a number that is known only at run time.
__device__ inline float along(const Point& p, int axis) { return axis == 0 ? p.at[0] : axis == 1 ? p.at[1] : p.at[2]; }

// Both neighbours along one axis of `size` pixels: where, their weights (0 outside), and the weights' slopes.
struct Neighbours { int at[2]; float weight[2], slope[2]; };

__device__ inline Neighbours neighbours(float position, float per_unit, int size) {
  float u = ((position * per_unit + 1.f) * size - 1.f) * 0.5f;
  u = fminf(fmaxf(u, -2.f), size + 1.f);  // farther outside is the same
  float low = floorf(u), part = u - low;
  Neighbours n;
#pragma unroll
  for (int side = 0; side < 2; side++) {
    int at = (int)low + side;
    bool inside = at >= 0 && at < size;
    n.at[side] = max(0, min(at, size - 1));
    n.weight[side] = inside ? (side ? part : 1.f - part) : 0.f;
    n.slope[side] = inside ? (side ? 1.f : -1.f) : 0.f;
  }
  return n;
}

// What a tile of samples reads: (12, tile) addresses, from the picture's first plane on, and weights.
struct Taps { int* at; float* weight; };

__device__ inline void find_taps(const Scene& s, const Samples& set, int from, int tile, const Taps& taps) {
  for (EACH(i, tile)) {
    bool used = from + i < set.total();
    Point p = moved(s, set.picture, set.point(s, used ? from + i : 0));
    for (int plane = 0; plane < kPlanes; plane++) {
      Neighbours x = neighbours(along(p, s.axes[2 * plane]), 2 / s.box, s.width);
      Neighbours y = neighbours(along(p, s.axes[2 * plane + 1]), 2 / s.box, s.height);
#pragma unroll
      for (int k = 0; k < 4; k++) {
        taps.at[(4 * plane + k) * tile + i] = ((plane * s.height + y.at[k / 2]) * s.width + x.at[k % 2]) * s.padded;
        taps.weight[(4 * plane + k) * tile + i] = used ? y.weight[k / 2] * x.weight[k % 2] * (1.f / kPlanes) : 0.f;
      }
    }
  }
}

__device__ inline int64_t planes_of(const Scene& s, int64_t picture) { return picture * kPlanes * s.height * s.width * s.padded; }

// Mean of the planes, (padded, stride). Neighbouring threads read neighbouring channels of one pixel.
__device__ inline void gather(const Scene& s, int64_t picture, const Taps& taps, int tile, float* x, int stride) {
  const float* planes = s.planes + planes_of(s, picture);
  int quads = s.padded / 4;
  for (EACH(k, tile * quads)) {
    int i = k / quads, c = k % quads * 4;
    float4 total = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int tap = 0; tap < kTaps; tap++) add(total, taps.weight[tap * tile + i], quad(planes + taps.at[tap * tile + i] + c));
    x[c * stride + i] = total.x, x[(c + 1) * stride + i] = total.y, x[(c + 2) * stride + i] = total.z, x[(c + 3) * stride + i] = total.w;
  }
}

// The gradient of the looked-up features, (padded, stride), added to the planes' gradient.
__device__ inline void scatter(const Scene& s, int64_t picture, const Taps& taps, int tile, const float* g, int stride, float* planes) {
  planes += planes_of(s, picture);
  int quads = s.padded / 4;
  for (EACH(k, tile * quads)) {
    int i = k / quads, c = k % quads * 4;
    float4 value = make_float4(g[c * stride + i], g[(c + 1) * stride + i], g[(c + 2) * stride + i], g[(c + 3) * stride + i]);
    for (int tap = 0; tap < kTaps; tap++) {
      float weight = taps.weight[tap * tile + i];
      if (weight != 0) add_together(planes + taps.at[tap * tile + i] + c, weight, value);
    }
  }
}

// Products of that gradient with the pixels that were read, (12, tile): how the sum changes with each tap's weight.
__device__ inline void tap_products(const Scene& s, int64_t picture, const Taps& taps, int tile, const float* g, int stride, float* product) {
  const float* planes = s.planes + planes_of(s, picture);
  for (EACH(k, tile * kTaps)) {
    int i = k % tile;
    const float* pixel = planes + taps.at[k];
    float total = 0;
    for (int c = 0; c < s.padded; c += 4)
      total += dot(make_float4(g[c * stride + i], g[(c + 1) * stride + i], g[(c + 2) * stride + i], g[(c + 3) * stride + i]), quad(pixel + c));
    product[k] = total;
  }
}

// From there to the sample's position, to the offsets' lattice (null: not wanted), and to the ray: (count, 6) sums over
// samples for origins and directions, in the block's memory.
__device__ inline void points_back(const Scene& s, const Samples& set, int from, int tile, const float* products, float* offsets, float* rays) {
  for (EACH(i, tile)) {
    int k = from + i;
    if (k >= set.total()) break;
    Point still = set.point(s, k), p = moved(s, set.picture, still);
    float g[3] = {0, 0, 0};
    for (int plane = 0; plane < kPlanes; plane++) {
      int across = s.axes[2 * plane], down = s.axes[2 * plane + 1];
      Neighbours u = neighbours(p.at[across], 2 / s.box, s.width), v = neighbours(p.at[down], 2 / s.box, s.height);
      for (int side = 0; side < 4; side++) {
        float value = products[(4 * plane + side) * tile + i] / (kPlanes * s.box);
        g[across] += value * u.slope[side % 2] * v.weight[side / 2] * s.width;
        g[down] += value * u.weight[side % 2] * v.slope[side / 2] * s.height;
      }
    }
    float4 moving = make_float4(g[0], g[1], g[2], 0);
    if (s.offsets) {
      Cell c = cell(s, still);
      for (int n = 0; n < 8; n++) {
        float product = dot(quad(s.offsets + lattice_of(s, set.picture) + 4 * c.at[n]), moving);
        for (int axis = 0; axis < 3; axis++) g[axis] += product * c.slope[axis][n];
        if (offsets && c.weight[n] != 0) add_together(offsets + lattice_of(s, set.picture) + 4 * c.at[n], c.weight[n], moving);
      }
    }
    for (int axis = 0; axis < 3; axis++) {
      atomicAdd(rays + k / set.samples * 6 + axis, g[axis]);
      atomicAdd(rays + k / set.samples * 6 + 3 + axis, g[axis] * set.depth[k]);
    }
  }
}

}  // namespace cuda
}  // namespace nofa
