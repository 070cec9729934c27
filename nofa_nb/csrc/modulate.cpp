// What a StyleGAN layer does around its convolution, in one pass over memory each way. Pictures lie channels-last: (b, pixels, c) here.
// Shapes and types are checked by their caller, nofa_nb/ops/modulate.py.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

// Compiled once for each instruction set; the loader picks one.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define EACH_CPU __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#define EACH_CPU
#endif
#define INLINE inline __attribute__((always_inline))
#define ALONE __restrict__  // no other pointer leads there: without this promise the loops are not vectorised

namespace {

using at::Tensor;

INLINE float wide(float x) { return x; }
INLINE float wide(uint16_t x) {  // bfloat16
  uint32_t bits = uint32_t(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
INLINE void put(float* to, float x) { *to = x; }
INLINE void put(uint16_t* to, float x) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  *to = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

INLINE float choose(float x, float above, float below) {  // by the sign of x, with masks: a branch would keep loops from being vectorised
  int32_t bits, a, b;
  std::memcpy(&bits, &x, 4), std::memcpy(&a, &above, 4), std::memcpy(&b, &below, 4);
  int32_t negative = (bits - 1) >> 31;  // all ones for -0, +0 and below
  int32_t found = (a & ~negative) | (b & negative);
  float y;
  std::memcpy(&y, &found, 4);
  return y;
}

// y = x * s
template <class T> INLINE void scale(const T* ALONE x, const float* ALONE s, int64_t pixels, int64_t c, T* ALONE y) {
  for (int64_t p = 0; p < pixels; p++, x += c, y += c)
    for (int64_t i = 0; i < c; i++) put(y + i, wide(x[i]) * s[i]);
}

// gx = gy * s, gs = sum of gy * x
template <class T>
INLINE void scale_back(const T* ALONE gy, const T* ALONE x, const float* ALONE s, int64_t pixels, int64_t c, T* ALONE gx, float* ALONE gs) {
  for (int64_t p = 0; p < pixels; p++, x += c, gy += c, gx += c)
    for (int64_t i = 0; i < c; i++) {
      float g = wide(gy[i]);
      put(gx + i, g * s[i]);
      gs[i] += g * wide(x[i]);
    }
}

// y = gain * lrelu(x * s + strength * noise + bias)
template <class T>
INLINE void act(const T* ALONE x, const float* ALONE s, const float* ALONE noise, float strength, const float* ALONE bias, float slope, float gain, int64_t pixels,
                int64_t c, T* ALONE y) {
  float low = slope * gain;
  for (int64_t p = 0; p < pixels; p++, x += c, y += c) {
    float n = noise ? strength * noise[p] : 0.f;
    for (int64_t i = 0; i < c; i++) {
      float v = wide(x[i]) * s[i] + (n + bias[i]);
      float up = gain * v, down = low * v;  // both, so that there is no branch
      put(y + i, up > down ? up : down);
    }
  }
}

// From gy: gx, and sums for s, bias and the strength of the noise (one for each channel). The sign of y is the sign before the activation.
template <class T>
INLINE void act_back(const T* ALONE gy, const T* ALONE x, const T* ALONE y, const float* ALONE s, const float* ALONE noise, float slope, float gain,
                     int64_t pixels, int64_t c, T* ALONE gx, float* ALONE gs, float* ALONE gbias, float* ALONE gstrength) {
  float low = slope * gain;
  for (int64_t p = 0; p < pixels; p++, x += c, y += c, gy += c, gx += c) {
    float n = noise ? noise[p] : 0.f;
#pragma GCC ivdep
    for (int64_t i = 0; i < c; i++) {
      float t = wide(gy[i]) * choose(wide(y[i]), gain, low);
      put(gx + i, t * s[i]);
      gs[i] += t * wide(x[i]);
      gbias[i] += t;
      gstrength[i] += t * n;
    }
  }
}

EACH_CPU void scale_f(const float* x, const float* s, int64_t p, int64_t c, float* y) { scale(x, s, p, c, y); }
EACH_CPU void scale_h(const uint16_t* x, const float* s, int64_t p, int64_t c, uint16_t* y) { scale(x, s, p, c, y); }
EACH_CPU void scale_back_f(const float* g, const float* x, const float* s, int64_t p, int64_t c, float* gx, float* gs) {
  scale_back(g, x, s, p, c, gx, gs);
}
EACH_CPU void scale_back_h(const uint16_t* g, const uint16_t* x, const float* s, int64_t p, int64_t c, uint16_t* gx, float* gs) {
  scale_back(g, x, s, p, c, gx, gs);
}
EACH_CPU void act_f(const float* x, const float* s, const float* n, float a, const float* b, float slope, float gain, int64_t p, int64_t c, float* y) {
  act(x, s, n, a, b, slope, gain, p, c, y);
}
EACH_CPU void act_h(const uint16_t* x, const float* s, const float* n, float a, const float* b, float slope, float gain, int64_t p, int64_t c,
                    uint16_t* y) {
  act(x, s, n, a, b, slope, gain, p, c, y);
}
EACH_CPU void act_back_f(const float* g, const float* x, const float* y, const float* s, const float* n, float slope, float gain,
                         int64_t p, int64_t c, float* gx, float* gs, float* gb, float* gn) {
  act_back(g, x, y, s, n, slope, gain, p, c, gx, gs, gb, gn);
}
EACH_CPU void act_back_h(const uint16_t* g, const uint16_t* x, const uint16_t* y, const float* s, const float* n, float slope,
                         float gain, int64_t p, int64_t c, uint16_t* gx, float* gs, float* gb, float* gn) {
  act_back(g, x, y, s, n, slope, gain, p, c, gx, gs, gb, gn);
}

// Picture by picture, shared among threads; each picture's sums are made by one thread, in the same order whatever their number.
template <class F> void each_picture(int64_t pictures, F work) {
  int64_t n = std::min<int64_t>(at::get_num_threads(), pictures);
  std::vector<std::thread> others;
  for (int64_t t = 1; t < n; t++) others.emplace_back([=] { for (int64_t b = t; b < pictures; b += n) work(b); });
  for (int64_t b = 0; b < pictures; b += n) work(b);
  for (auto& t : others) t.join();
}

bool half(const Tensor& x) { return x.scalar_type() == at::kBFloat16; }
const float* floats(const Tensor& t) { return t.const_data_ptr<float>(); }
template <class T> const T* in(const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); }
template <class T> T* out(const Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); }

Tensor modulate(const Tensor& x, const Tensor& s) {
  int64_t b = x.size(0), c = x.size(1), p = x.size(2) * x.size(3);
  Tensor y = at::empty_like(x);
  each_picture(b, [&](int64_t k) {
    int64_t at = k * p * c;
    if (half(x)) scale_h(in<uint16_t>(x) + at, floats(s) + k * c, p, c, out<uint16_t>(y) + at);
    else scale_f(in<float>(x) + at, floats(s) + k * c, p, c, out<float>(y) + at);
  });
  return y;
}

std::tuple<Tensor, Tensor> modulate_back(const Tensor& gy, const Tensor& x, const Tensor& s) {
  int64_t b = x.size(0), c = x.size(1), p = x.size(2) * x.size(3);
  Tensor gx = at::empty_like(x), gs = at::zeros_like(s);
  each_picture(b, [&](int64_t k) {
    int64_t at = k * p * c;
    float* sums = out<float>(gs) + k * c;
    if (half(x)) scale_back_h(in<uint16_t>(gy) + at, in<uint16_t>(x) + at, floats(s) + k * c, p, c, out<uint16_t>(gx) + at, sums);
    else scale_back_f(in<float>(gy) + at, in<float>(x) + at, floats(s) + k * c, p, c, out<float>(gx) + at, sums);
  });
  return {gx, gs};
}

// noise: (1 or b, pixels), times strength; an empty tensor for none.
Tensor demodulate(const Tensor& x, const Tensor& s, const Tensor& noise, double strength, const Tensor& bias, double slope, double gain) {
  int64_t b = x.size(0), c = x.size(1), p = x.size(2) * x.size(3), stride = noise.size(0) == 1 ? 0 : p;
  Tensor y = at::empty_like(x);
  each_picture(b, [&](int64_t k) {
    int64_t at = k * p * c;
    const float* n = noise.numel() ? floats(noise) + k * stride : nullptr;
    const float* d = floats(s) + k * c;
    if (half(x)) act_h(in<uint16_t>(x) + at, d, n, strength, floats(bias), slope, gain, p, c, out<uint16_t>(y) + at);
    else act_f(in<float>(x) + at, d, n, strength, floats(bias), slope, gain, p, c, out<float>(y) + at);
  });
  return y;
}

// Gradients of x, and of s, bias and strength for each picture and channel.
std::tuple<Tensor, Tensor, Tensor, Tensor> demodulate_back(const Tensor& gy, const Tensor& x, const Tensor& y, const Tensor& s,
                                                           const Tensor& noise, double slope, double gain) {
  int64_t b = x.size(0), c = x.size(1), p = x.size(2) * x.size(3), stride = noise.size(0) == 1 ? 0 : p;
  Tensor gx = at::empty_like(x), gs = at::zeros_like(s), gb = at::zeros_like(s), ga = at::zeros_like(s);
  each_picture(b, [&](int64_t k) {
    int64_t at = k * p * c;
    const float *d = floats(s) + k * c, *n = noise.numel() ? floats(noise) + k * stride : nullptr;
    float *s1 = out<float>(gs) + k * c, *s2 = out<float>(gb) + k * c, *s3 = out<float>(ga) + k * c;
    if (half(x))
      act_back_h(in<uint16_t>(gy) + at, in<uint16_t>(x) + at, in<uint16_t>(y) + at, d, n, slope, gain, p, c, out<uint16_t>(gx) + at, s1, s2, s3);
    else
      act_back_f(in<float>(gy) + at, in<float>(x) + at, in<float>(y) + at, d, n, slope, gain, p, c, out<float>(gx) + at, s1, s2, s3);
  });
  return {gx, gs, gb, ga};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(nofa_nb, m) {
  m.def("modulate", &modulate);
  m.def("modulate_back", &modulate_back);
  m.def("demodulate", &demodulate);
  m.def("demodulate_back", &demodulate_back);
}
