// Blocks of rays to threads. Nothing here depends on how many there are: a block's work is the same wherever it runs,
// and sums over rays are taken in a fixed order.
#include "render_cpu.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace nofa {

const Kernels* find_kernels(const char* name) {
  const Kernels* sets[] = {
#if defined(__x86_64__)
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512vl") ? &kernels_avx512 : nullptr,
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &kernels_avx2 : nullptr,
#endif
      &kernels_plain};
  for (const Kernels* set : sets)
    if (set && (!*name || !std::strcmp(name, set->name))) return set;
  return nullptr;
}

namespace {

// Threads live for one call: starting them takes some 20 microseconds, and a pool would not survive a fork.
template <class Work>
void parallel(int64_t tasks, int threads, Work work) {
  std::atomic<int64_t> next{0};
  auto run = [&](int worker) {
    for (int64_t task; (task = next++) < tasks;) work(task, worker);
  };
  std::vector<std::thread> others;
  others.reserve(std::max(threads, 1));
  try {
    for (int i = 1; i < std::min<int64_t>(threads, tasks); i++) others.emplace_back(run, i);
  } catch (const std::system_error&) {
  }  // no more threads to be had: those that run do the work
  run(0);
  for (std::thread& other : others) other.join();
}

struct Free { void operator()(float* p) const { std::free(p); } };
using Array = std::unique_ptr<float[], Free>;

// In large pages where there are any: fewer faults, fewer misses of their addresses.
Array room(int64_t n) {
  size_t align = n < 1 << 20 ? 64 : 1 << 21, bytes = (sizeof(float) * std::max<int64_t>(n, 1) + align - 1) / align * align;
  void* p = std::aligned_alloc(align, bytes);
  if (!p) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (align > 64) madvise(p, bytes, MADV_HUGEPAGE);
#endif
  return Array(static_cast<float*>(p));
}

Array zeros(int64_t n) {
  Array made = room(n);
  std::fill_n(made.get(), n, 0.f);
  return made;
}

std::vector<Array> scratches(int threads, int64_t tasks, int64_t size) {
  std::vector<Array> made;
  for (int64_t i = 0; i < std::max<int64_t>(1, std::min<int64_t>(threads, tasks)); i++) made.push_back(zeros(size));
  return made;
}

constexpr int kForwardSamples = 192, kBackwardSamples = 192;  // of a block, about: what fits into a core's own cache
constexpr int kSlots = 16;                                    // parts of a wave; fixed, as each sums its own gradients
constexpr int64_t kWaveBytes = 4 << 20;                       // of the samples' gradients between the two steps

int rays_of_block(int wanted, int samples) { return std::max(1, wanted / std::max(samples, 1)); }

Array packed_net(const Kernels& k, const Scene& s) {
  Array net = zeros(k.pack_size(s));
  k.pack(s, net.get());
  return net;
}

constexpr int64_t kPixels = 4096;  // of a task that packs planes

}  // namespace

bool ascending(const float* x, int64_t rows, int n) {
  bool found = true;
  for (int64_t row = 0; row < rows; row++, x += n)
    for (int i = 0; i + 1 < n; i++) found &= x[i] <= x[i + 1];
  return found;
}

bool all_finite(const float* x, int64_t n) {
  float check[16] = {};
  for (int64_t i = 0; i < n; i++) check[i % 16] += x[i] * 0.f;
  return std::all_of(check, check + 16, [](float c) { return c == 0; });
}

bool pack_planes(const Kernels& k, const float* from, int64_t planes, int channels, int padded, int64_t pixels, float* to, int threads) {
  std::atomic<bool> finite{true};
  int64_t parts = (pixels + kPixels - 1) / kPixels;
  parallel(planes * parts, threads, [&](int64_t task, int) {
    int64_t plane = task / parts, first = task % parts * kPixels, last = std::min(first + kPixels, pixels);
    if (!k.to_pixels(from + plane * channels * pixels, channels, padded, pixels, first, last, to + plane * padded * pixels)) finite = false;
  });
  return finite;
}

void unpack_planes(const Kernels& k, const float* from, int64_t planes, int channels, int padded, int64_t pixels, float* to, int threads) {
  int64_t parts = (pixels + kPixels - 1) / kPixels;
  parallel(planes * parts, threads, [&](int64_t task, int) {
    int64_t plane = task / parts, first = task % parts * kPixels, last = std::min(first + kPixels, pixels);
    k.to_channels(from + plane * padded * pixels, channels, padded, pixels, first, last, to + plane * channels * pixels);
  });
}

namespace {

constexpr int64_t kAheadBytes = 256 << 20;  // at most, of planes that have been through the first layer

// Whether it is less work to send all pixels through the decoder's first matrix than to send the samples. A pixel's
// products count by half more, as its outputs go through memory.
bool pays_ahead(const Kernels& k, const Scene& s) {
  if (s.layers < 2) return false;
  double in = s.sizes[0], out = s.sizes[1], samples = (double)s.rays * s.samples(), pixels = (double)kPlanes * s.height * s.width;
  return samples * (in * out + kTaps * (in - out)) > 1.5 * pixels * in * out && 4. * s.pictures * pixels * (out + k.lanes) <= kAheadBytes;
}

// The planes after the first matrix; `s` is then about them.
Array go_ahead(const Kernels& k, const float* net, Scene& s, int threads) {
  int64_t wide = (s.sizes[1] + k.lanes - 1) / k.lanes * k.lanes, pixels = s.pictures * kPlanes * s.height * s.width;
  Array made = room(pixels * wide);
  parallel((pixels + kPixels - 1) / kPixels, threads, [&](int64_t task, int) {
    k.ahead(s, net, task * kPixels, std::min((task + 1) * kPixels, pixels), made.get());
  });
  s.planes = made.get(), s.padded = wide, s.ahead = true;
  return made;
}

}  // namespace

void render(const Kernels& k, const Scene& scene, const Seen& seen, int threads) {
  Scene s = scene;
  Array net = packed_net(k, s);
  Array deep;  // what is linear commutes with bilinear reading and with the planes' mean
  if (pays_ahead(k, s)) deep = go_ahead(k, net.get(), s, threads);
  int rays = rays_of_block(kForwardSamples, std::max(s.coarse, s.fine));
  // A square number of rays is most likely a picture. Its blocks are taken column by column: a strip of it sees a narrow
  // slice of the planes, which stays in the cache, where a row sees nearly all of them.
  int64_t side = std::llround(std::sqrt((double)s.rays)), width = side * side == s.rays ? side : s.rays, height = s.rays / width;
  int64_t across = (width + rays - 1) / rays, tasks = s.pictures * across;
  auto scratch = scratches(threads, tasks, k.forward_scratch(s, rays));
  parallel(tasks, threads, [&](int64_t task, int worker) {
    int64_t column = task % across * rays, count = std::min<int64_t>(rays, width - column);
    for (int64_t row = 0; row < height; row++)
      k.forward(s, net.get(), task / across * s.rays + row * width + column, (int)count, seen, scratch[worker].get());
  });
}

namespace {

// The rays `first` to `last` of all, cut where a picture ends and into pieces of at most `most`.
template <class Work>
void pieces(const Scene& s, int64_t first, int64_t last, int64_t most, Work work) {
  while (first < last) {
    int64_t end = std::min({last, first + most, (first / s.rays + 1) * s.rays});
    work(first, end - first);
    first = end;
  }
}

// Second step of a wave: gradients of the samples to planes and offsets.
void scatter(const Kernels& k, const Scene& s, int64_t first, int64_t last, const Gradients& g, const Gathered& out, int threads) {
  struct Task { int64_t ray, rays; int plane, from, to; };
  std::vector<Task> tasks;
  pieces(s, first, last, s.rays, [&](int64_t ray, int64_t rays) {
    int step = (last - first + s.rays - 1) / s.rays * kPlanes >= threads ? s.padded : k.lanes;
    for (int plane = 0; out.planes && plane < kPlanes; plane++)
      for (int c = 0; c < s.padded; c += step) tasks.push_back({ray, rays, plane, c, c + step});
    if (out.offsets) tasks.push_back({ray, rays, -1, 0, 0});
  });
  parallel(tasks.size(), threads, [&](int64_t i, int) {
    const Task& t = tasks[i];
    int64_t picture = t.ray / s.rays;
    if (t.plane < 0) k.scatter_offsets(s, picture, t.ray, t.rays, first, g, out.offsets);
    else k.scatter_plane(s, picture, t.plane, t.from, t.to, t.ray, t.rays, first, g, out.planes);
  });
}

}  // namespace

// In waves: first the samples' gradients of some rays, by parts of the wave, then their scattering, by planes. Threads
// never add to the same place, and the samples' gradients need little memory.
void render_back(const Kernels& k, const Scene& s, Gradients g, const Gathered& out, bool points, int threads) {
  Array net = packed_net(k, s);
  int64_t total = s.pictures * s.rays, n = s.samples();
  int64_t wave = std::clamp<int64_t>(kWaveBytes / (4 * n * s.padded), 1, total);
  int rays = rays_of_block(kBackwardSamples, (int)n);
  auto scratch = scratches(threads, kSlots, k.backward_scratch(s, rays));
  Array samples, moved, at, slots;
  if (out.planes || points) g.samples = (samples = zeros(wave * n * s.padded)).get();
  if (points) g.moved = (moved = zeros(wave * n * 4)).get(), g.points = (at = zeros(wave * n * 4)).get();
  int64_t slot = out.weight[0] ? k.slot_size(s) : 0;
  if (slot) slots = zeros(kSlots * slot);
  for (int64_t first = 0; first < total; first += wave) {
    int64_t last = std::min(first + wave, total), part = (last - first + kSlots - 1) / kSlots;
    parallel(kSlots, threads, [&](int64_t task, int worker) {
      int64_t from = first + task * part, to = std::min(from + part, last);
      pieces(s, from, to, rays, [&](int64_t ray, int64_t count) {
        k.backward(s, net.get(), ray, (int)count, first, g, slot ? slots.get() + task * slot : nullptr, scratch[worker].get());
      });
    });
    scatter(k, s, first, last, g, out, threads);
  }
  for (int i = 0; slot && i < kSlots; i++) k.unpack_slot(s, slots.get() + i * slot, out.weight, out.bias);
}

}  // namespace nofa
