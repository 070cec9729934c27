// The decoder on a tile of samples, all of it in the block's memory. A thread holds M outputs of 4 samples in registers
// while it runs over the inputs, so that each number that it loads is used several times.
#pragma once
#include "gpu.cuh"

namespace nofa {
namespace cuda {

enum class End { linear, softplus, slope, out };  // what happens to a sum

// Where sums go. linear, softplus, slope: (rows, stride). out: (sample, rows), the decoder's results, in device memory.
struct Target {
  float* to;
  int stride;
  const float* value;  // slope: of the softplus whose slope is wanted, (rows, stride)
  int features, used;  // out: rows before the density's; samples that there are
};

template <End end>
__device__ inline float ended(float sum, int row, int sample, const Target& t) {
  if (end == End::softplus) return softplus(sum);
  if (end == End::slope) return sum * slope_of_softplus(t.value[row * t.stride + sample]);
  if (end == End::out) return row < t.features ? sigmoid(sum) : sum;
  return sum;
}

// Rows `first` to first + M of y = w x + bias for samples 4 group to 4 group + 3. w: (in, rows), x: (in, stride).
template <int M, End end>
__device__ inline void tile_of(const float* w, const float* bias, int in, int rows, int first, int group, const float* x, int stride, const Target& t) {
  float sum[M][4];
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int k = 0; k < 4; k++) sum[m][k] = bias ? bias[first + m] : 0.f;
  for (int i = 0; i < in; i++) {
    float4 v = quad(x + i * stride + 4 * group);
#pragma unroll
    for (int m = 0; m < M; m += 4) {
      float4 a = quad(w + i * rows + first + m);
      float each[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
      for (int j = 0; j < 4; j++) {
        sum[m + j][0] += each[j] * v.x, sum[m + j][1] += each[j] * v.y;
        sum[m + j][2] += each[j] * v.z, sum[m + j][3] += each[j] * v.w;
      }
    }
  }
  if (end == End::out) {
#pragma unroll
    for (int k = 0; k < 4; k++)
#pragma unroll
      for (int m = 0; m < M; m += 4)
        if (4 * group + k < t.used)
          quad(t.to + (int64_t)(4 * group + k) * rows + first + m) =
              make_float4(ended<end>(sum[m][k], first + m, 0, t), ended<end>(sum[m + 1][k], first + m + 1, 0, t),
                          ended<end>(sum[m + 2][k], first + m + 2, 0, t), ended<end>(sum[m + 3][k], first + m + 3, 0, t));
    return;
  }
#pragma unroll
  for (int m = 0; m < M; m++) {
    int row = first + m;
    quad(t.to + row * t.stride + 4 * group) = make_float4(ended<end>(sum[m][0], row, 4 * group, t), ended<end>(sum[m][1], row, 4 * group + 1, t),
                                                          ended<end>(sum[m][2], row, 4 * group + 2, t), ended<end>(sum[m][3], row, 4 * group + 3, t));
  }
}

// One layer; `rows` is a multiple of 4. Tiles of 8 rows need fewer loads, tiles of 4 can occupy more threads.
template <End end>
__device__ inline void layer(const float* w, const float* bias, int in, int rows, const float* x, int stride, int tile, const Target& t) {
  int groups = tile / 4, eights = rows / 8, fours = rows / 4;
  bool large = up((eights + fours % 2) * groups, kThreads) * 2 <= up(fours * groups, kThreads);
  int tiles = large ? eights + fours % 2 : fours;
  for (EACH(k, tiles * groups)) {
    int which = k / groups, group = k % groups;
    if (large && which < eights) tile_of<8, end>(w, bias, in, rows, 8 * which, group, x, stride, t);
    else tile_of<4, end>(w, bias, in, rows, large ? 8 * eights : 4 * which, group, x, stride, t);
  }
}

// dW (rows, columns) += g (rows, stride) x (columns, stride)^T, and the rows' sums; both multiples of 4. One thread owns
// 4 x 4 of dW.
__device__ inline void outer(const float* g, int rows, const float* x, int columns, int stride, int tile, float* w, float* bias) {
  int across = columns / 4;
  for (EACH(k, rows / 4 * across)) {
    int row = k / across * 4, column = k % across * 4;
    float sum[4][4] = {};
    for (int i = 0; i < tile; i += 4) {
      float4 a[4], b[4];
#pragma unroll
      for (int j = 0; j < 4; j++) a[j] = quad(g + (row + j) * stride + i), b[j] = quad(x + (column + j) * stride + i);
#pragma unroll
      for (int m = 0; m < 4; m++)
#pragma unroll
        for (int n = 0; n < 4; n++) sum[m][n] += dot(a[m], b[n]);
    }
#pragma unroll
    for (int m = 0; m < 4; m++) {
      float4& to = quad(w + (row + m) * columns + column);
      to.x += sum[m][0], to.y += sum[m][1], to.z += sum[m][2], to.w += sum[m][3];
    }
  }
  for (EACH(row, rows)) {
    float sum = 0;
    for (int i = 0; i < tile; i++) sum += g[row * stride + i];
    bias[row] += sum;
  }
}

// ---- the decoder in the block's memory; rows and columns are rounded up to multiples of 4, with zeros

struct Net {
  float *forward[kMaxLayers], *backward[kMaxLayers], *bias[kMaxLayers];  // (in, out), (out, in), (out)
};

__host__ __device__ inline int width(const Scene& s, int l) { return (int)up(s.sizes[l], 4); }

// The density moves from the first row of the last layer to its end: the features then begin at an address that vectors like.
__host__ __device__ inline int row_from(const Scene& s, int l, int row) {
  return l + 1 < s.layers ? row : row == s.sizes[l + 1] - 1 ? 0 : row + 1;
}

__device__ inline void load_net(const Scene& s, const Net& net) {
  for (int l = 0; l < s.layers; l++) {
    int in = s.sizes[l], out = s.sizes[l + 1], columns = width(s, l), rows = width(s, l + 1);
    for (EACH(k, columns * rows)) {
      int column = k / rows, row = k % rows;
      float value = column < in && row < out ? s.weight[l][row_from(s, l, row) * in + column] : 0.f;
      net.forward[l][column * rows + row] = value;
      if (net.backward[l]) net.backward[l][row * columns + column] = value;
    }
    for (EACH(row, rows)) net.bias[l][row] = row < out ? s.bias[l][row_from(s, l, row)] : 0.f;
  }
}

// A block's share of the decoder's gradient to everybody's.
__device__ inline void add_net(const Scene& s, const Net& net, const Gathered& to) {
  for (int l = 0; l < s.layers; l++) {
    int in = s.sizes[l], out = s.sizes[l + 1], columns = width(s, l);
    for (EACH(k, in * out)) atomicAdd(to.weight[l] + row_from(s, l, k / in) * in + k % in, net.backward[l][k / in * columns + k % in]);
    for (EACH(row, out)) atomicAdd(to.bias[l] + row_from(s, l, row), net.bias[l][row]);
  }
}

}  // namespace cuda
}  // namespace nofa
