// The renderer on a GPU. A block takes a few rays from beginning to end: positions, planes (field.cuh), decoder (mlp.cuh),
// sums along the ray (march.cuh). What the decoder says of the rays' samples waits in a piece of device memory of the
// block's own, small enough to stay in the cache; everything else stays in the block. Backward computes all of that again.
#include "render_cuda.cuh"

#include "field.cuh"
#include "march.cuh"
#include "mlp.cuh"

namespace nofa {
namespace cuda {
namespace {

// A block's memory, cut into arrays; without memory it only counts.
struct Room {
  float* next;
  int64_t used;
  Net net, gradient;
  Taps taps;
  float *x, *hidden[2], *back[2];  // (channels, stride), (width, stride); backward: gradients on their way
  float *product, *sums;           // (12, tile), (rays, 6)
  float *fine, *march;             // depths of the fine pass; march lies where the tiles' arrays lie
  int stride;

  __host__ __device__ float* take(int64_t n) {
    float* taken = next;
    n = up(n, 4), used += n;
    if (next) next += n;
    return taken;
  }

  __host__ __device__ Room(const Scene& s, int tile, int rays, bool backward, bool points, float* memory) : next(memory), used(0), stride(tile + 4) {
    int widest = width(s, 0);
    for (int l = 0; l < s.layers; l++) {
      int in = width(s, l), out = width(s, l + 1), size = in * out;
      net.forward[l] = take(size), net.bias[l] = take(out);
      net.backward[l] = backward ? take(size) : nullptr;
      gradient.forward[l] = nullptr;
      gradient.backward[l] = backward ? take(size) : nullptr, gradient.bias[l] = backward ? take(out) : nullptr;
      widest = in > widest ? in : widest;
    }
    int last = width(s, s.layers);
    fine = take(backward ? 0 : rays * s.fine);
    sums = take(backward ? rays * 6 : 0);
    float* here = next;
    int64_t before = used;
    march = take(March::kArrays * rays * March::room(s.samples()));
    int64_t after = used;
    next = here, used = before;
    taps.at = (int*)take(kTaps * tile), taps.weight = take(kTaps * tile);
    product = take(points ? kTaps * tile : 0);
    x = take((int64_t)width(s, 0) * stride);
    for (int l = 0; l < 2; l++) hidden[l] = take(l + 1 < s.layers ? (int64_t)width(s, l + 1) * stride : 0);
    for (float*& b : back) b = take(backward ? (int64_t)(widest > last ? widest : last) * stride : 0);
    used = used > after ? used : after;
  }
};

// The field at the samples `from` to from + tile of a set: features, hidden layers, and in `rows` what the decoder says.
__device__ void evaluate_tile(const Scene& s, const Room& room, const Samples& set, int from, int tile, const Said& said, float* rows) {
  find_taps(s, set, from, tile, room.taps);
  __syncthreads();
  gather(s, set.picture, room.taps, tile, room.x, room.stride);
  __syncthreads();
  const float* x = room.x;
  int last = s.layers - 1;
  for (int l = 0; l < last; l++) {
    layer<End::softplus>(room.net.forward[l], room.net.bias[l], s.sizes[l], width(s, l + 1), x, room.stride, tile, {room.hidden[l], room.stride, nullptr, 0, 0});
    __syncthreads();
    x = room.hidden[l];
  }
  if (!rows) return;
  layer<End::out>(room.net.forward[last], room.net.bias[last], s.sizes[last], width(s, last + 1), x, room.stride, tile,
                  {rows + (int64_t)from * said.stride, 0, nullptr, said.features, set.total() - from});
  __syncthreads();
}

// Some rays of one picture, counted through all pictures.
struct Group { int64_t picture, first; int count; };

__host__ __device__ int64_t groups(const Scene& s, int rays) { return s.pictures * ((s.rays + rays - 1) / rays); }

__device__ Group group_of(const Scene& s, int64_t number, int rays) {
  int64_t of_picture = (s.rays + rays - 1) / rays, picture = number / of_picture, first = number % of_picture * rays, left = s.rays - first;
  return {picture, picture * s.rays + first, (int)(left < rays ? left : rays)};
}

__device__ Said said_of(const Scene& s, float* scratch, int most, int rays) {
  int stride = width(s, s.layers);
  return {scratch + (int64_t)blockIdx.x * most * s.samples() * stride, stride, s.features(), s.coarse, s.fine, rays};
}

__global__ void __launch_bounds__(kThreads, 2) render_kernel(Scene s, Seen seen, float* scratch, Plan plan) {
  NOFA_SHARED(memory);
  Room room(s, plan.tile, plan.rays, false, false, memory);
  load_net(s, room.net);
  March m(room.march, plan.rays, s.samples());
  for (int64_t number = blockIdx.x; number < groups(s, plan.rays); number += gridDim.x) {
    Group g = group_of(s, number, plan.rays);
    Said said = said_of(s, scratch, plan.rays, g.count);
    const float* coarse = s.depths + g.first * s.coarse;
    __syncthreads();
    Samples set = {g.picture, g.first, g.count, s.coarse, coarse};
    for (int from = 0; from < set.total(); from += plan.tile) evaluate_tile(s, room, set, from, plan.tile, said, said.at);
    if (s.fine) {
      importance(m, said, coarse, s.numbers + g.first * s.fine, room.fine);
      __syncthreads();
      set.samples = s.fine, set.depth = room.fine;
      for (int from = 0; from < set.total(); from += plan.tile) evaluate_tile(s, room, set, from, plan.tile, said, said.fine_rows());
      if (seen.fine)
        for (EACH(k, g.count * s.fine)) seen.fine[g.first * s.fine + k] = room.fine[k];
    }
    collect(m, said, coarse, room.fine);
    __syncthreads();
    see(m, said, s.white, g.first, seen);
  }
}

// Through the decoder, from what it said to the looked-up features; returns their gradient.
__device__ const float* decoder_back(const Scene& s, const Room& room, const Samples& set, int from, int tile, const Said& said, bool to_decoder) {
  float *g = room.back[0], *next = room.back[1];
  for (EACH(k, tile * said.stride)) {
    int i = k / said.stride, row = k % said.stride;
    g[row * room.stride + i] = from + i < set.total() ? said.row(from + i)[row] : 0.f;
  }
  __syncthreads();
  for (int l = s.layers - 1; l >= 0; l--) {
    const float* x = l ? room.hidden[l - 1] : room.x;
    int rows = width(s, l + 1), columns = width(s, l);
    if (to_decoder) outer(g, rows, x, columns, room.stride, tile, room.gradient.backward[l], room.gradient.bias[l]);
    if (l) layer<End::slope>(room.net.backward[l], nullptr, s.sizes[l + 1], columns, g, room.stride, tile, {next, room.stride, x, 0, 0});
    else layer<End::linear>(room.net.backward[l], nullptr, s.sizes[l + 1], columns, g, room.stride, tile, {next, room.stride, nullptr, 0, 0});
    __syncthreads();
    float* spare = g;
    g = next, next = spare;
  }
  return g;
}

__device__ bool wants_points(const Wanted& w) { return w.to.offsets || w.origins; }

__global__ void __launch_bounds__(kThreads, 2) render_back_kernel(Scene s, Wanted wanted, float* scratch, Plan plan) {
  NOFA_SHARED(memory);
  bool points = wants_points(wanted), to_decoder = wanted.to.weight[0];
  Room room(s, plan.tile, plan.rays, true, true, memory);
  load_net(s, room.net);
  for (int l = 0; l < s.layers; l++) {
    for (EACH(k, width(s, l) * width(s, l + 1))) room.gradient.backward[l][k] = 0;
    for (EACH(k, width(s, l + 1))) room.gradient.bias[l][k] = 0;
  }
  March m(room.march, plan.rays, s.samples());
  for (int64_t number = blockIdx.x; number < groups(s, plan.rays); number += gridDim.x) {
    Group g = group_of(s, number, plan.rays);
    Said said = said_of(s, scratch, plan.rays, g.count);
    Samples set = {g.picture, g.first, g.count, s.coarse, s.depths + g.first * s.coarse};
    __syncthreads();
    for (int from = 0; from < set.total(); from += plan.tile) evaluate_tile(s, room, set, from, plan.tile, said, said.at);
    collect(m, said, set.depth, nullptr);
    for (EACH(k, g.count * 6)) room.sums[k] = 0;
    __syncthreads();
    see_back(m, said, s.white, g.first, {wanted.features, wanted.depth, wanted.weight});
    __syncthreads();
    for (int from = 0; from < set.total(); from += plan.tile) {
      evaluate_tile(s, room, set, from, plan.tile, said, nullptr);
      const float* x = decoder_back(s, room, set, from, plan.tile, said, to_decoder);
      if (wanted.to.planes) scatter(s, g.picture, room.taps, plan.tile, x, room.stride, wanted.to.planes);
      if (points) tap_products(s, g.picture, room.taps, plan.tile, x, room.stride, room.product);
      __syncthreads();
      if (points) points_back(s, set, from, plan.tile, room.product, wanted.to.offsets, room.sums);
      __syncthreads();
    }
    if (wanted.origins)
      for (EACH(k, g.count * 3)) {
        wanted.origins[3 * g.first + k] = room.sums[k / 3 * 6 + k % 3];
        wanted.directions[3 * g.first + k] = room.sums[k / 3 * 6 + 3 + k % 3];
      }
  }
  if (to_decoder) add_net(s, room.gradient, wanted.to);
}

__global__ void find_infinite_kernel(Arrays arrays, int* worst) {
  const float* x = arrays.at[blockIdx.y];
  bool bad = false;
  for (int64_t i = blockIdx.x * (int64_t)kThreads + threadIdx.x; i < arrays.size[blockIdx.y]; i += (int64_t)gridDim.x * kThreads) bad |= !isfinite(x[i]);
  if (bad) atomicMin(worst, (int)blockIdx.y);
}

// ---- how a call is spread over the GPU

struct Limits { int processors, of_block, of_processor; };  // bytes of memory that blocks share

#ifdef NOFA_EMULATED
Limits limits() { return {2, 96 << 10, 100 << 10}; }
#else
int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, which, device);
  return value;
}

Limits limits() {
  return {attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin), attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor)};
}
#endif

constexpr int kReserved = 1024;  // bytes of each block that the system takes

// The part of the tiles' places that samples fill.
double filled(const Scene& s, int tile, int rays) {
  double used = (double)rays * s.samples(), places = up((int64_t)rays * s.coarse, tile) + up((int64_t)rays * s.fine, tile);
  return used / places;
}

}  // namespace

// The largest tile of which two blocks fit into a processor's memory, else the largest that fits; then as many rays as
// fill it best, but few enough that all processors have work.
Plan plan(const Scene& s, bool backward) {
  Limits most = limits();
  for (int each = 2; each; each--)
    for (int tile = 128; tile >= 16; tile /= 2) {
      int64_t enough = s.pictures * s.rays / (most.processors * each);
      int rays = 1, limit = enough < 1 ? 1 : enough > 8 ? 8 : (int)enough;
      for (int r = 1; r <= limit; r++)
        if (filled(s, tile, r) >= filled(s, tile, rays)) rays = r;
      for (;; rays /= 2) {
        int64_t bytes = Room(s, tile, rays, backward, backward, nullptr).used * sizeof(float);
        if (bytes + kReserved <= most.of_block && each * (bytes + kReserved) <= most.of_processor) {
          int64_t blocks = groups(s, rays) < most.processors * each ? groups(s, rays) : most.processors * each;
          return {tile, rays, (int)blocks, bytes, blocks * rays * s.samples() * width(s, s.layers)};
        }
        if (rays == 1) break;
      }
    }
  return {};
}

void render(const Scene& s, const Seen& seen, float* scratch, const Plan& p, void* stream) {
  NOFA_LAUNCH(render_kernel, p.blocks, kThreads, p.shared, (cudaStream_t)stream, s, seen, scratch, p);
}

void render_back(const Scene& s, const Wanted& wanted, float* scratch, const Plan& p, void* stream) {
  NOFA_LAUNCH(render_back_kernel, p.blocks, kThreads, p.shared, (cudaStream_t)stream, s, wanted, scratch, p);
}

void find_infinite(const Arrays& arrays, int* worst, void* stream) {
  int64_t most = 1;
  for (int i = 0; i < arrays.count; i++) most = arrays.size[i] > most ? arrays.size[i] : most;
  int64_t blocks = (most + 8 * kThreads - 1) / (8 * kThreads);
  NOFA_LAUNCH(find_infinite_kernel, dim3((unsigned)(blocks < 1024 ? blocks : 1024), arrays.count), kThreads, 0, (cudaStream_t)stream, arrays, worst);
}

}  // namespace cuda
}  // namespace nofa
