// Tensors as the renderers take them. Shapes are checked by their caller, nofa_nb/ops/render.py. Define NOFA_DEVICE first.
#pragma once
#include <ATen/ATen.h>
#include <torch/library.h>

#include "scene.h"

namespace {

using at::Tensor;
using Tensors = std::vector<Tensor>;
using Optional = std::optional<Tensor>;

const float* data(const Tensor& t) {
  TORCH_CHECK(t.device().type() == NOFA_DEVICE && t.scalar_type() == at::kFloat && t.is_contiguous(), "the renderer needs dense float32 tensors on one device");
  return t.const_data_ptr<float>();
}

float* room(const Tensor& t) { return t.defined() ? t.mutable_data_ptr<float>() : nullptr; }

// What both passes share; `planes` are packed, `offsets` (b, n, n, n, 4).
nofa::Scene scene_of(const Tensor& planes, int64_t channels, const Tensors& weights, const Tensors& biases, const Tensor& origins,
                     const Tensor& directions, const Tensor& depths, const Optional& offsets, at::IntArrayRef axes, double box, bool white) {
  nofa::Scene s = {};
  s.pictures = origins.size(0), s.rays = origins.size(1), s.coarse = depths.size(2);
  s.channels = channels, s.height = planes.size(2), s.width = planes.size(3), s.padded = planes.size(4);
  s.layers = weights.size(), s.sizes[0] = channels;
  TORCH_CHECK(s.layers <= nofa::kMaxLayers && axes.size() == 6, "at most ", nofa::kMaxLayers, " layers and six axes");
  for (int l = 0; l < s.layers; l++) s.weight[l] = data(weights[l]), s.bias[l] = data(biases[l]), s.sizes[l + 1] = weights[l].size(0);
  for (int i = 0; i < 6; i++) s.axes[i] = axes[i];
  s.planes = data(planes), s.origins = data(origins), s.directions = data(directions), s.depths = data(depths);
  if (offsets) s.offsets = data(*offsets), s.lattice = offsets->size(1);
  s.box = box, s.white = white;
  return s;
}

}  // namespace
