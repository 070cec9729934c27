// The renderer as PyTorch operators, on a GPU: the same names and arguments as on the CPU, of which `set` and `threads`
// mean nothing here. In a file without CUDA's syntax, as PyTorch's headers take nvcc a minute.
#include "render_cuda.cuh"

#ifdef NOFA_EMULATED
#define NOFA_DEVICE at::kCPU
#define NOFA_ON_DEVICE(tensor) void* stream = nullptr
#define NOFA_CHECK_LAUNCH()
#define NOFA_LIBRARY(m) TORCH_LIBRARY(nofa_nb_emulated, m)
#else
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#define NOFA_DEVICE at::kCUDA
#define NOFA_ON_DEVICE(tensor)                                    \
  c10::cuda::CUDAGuard guard((tensor).device());                  \
  void* stream = c10::cuda::getCurrentCUDAStream().stream()
#define NOFA_LIBRARY(m) TORCH_LIBRARY(nofa_nb_cuda, m)
#define NOFA_CHECK_LAUNCH() C10_CUDA_KERNEL_LAUNCH_CHECK()
#endif
#include <ATen/Context.h>

#include "binding.h"

namespace {

// (b, 3, c, h, w) to (b, 3, h, w, c rounded up to 4). Whether the numbers are finite is found with all others.
std::tuple<Tensor, bool> pack(const Tensor& planes, const std::string&, int64_t) {
  Tensor pixels = planes.permute({0, 1, 3, 4, 2});
  int64_t c = planes.size(2);
  return {c % 4 ? at::constant_pad_nd(pixels, {0, 4 - c % 4}).contiguous() : pixels.contiguous(), true};
}

// Position of a tensor that holds NaN or infinity, -1: none. Waits for the GPU.
int64_t infinite(const Tensors& tensors) {
  TORCH_CHECK(tensors.size() <= nofa::cuda::kMaxArrays, "at most ", nofa::cuda::kMaxArrays, " tensors");
  NOFA_ON_DEVICE(tensors[0]);
  nofa::cuda::Arrays arrays = {};
  for (const Tensor& t : tensors) arrays.at[arrays.count] = data(t), arrays.size[arrays.count++] = t.numel();
  Tensor worst = at::full({1}, arrays.count, tensors[0].options().dtype(at::kInt));
  nofa::cuda::find_infinite(arrays, worst.mutable_data_ptr<int>(), stream);
  NOFA_CHECK_LAUNCH();
  int64_t found = worst.item<int>();
  return found < arrays.count ? found : -1;
}

// Does a decoder of these sizes fit into a block's memory?
bool fits(at::IntArrayRef sizes, int64_t samples, bool gradient) {
  nofa::Scene s = {};
  s.pictures = s.rays = 1, s.coarse = samples, s.layers = sizes.size() - 1;
  TORCH_CHECK(s.layers >= 1 && s.layers <= nofa::kMaxLayers, "one to ", nofa::kMaxLayers, " layers");
  for (size_t l = 0; l < sizes.size(); l++) s.sizes[l] = sizes[l];
  return nofa::cuda::plan(s, gradient).shared;
}

nofa::cuda::Plan plan_of(const nofa::Scene& s, bool backward) {
  nofa::cuda::Plan p = nofa::cuda::plan(s, backward);
  TORCH_CHECK(p.shared, "the decoder or the number of samples is too large for this GPU's shared memory");
  return p;
}

Tensors forward(const Tensor& planes, int64_t channels, const Tensors& weights, const Tensors& biases, const Tensor& origins,
                const Tensor& directions, const Tensor& depths, const Optional& numbers, const Optional& offsets, at::IntArrayRef axes,
                double box, bool white, bool keep, const std::string&, int64_t) {
  NOFA_ON_DEVICE(planes);
  auto s = scene_of(planes, channels, weights, biases, origins, directions, depths, offsets, axes, box, white);
  if (numbers) s.numbers = data(*numbers), s.fine = numbers->size(2);
  auto make = [&](int64_t last) { return at::empty({s.pictures, s.rays, last}, origins.options()); };
  Tensors out = {make(s.features()), make(1), make(1), make(keep ? s.fine : 0)};
  auto p = plan_of(s, false);
  Tensor scratch = at::empty({p.scratch}, origins.options());
  nofa::cuda::render(s, {room(out[0]), room(out[1]), room(out[2]), keep && s.fine ? room(out[3]) : nullptr}, room(scratch), p, stream);
  NOFA_CHECK_LAUNCH();
  return out;
}

// Gradients of planes, offsets, origins, directions (undefined ones are empty), then of weights and biases.
Tensors backward(const Tensor& features, const Tensor& depth, const Tensor& weight, const Tensor& planes, int64_t channels,
                 const Tensors& weights, const Tensors& biases, const Tensor& origins, const Tensor& directions, const Tensor& depths,
                 const Optional& offsets, at::IntArrayRef axes, double box, bool white, bool to_planes, bool to_decoder,
                 bool to_offsets, bool to_rays, const std::string&, int64_t) {
  NOFA_ON_DEVICE(planes);
  if (to_planes || to_decoder || to_offsets) at::globalContext().alertNotDeterministic("render_triplane's gradient on CUDA");
  auto s = scene_of(planes, channels, weights, biases, origins, directions, depths, offsets, axes, box, white);
  auto zeros = [&](bool wanted, const Tensor& like) { return wanted ? at::zeros_like(like) : at::empty({0}, like.options()); };
  Tensors out = {zeros(to_planes, planes), zeros(to_offsets, to_offsets ? *offsets : origins), zeros(to_rays, origins), zeros(to_rays, directions)};
  nofa::cuda::Wanted wanted = {data(features), data(depth), data(weight)};
  if (to_planes) wanted.to.planes = room(out[0]);
  if (to_offsets) wanted.to.offsets = room(out[1]);
  if (to_rays) wanted.origins = room(out[2]), wanted.directions = room(out[3]);
  for (int l = 0; l < s.layers; l++) {
    out.push_back(zeros(to_decoder, weights[l])), out.push_back(zeros(to_decoder, biases[l]));
    if (to_decoder) wanted.to.weight[l] = room(out[4 + 2 * l]), wanted.to.bias[l] = room(out[5 + 2 * l]);
  }
  auto p = plan_of(s, true);
  Tensor scratch = at::empty({p.scratch}, origins.options());
  nofa::cuda::render_back(s, wanted, room(scratch), p, stream);
  NOFA_CHECK_LAUNCH();
  if (to_planes) out[0] = out[0].narrow(4, 0, channels).permute({0, 1, 4, 2, 3}).contiguous();
  return out;
}

}  // namespace

NOFA_LIBRARY(m) {
  m.def("pack(Tensor planes, str set, int threads) -> (Tensor, bool)", &pack);
  m.def("infinite(Tensor[] tensors) -> int", &infinite);
  m.def("fits(int[] sizes, int samples, bool gradient) -> bool", &fits);
  m.def("forward", &forward);
  m.def("backward", &backward);
}
