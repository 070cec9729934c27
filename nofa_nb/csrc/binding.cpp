// The renderer as PyTorch operators, on the CPU.
#include "render_cpu.h"

#define NOFA_DEVICE at::kCPU
#include "binding.h"

namespace {

const nofa::Kernels& kernels(const std::string& name) {
  const nofa::Kernels* found = nofa::find_kernels(name.c_str());
  TORCH_CHECK(found, "this processor has no instruction set \"", name, "\"");
  return *found;
}

std::string best(const std::string& name) { return kernels(name).name; }

// (b, 3, c, h, w) to (b, 3, h, w, c rounded up), and whether all its numbers are finite.
std::tuple<Tensor, bool> pack(const Tensor& planes, const std::string& set, int64_t threads) {
  const auto& k = kernels(set);
  int64_t c = planes.size(2), h = planes.size(3), w = planes.size(4), padded = (c + k.lanes - 1) / k.lanes * k.lanes;
  Tensor pixels = planes.permute({0, 1, 3, 4, 2});
  if (padded == c && pixels.is_contiguous()) return {pixels, nofa::all_finite(data(pixels), pixels.numel())};
  Tensor dense = planes.contiguous(), packed = at::empty({planes.size(0), 3, h, w, padded}, planes.options());
  bool finite = nofa::pack_planes(k, data(dense), planes.size(0) * 3, c, padded, h * w, room(packed), threads);
  return {packed, finite};
}

// Position of the first tensor that holds NaN or infinity, -1: none.
int64_t infinite(const Tensors& tensors) {
  for (size_t i = 0; i < tensors.size(); i++)
    if (!nofa::all_finite(data(tensors[i]), tensors[i].numel())) return i;
  return -1;
}

bool ascending(const Tensor& depths) { return nofa::ascending(data(depths), depths.size(0) * depths.size(1), depths.size(2)); }

Tensors forward(const Tensor& planes, int64_t channels, const Tensors& weights, const Tensors& biases, const Tensor& origins,
                const Tensor& directions, const Tensor& depths, const Optional& numbers, const Optional& offsets, at::IntArrayRef axes,
                double box, bool white, bool keep, const std::string& set, int64_t threads) {
  auto s = scene_of(planes, channels, weights, biases, origins, directions, depths, offsets, axes, box, white);
  if (numbers) s.numbers = data(*numbers), s.fine = numbers->size(2);
  auto make = [&](int64_t last) { return at::empty({s.pictures, s.rays, last}, origins.options()); };
  Tensors out = {make(s.features()), make(1), make(1), make(keep ? s.fine : 0)};
  nofa::render(kernels(set), s, {room(out[0]), room(out[1]), room(out[2]), keep && s.fine ? room(out[3]) : nullptr}, threads);
  return out;
}

// Gradients of planes, offsets, origins, directions (undefined ones are empty), then of weights and biases.
Tensors backward(const Tensor& features, const Tensor& depth, const Tensor& weight, const Tensor& planes, int64_t channels,
                 const Tensors& weights, const Tensors& biases, const Tensor& origins, const Tensor& directions, const Tensor& depths,
                 const Optional& offsets, at::IntArrayRef axes, double box, bool white, bool to_planes, bool to_decoder,
                 bool to_offsets, bool to_rays, const std::string& set, int64_t threads) {
  const auto& k = kernels(set);
  auto s = scene_of(planes, channels, weights, biases, origins, directions, depths, offsets, axes, box, white);
  auto zeros = [&](bool wanted, const Tensor& like) { return wanted ? at::zeros_like(like) : at::empty({0}, like.options()); };
  Tensors out = {zeros(to_planes, planes), zeros(to_offsets, to_offsets ? *offsets : origins), zeros(to_rays, origins), zeros(to_rays, directions)};
  nofa::Gathered gathered = {};
  nofa::Gradients g = {data(features), data(depth), data(weight), nullptr, nullptr, nullptr, nullptr, nullptr};
  if (to_planes) gathered.planes = room(out[0]);
  if (to_offsets) gathered.offsets = room(out[1]);
  if (to_rays) g.origins = room(out[2]), g.directions = room(out[3]);
  for (int l = 0; l < s.layers; l++) {
    out.push_back(zeros(to_decoder, weights[l])), out.push_back(zeros(to_decoder, biases[l]));
    if (to_decoder) gathered.weight[l] = room(out[4 + 2 * l]), gathered.bias[l] = room(out[5 + 2 * l]);
  }
  nofa::render_back(k, s, g, gathered, to_offsets || to_rays, threads);
  if (to_planes) {
    Tensor packed = out[0];
    out[0] = at::empty({s.pictures, 3, channels, s.height, s.width}, planes.options());
    nofa::unpack_planes(k, data(packed), s.pictures * 3, channels, s.padded, (int64_t)s.height * s.width, room(out[0]), threads);
  }
  return out;
}

}  // namespace

TORCH_LIBRARY(nofa_nb, m) {
  m.def("instruction_set(str name) -> str", &best);
  m.def("pack(Tensor planes, str set, int threads) -> (Tensor, bool)", &pack);
  m.def("infinite(Tensor[] tensors) -> int", &infinite);
  m.def("ascending(Tensor depths) -> bool", &ascending);
  m.def("forward", &forward);
  m.def("backward", &backward);
}
