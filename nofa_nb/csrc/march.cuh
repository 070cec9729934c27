// Along the rays of a block: from densities to weights, to new depths, to what is seen, and back. EG3D's rules; see
// march.h for the same on a CPU. What needs exponentials is shared between threads by samples; running sums and products
// are one thread's work for each ray.
#pragma once
#include "gpu.cuh"

namespace nofa {
namespace cuda {

// What rays need while they are summed up: for each ray, arrays of n samples.
struct March {
  int n;  // room of an array, one more than there are samples
  float *depth, *density, *sorted, *dense, *alpha, *passed, *weight, *share;
  int* rank;
  static constexpr int kArrays = 9;
  __host__ __device__ static int64_t room(int samples) { return samples + 1; }
  __device__ March(float* at, int rays, int samples) : n((int)room(samples)) {
    float** all[] = {&depth, &density, &sorted, &dense, &alpha, &passed, &weight, &share};
    for (float** array : all) *array = at, at += rays * n;
    rank = (int*)at;
  }
};

// What the field said: a row of `stride` numbers for each sample, the features (before they are stretched), then the
// density. First all coarse samples, ray by ray, then all fine ones.
struct Said {
  float* at;
  int stride, features, coarse, fine, rays;
  __device__ float* row(int64_t k) const { return at + k * stride; }
  __device__ float* fine_rows() const { return row((int64_t)rays * coarse); }
  __device__ float* sample(int ray, int i) const {
    return i < coarse ? row((int64_t)ray * coarse + i) : fine_rows() + ((int64_t)ray * fine + i - coarse) * stride;
  }
};

constexpr float kStretch = 1.002f, kShift = 0.001f;  // EG3D's colours reach a little over [0, 1]

__device__ inline float middle(const float* density, int i) { return softplus((density[i] + density[i + 1]) * 0.5f - 1.f); }

// Opacities of the n - 1 intervals between n ascending depths of each ray.
__device__ inline void opacities(const March& m, int rays, int n, const float* density, const float* depth) {
  for (EACH(k, rays * (n - 1))) {
    int at = k / (n - 1) * m.n + k % (n - 1);
    m.alpha[at] = 1.f - exp_of(-middle(density + at, 0) * (depth[at + 1] - depth[at]));
  }
}

// One ray's weights, and what passed before each; returns their sum.
__device__ inline float weights(const March& m, int ray, int n) {
  const float* alpha = m.alpha + ray * m.n;
  double light = 1, total = 0;
  for (int i = 0; i < n - 1; i++) {
    m.passed[ray * m.n + i] = (float)light;
    float weight = alpha[i] * (float)light;
    m.weight[ray * m.n + i] = weight;
    total += weight;
    light *= 1.f - alpha[i] + 1e-10f;
  }
  return (float)total;
}

// New depths (rays, fine): widens the peaks, lifts the floor, and inverts the cumulative distribution at `numbers`.
// `depth` and `said` are those of the coarse pass.
__device__ inline void importance(const March& m, const Said& said, const float* depth, const float* numbers, float* out) {
  int rays = said.rays, n = said.coarse, fine = said.fine;
  for (EACH(k, rays * n)) m.depth[k / n * m.n + k % n] = depth[k], m.density[k / n * m.n + k % n] = said.row(k)[said.features];
  __syncthreads();
  opacities(m, rays, n, m.density, m.depth);
  __syncthreads();
  int bins = n - 3;
  for (EACH(ray, rays)) {
    weights(m, ray, n);
    float *weight = m.weight + ray * m.n, *total = m.share + ray * m.n;
    double sum = 0, running = 0;
    for (int i = 0; i < bins; i++) {
      total[i + 1] = (fmaxf(weight[i], weight[i + 1]) + fmaxf(weight[i + 1], weight[i + 2])) * 0.5f + 0.01f + 1e-5f;
      sum += total[i + 1];
    }
    total[0] = 0;
    for (int i = 0; i < bins; i++) total[i + 1] = (float)(running += total[i + 1] / (float)sum);
  }
  __syncthreads();
  for (EACH(k, rays * fine)) {
    const float *total = m.share + k / fine * m.n, *at = m.depth + k / fine * m.n;
    float wanted = numbers[k];
    int found = 0, end = bins + 1;  // how many of the totals are at most `wanted`
    while (found < end) {
      int half = (found + end) / 2;
      if (total[half] <= wanted) found = half + 1;
      else end = half;
    }
    int low = max(found - 1, 0), high = min(found, bins);
    float held = total[high] - total[low], part = (wanted - total[low]) / (held < 1e-5f ? 1.f : held);
    float from = (at[low] + at[low + 1]) * 0.5f, to = (at[high] + at[high + 1]) * 0.5f;
    out[k] = from + part * (to - from);
  }
}

// Place of each depth in ascending order, equal ones in the order they come, and everything in that order.
__device__ inline void sort(const March& m, int rays, int n) {
  for (EACH(k, rays * n)) {
    int ray = k / n * m.n, i = k % n, rank = 0;
    float mine = m.depth[ray + i];
    for (int j = 0; j < n; j++) rank += m.depth[ray + j] < mine || (m.depth[ray + j] == mine && j < i);
    m.rank[ray + i] = rank;
    m.sorted[ray + rank] = mine, m.dense[ray + rank] = m.density[ray + i];
  }
}

// One ray's shares, half of each neighbouring interval's weight, and the sum of depths times shares.
__device__ inline double shares(const March& m, int ray, int n) {
  double depth = 0;
  float before = 0;
  for (int i = 0; i < n; i++) {
    float after = i < n - 1 ? m.weight[ray * m.n + i] : 0.f;
    m.share[ray * m.n + i] = (before + after) * 0.5f;
    depth += m.share[ray * m.n + i] * m.sorted[ray * m.n + i];
    before = after;
  }
  return depth;
}

// Depths and densities of all samples.
__device__ inline void collect(const March& m, const Said& said, const float* coarse, const float* fine) {
  int n = said.coarse + said.fine;
  for (EACH(k, said.rays * n)) {
    int ray = k / n, i = k % n;
    m.depth[ray * m.n + i] = i < said.coarse ? coarse[ray * said.coarse + i] : fine[ray * said.fine + i - said.coarse];
    m.density[ray * m.n + i] = said.sample(ray, i)[said.features];
  }
}

// What the rays see.
__device__ inline void see(const March& m, const Said& said, bool white, int64_t first, const Seen& seen) {
  int rays = said.rays, n = said.coarse + said.fine;
  sort(m, rays, n);
  __syncthreads();
  opacities(m, rays, n, m.dense, m.sorted);
  __syncthreads();
  for (EACH(ray, rays)) {
    float total = weights(m, ray, n);
    double depth = shares(m, ray, n);
    seen.weight[first + ray] = total;
    seen.depth[first + ray] = total > 0 ? (float)depth / total : INFINITY;
  }
  __syncthreads();
  for (EACH(k, rays * said.features)) {
    int ray = k / said.features, c = k % said.features;
    float sum = 0, all = 0;
    for (int i = 0; i < n; i++) {
      float share = m.share[ray * m.n + m.rank[ray * m.n + i]];
      sum += share * said.sample(ray, i)[c], all += share;
    }
    float value = kStretch * sum - kShift * all + (white ? 1.f - all : 0.f);
    seen.features[(first + ray) * said.features + c] = value * 2.f - 1.f;
  }
}

// Given gradients of what rays see, those of what the field said, in its place. `given`: of all rays.
struct Given { const float *features, *depth, *weight; };

__device__ inline void see_back(const March& m, const Said& said, bool white, int64_t first, const Given& given) {
  int rays = said.rays, n = said.coarse + said.fine;
  sort(m, rays, n);
  __syncthreads();
  opacities(m, rays, n, m.dense, m.sorted);
  __syncthreads();
  float *total = m.density, *at = m.density + rays;  // of each ray; the densities are in `dense` now
  for (EACH(ray, rays)) {
    float sum = weights(m, ray, n);
    double depth = shares(m, ray, n);
    total[ray] = sum, at[ray] = sum > 0 ? (float)depth / sum : 0.f;
  }
  __syncthreads();
  float* gradient = m.weight;  // of the shares, ascending
  for (EACH(k, rays * n)) {
    int ray = k / n, place = ray * m.n + m.rank[ray * m.n + k % n];
    const float* of = given.features + (first + ray) * said.features;
    float *row = said.row(k), share = m.share[place] * kStretch, sum = 0;
    for (int c = 0; c < said.features; c++) {
      float value = row[c], g = 2 * of[c];
      sum += g * (value * kStretch - kShift);
      row[c] = g * share * value * (1.f - value);
    }
    gradient[place] = sum + (total[ray] > 0 ? given.depth[first + ray] / total[ray] * m.sorted[place] : 0.f);
  }
  __syncthreads();
  for (EACH(ray, rays)) {
    float sum = given.weight[first + ray], behind = 0;  // to each interval's weight, then to its opacity
    if (total[ray] > 0) sum -= given.depth[first + ray] / total[ray] * at[ray];
    if (white)
      for (int c = 0; c < said.features; c++) sum -= 2 * given.features[(first + ray) * said.features + c];
    for (int i = n - 2; i >= 0; i--) {
      int k = ray * m.n + i;
      float g = (gradient[k] + gradient[k + 1]) * 0.5f + sum;
      m.share[k] = m.passed[k] * (g - behind);
      behind = g * m.alpha[k] + (1.f - m.alpha[k] + 1e-10f) * behind;
    }
  }
  __syncthreads();
  for (EACH(k, rays * (n - 1))) {
    int i = k / (n - 1) * m.n + k % (n - 1);
    float slope = (m.sorted[i + 1] - m.sorted[i]) * (1.f - m.alpha[i]) * slope_of_softplus(middle(m.dense + i, 0)) * 0.5f;
    m.share[i] *= slope;
  }
  __syncthreads();
  for (EACH(k, rays * n)) {
    int ray = k / n * m.n, rank = m.rank[ray + k % n];
    float before = rank ? m.share[ray + rank - 1] : 0.f, after = rank < n - 1 ? m.share[ray + rank] : 0.f;
    said.row(k)[said.features] = before + after;
  }
}

}  // namespace cuda
}  // namespace nofa
