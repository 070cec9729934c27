// The renderer for one instruction set: define LANES and SET (a namespace), choose the set's target, include this.
// Nothing of the standard library is used here: a template of it, compiled for one set, could end up in another's code.

namespace nofa {
namespace SET {

#include "vec.h"

// Cuts a thread's scratch into arrays that begin on cache lines; without scratch it only counts.
struct Cutter {
  float* scratch;
  int64_t used;
  INLINE float* take(int64_t n) {
    float* taken = scratch ? scratch + used : nullptr;
    used += up(n, 16);
    return taken;
  }
};

#include "gather.h"
#include "rows.h"
#include "mlp.h"
#include "march.h"

// Length of a row of samples: whole groups, one line that may be read too far, and an odd number of lines, so that rows spread over the cache's sets.
INLINE int64_t row_length(int64_t samples) { return (((up(samples, kGroup) + 15) / 16 + 1) | 1) * 16; }

INLINE int widest(const Scene& s) {
  int most = 0;
  for (int l = 0; l < s.layers; l++) most = s.sizes[l] > most ? s.sizes[l] : most;
  return (int)up(most, LANES);
}

INLINE const float* planes_of(const Scene& s, int64_t picture) {
  return s.planes + picture * kPlanes * s.height * s.width * s.padded;
}

// ---- the field at samples of a block of rays

struct Block {
  int64_t picture, first;  // ray
  int samples, count;      // of a ray, of all rays
  const float* depth;
};

// For backward: the looked-up features of the group from sample `from` on, (sample, channel) to `across`, (channel, sample) to `x`.
INLINE void look_up(const Scene& s, const Block& b, int from, Taps& taps, float* across, float* x, int64_t xs) {
  Positions p;
  place(s, b.first, b.samples, b.count, b.depth, from, p);
  move(s, b.picture, p);
  for (int plane = 0; plane < kPlanes; plane++) find_taps(s, plane, p, taps);
  gather(planes_of(s, b.picture), s.padded, taps, nullptr, across);
  for (int i = 0; i < kGroup; i += LANES)
    for (int c = 0; c < s.padded; c += LANES) transpose(across + i * s.padded + c, s.padded, x + c * xs + i, xs);
}

INLINE void decode(const Scene& s, const Net& net, const float* x, float* const* hidden, int64_t hs,
                   float* out, int64_t os, int64_t xs) {
  for (int l = 0; l + 1 < s.layers; l++) {
    layer<End::softplus>(net.forward[l], net.bias[l], s.sizes[l], s.sizes[l + 1], x, l ? hs : xs, hidden[l], hs);
    x = hidden[l];
  }
  int l = s.layers - 1, in = s.sizes[l], f = s.features();
  int64_t is = l ? hs : xs;
  layer<End::sigmoid>(net.forward[l], net.bias[l], in, f, x, is, out, os);
  layer<End::linear>(net.forward[l] + (int64_t)f * in, net.bias[l] + f, in, 1, x, is, out + f * os, os);
}

// ---- forward

struct Work {
  Taps* taps;
  float* x[kMaxLayers - 1];  // what layers take, (sample, channel); the last layer's is kept
};

INLINE int64_t inputs(const Scene& s, int l) { return up(s.sizes[l], LANES); }

// Densities of all samples, and what the last layer takes: (sample, channel).
static void evaluate(const Scene& s, const Net& net, const Block& b, Work& w, float* rows, float* density) {
  int last = s.layers - 1;
  Positions p;
  for (int from = 0; from < b.count; from += kGroup) {
    place(s, b.first, b.samples, b.count, b.depth, from, p);
    move(s, b.picture, p);
    for (int plane = 0; plane < kPlanes; plane++) find_taps(s, plane, p, *w.taps);
    float* kept = rows + from * inputs(s, last);
    auto at = [&](int l) { return l == last ? kept : w.x[l]; };
    int l = s.ahead;
    gather(planes_of(s, b.picture), s.padded, *w.taps, s.ahead ? net.base[0] : nullptr, at(l));
    if (s.ahead) activate(at(l), kGroup * inputs(s, l), net.curve);
    for (; l < last; l++) {
      through(net.bands[l], net.base[l], s.sizes[l], s.sizes[l + 1], at(l), inputs(s, l), at(l + 1), inputs(s, l + 1), kGroup);
      activate(at(l + 1), kGroup * inputs(s, l + 1), net.curve);
    }
    for (int i = 0; i < kGroup; i += LANES)
      store(density + from + i, dots(kept + i * inputs(s, last), inputs(s, last), net.density) + net.bias[last][s.features()]);
  }
}

static void ahead(const Scene& s, const float* packed, int64_t first, int64_t last, float* to) {
  Net net = net_of(s, packed);
  int64_t wide = up(outputs(s, 0), LANES);
  through(net.bands[0], nullptr, s.sizes[0], outputs(s, 0), s.planes + first * s.padded, s.padded, to + first * wide, wide, last - first);
}

INLINE void copy(float* to, const float* from, int64_t n) { __builtin_memcpy(to, from, n * sizeof(float)); }

constexpr float kCounts = 1e-9f;  // shares below it change no feature by more than 2e-9: those samples need no colour

struct ForwardRoom {
  int64_t width;  // of a row
  float *coarse_depth, *fine_depth, *coarse_rows, *fine_rows, *coarse_density, *fine_density, *march, *numbers, *total, *edge, *seen, *share;
  const float** row;
  Work work;
  ForwardRoom(const Scene& s, int rays, Cutter& cut) {
    int64_t coarse = up((int64_t)rays * s.coarse, kGroup), fine = up((int64_t)rays * s.fine, kGroup), samples = s.samples() + kTall;
    width = inputs(s, s.layers - 1);
    coarse_depth = cut.take(coarse), fine_depth = cut.take(fine);
    coarse_rows = cut.take(coarse * width), fine_rows = cut.take(fine * width);
    coarse_density = cut.take(coarse), fine_density = cut.take(fine);
    march = cut.take(March::kArrays * March::room(s.samples()));
    numbers = cut.take(March::room(s.samples())), total = cut.take(March::room(s.samples())), edge = cut.take(March::room(s.samples()));
    seen = cut.take(up(s.features(), LANES)), share = cut.take(samples);
    row = (const float**)cut.take(samples * (sizeof(float*) / sizeof(float)));
    work.taps = (Taps*)cut.take(sizeof(Taps) / sizeof(float));
    for (int l = 0; l < kMaxLayers - 1; l++) work.x[l] = cut.take(l + 1 < s.layers ? kGroup * inputs(s, l) : 0);
  }
};

INLINE void write_ray(const Scene& s, const Net& net, int64_t ray, March& m, const ForwardRoom& room, const float* coarse, const float* fine, const Seen& seen) {
  int n = s.samples(), f = s.features(), l = s.layers - 1, used = 0;
  float total = find_shares(m, n), shift = 0;
  for (int i = 0; i < n; i++)
    if (m.shares[i] > kCounts) {
      room.row[used] = i < s.coarse ? coarse + i * room.width : fine + (i - s.coarse) * room.width;
      room.share[used++] = m.shares[i];
      shift += m.shares[i];
    }
  for (; used % kTall; used++) room.row[used] = coarse, room.share[used] = 0;
  shade(net.bands[l], net.base[l], s.sizes[l], f, room.row, room.share, used, room.seen);
  for (int c = 0; c < f; c++) {
    float value = kStretch * room.seen[c] - kShift * shift + (s.white ? 1.f - total : 0.f);
    seen.features[ray * f + c] = value * 2.f - 1.f;
  }
  seen.depth[ray] = depth_of(m, n, total);
  seen.weight[ray] = total;
}

static int64_t forward_scratch(const Scene& s, int rays) {
  Cutter cut = {nullptr, 0};
  ForwardRoom room(s, rays, cut);
  return cut.used;
}

static void fine_depths(const Scene& s, int64_t ray, March& m, const ForwardRoom& room, const float* density, float* out) {
  copy(m.density, density, s.coarse);
  copy(m.depth, s.depths + ray * s.coarse, s.coarse);
  copy(room.numbers, s.numbers + ray * s.fine, s.fine);
  interval_weights(m.density, m.depth, s.coarse, m.alpha, m.passed, m.weight);
  importance(m.depth, m.weight, s.coarse, room.numbers, s.fine, out, room.total, room.edge);
}

static void forward(const Scene& s, const float* packed, int64_t first, int rays, const Seen& seen, float* scratch) {
  Cutter cut = {scratch, 0};
  ForwardRoom room(s, rays, cut);
  March m(room.march, s.samples());
  Net net = net_of(s, packed);
  int64_t picture = first / s.rays;
  copy(room.coarse_depth, s.depths + first * s.coarse, (int64_t)rays * s.coarse);
  evaluate(s, net, {picture, first, s.coarse, rays * s.coarse, room.coarse_depth}, room.work, room.coarse_rows, room.coarse_density);
  if (s.fine) {
    for (int r = 0; r < rays; r++) fine_depths(s, first + r, m, room, room.coarse_density + r * s.coarse, room.fine_depth + r * s.fine);
    evaluate(s, net, {picture, first, s.fine, rays * s.fine, room.fine_depth}, room.work, room.fine_rows, room.fine_density);
    if (seen.fine) copy(seen.fine + first * s.fine, room.fine_depth, (int64_t)rays * s.fine);
  }
  for (int r = 0; r < rays; r++) {
    copy(m.depth, room.coarse_depth + r * s.coarse, s.coarse);
    copy(m.density, room.coarse_density + r * s.coarse, s.coarse);
    copy(m.depth + s.coarse, room.fine_depth + r * s.fine, s.fine);
    copy(m.density + s.coarse, room.fine_density + r * s.fine, s.fine);
    write_ray(s, net, first + r, m, room, room.coarse_rows + r * s.coarse * room.width, room.fine_rows + r * s.fine * room.width, seen);
  }
}

// ---- backward: everything of a block of rays again, this time kept until the block is done

struct BackwardRoom {
  int64_t row;
  float *depth, *march, *across, *x, *hidden[2], *turned[2], *out, *to, *back[2], *feature;
  Taps* taps;
  BackwardRoom(const Scene& s, int rays, Cutter& cut) {
    row = row_length((int64_t)rays * s.samples());
    depth = cut.take(row);
    march = cut.take(March::kArrays * March::room(s.samples()));
    across = cut.take(row * s.padded), x = cut.take(row * s.padded);
    int hidden_layers = s.layers - 1;
    for (int l = 0; l < 2; l++) {
      int64_t size = l < hidden_layers ? row * up(s.sizes[l + 1], LANES) : 0;
      hidden[l] = cut.take(size), turned[l] = cut.take(size);
    }
    out = cut.take((s.features() + 1) * row + LANES), to = cut.take((s.features() + 1) * row + LANES);
    for (float*& b : back) b = cut.take(row * widest(s));
    feature = cut.take(s.features());
    taps = (Taps*)cut.take(sizeof(Taps) / sizeof(float));
  }
};

static int64_t backward_scratch(const Scene& s, int rays) {
  Cutter cut = {nullptr, 0};
  BackwardRoom room(s, rays, cut);
  return cut.used;
}

INLINE int64_t slot_layer(const Scene& s, int l) { return (up(s.sizes[l], LANES) + 1) * s.sizes[l + 1]; }

static int64_t slot_size(const Scene& s) {
  int64_t n = 0;
  for (int l = 0; l < s.layers; l++) n += slot_layer(s, l);
  return n;
}

static void unpack_slot(const Scene& s, const float* slot, float* const* weight, float* const* bias) {
  for (int l = 0; l < s.layers; l++) {
    int in = s.sizes[l], out = s.sizes[l + 1];
    int64_t stride = up(in, LANES);
    for (int row = 0; row < out; row++) {
      int from = row_of(s, l, row);
      for (int i = 0; i < in; i++) weight[l][row * in + i] += slot[from * stride + i];
      bias[l][row] += slot[out * stride + from];
    }
    slot += slot_layer(s, l);
  }
}

INLINE void evaluate_and_keep(const Scene& s, const Net& net, const Block& b, BackwardRoom& room) {
  for (int from = 0; from < b.count; from += kGroup) {
    look_up(s, b, from, *room.taps, room.across + (int64_t)from * s.padded, room.x + from, room.row);
    float* hidden[2] = {room.hidden[0] + from, room.hidden[1] + from};
    decode(s, net, room.x + from, hidden, room.row, room.out + from, room.row, room.row);
  }
}

// Gradient of all rays' sums to features before the sigmoid and to densities: `to`.
INLINE void sums_back(const Scene& s, int64_t first, int rays, const Gradients& g, BackwardRoom& room) {
  March m(room.march, s.samples());
  int n = s.samples(), f = s.features();
  for (int r = 0; r < rays; r++) {
    const float *out = room.out + r * n, *given = g.features + (first + r) * f;
    float behind = 0;
    for (int c = 0; c < f; c++) room.feature[c] = 2 * given[c], behind += 2 * given[c];
    copy(m.depth, room.depth + r * n, n);
    copy(m.density, out + f * room.row, n);
    float total = find_shares(m, n), weight = g.weight[first + r] - (s.white ? behind : 0.f);
    march_back(m, n, total, f, room.feature, g.depth[first + r], weight, out, room.to + r * n, room.row);
  }
  int count = rays * n;
  for (int c = 0; c <= f; c++)
    for (int64_t i = count; i < up(count, kGroup); i++) room.to[c * room.row + i] = 0;
}

// Through the decoder; returns the gradient of the looked-up features, (channel, row).
INLINE const float* decoder_back(const Scene& s, const Net& net, int count, BackwardRoom& room, float* slot) {
  const float* g = room.to;
  int64_t row = room.row, padded_count = up(count, kGroup);
  if (slot) slot += slot_size(s);
  for (int l = s.layers - 1; l >= 0; l--) {
    int in = s.sizes[l], out = s.sizes[l + 1];
    int64_t stride = up(in, LANES);
    if (slot) {
      slot -= slot_layer(s, l);
      float* x = l ? room.turned[l - 1] : room.across;
      if (l)
        for (int64_t i = 0; i < padded_count; i += LANES)
          for (int c = 0; c < stride; c += LANES) transpose(room.hidden[l - 1] + c * row + i, row, x + i * stride + c, stride);
      outer(g, row, out, x, stride, count, slot);
      row_sums(g, row, out, (int)padded_count, slot + out * stride);
    }
    float* to = room.back[l % 2];
    for (int64_t i = 0; i < padded_count; i += kGroup)
      if (l) layer<End::slope>(net.backward[l], nullptr, out, in, g + i, row, to + i, row, room.hidden[l - 1] + i, row);
      else layer<End::linear>(net.backward[l], nullptr, out, in, g + i, row, to + i, row);
    g = to;
  }
  return g;
}

#include "points_back.h"

static void backward(const Scene& s, const float* packed, int64_t first, int rays, int64_t first_of_wave, const Gradients& g,
                     float* slot, float* scratch) {
  Cutter cut = {scratch, 0};
  BackwardRoom room(s, rays, cut);
  Net net = net_of(s, packed);
  int n = s.samples(), count = rays * n;
  copy(room.depth, s.depths + first * n, count);
  Block block = {first / s.rays, first, n, count, room.depth};
  evaluate_and_keep(s, net, block, room);
  sums_back(s, first, rays, g, room);
  const float* x = decoder_back(s, net, count, room, slot);
  if (!g.samples) return;
  float* turned = room.across;
  for (int64_t i = 0; i < count; i += LANES)
    for (int c = 0; c < s.padded; c += LANES) transpose(x + c * room.row + i, room.row, turned + i * s.padded + c, s.padded);
  copy(g.samples + (first - first_of_wave) * n * s.padded, turned, (int64_t)count * s.padded);
  if (g.points) points_back(s, block, first - first_of_wave, turned, g);
}

// ---- adding samples' gradients to planes: a thread owns some channels of a plane, so no two write to one place and the
// order of the sums is that of the samples, however many threads there are

static void scatter_plane(const Scene& s, int64_t picture, int plane, int first, int last, int64_t ray, int64_t rays,
                          int64_t first_of_wave, const Gradients& g, float* planes) {
  int n = s.samples();
  const float* from = g.samples + (ray - first_of_wave) * n * s.padded;
  planes += picture * kPlanes * s.height * s.width * s.padded;
  Positions at;
  Taps taps;
  for (int i = 0, count = (int)rays * n; i < count; i += kGroup) {
    place(s, ray, n, count, s.depths + ray * n, i, at);
    move(s, picture, at);
    find_taps(s, plane, at, taps);
    for (int j = 0; j < kGroup && i + j < count; j++, from += s.padded)
      for (int c = first; c < last; c += LANES) {
        vf value = load(from + c);
        for (int tap = 4 * plane; tap < 4 * plane + 4; tap++) {
          float* to = planes + taps.at[tap][j] + c;
          store(to, load(to) + taps.weight[tap][j] * value);
        }
      }
  }
}

// ---- planes with the channels of a pixel side by side

static bool to_pixels(const float* from, int channels, int padded, int64_t pixels, int64_t first, int64_t last, float* to) {
  vf check = {};
  for (int64_t p = first; p < last; p += LANES)
    for (int c = 0; c < padded; c += LANES) {
      if (c + LANES <= channels && p + LANES <= last) {
        for (int i = 0; i < LANES; i++) check += load(from + (c + i) * pixels + p) * 0.f;
        transpose(from + c * pixels + p, pixels, to + p * padded + c, padded);
        continue;
      }
      for (int64_t q = p; q < last && q < p + LANES; q++)
        for (int i = c; i < c + LANES; i++) {
          float value = i < channels ? from[i * pixels + q] : 0.f;
          check += value * 0.f;
          to[q * padded + i] = value;
        }
    }
  return sum(check) == 0.f;
}

static void to_channels(const float* from, int channels, int padded, int64_t pixels, int64_t first, int64_t last, float* to) {
  for (int64_t p = first; p < last; p += LANES)
    for (int c = 0; c < channels; c += LANES) {
      if (c + LANES <= channels && p + LANES <= last) {
        transpose(from + p * padded + c, padded, to + c * pixels + p, pixels);
        continue;
      }
      for (int64_t q = p; q < last && q < p + LANES; q++)
        for (int i = c; i < c + LANES && i < channels; i++) to[i * pixels + q] = from[q * padded + i];
    }
}

}  // namespace SET
}  // namespace nofa

#define NOFA_TEXT(x) #x
#define NOFA_NAME(x) NOFA_TEXT(x)
#define NOFA_JOIN(a, b) a##b
#define NOFA_TABLE(set) NOFA_JOIN(kernels_, set)

const nofa::Kernels nofa::NOFA_TABLE(SET) = {
    NOFA_NAME(SET), LANES, nofa::SET::net_size, nofa::SET::pack_net, nofa::SET::ahead, nofa::SET::forward_scratch, nofa::SET::forward,
    nofa::SET::backward_scratch, nofa::SET::slot_size, nofa::SET::backward, nofa::SET::unpack_slot, nofa::SET::scatter_plane,
    nofa::SET::scatter_offsets, nofa::SET::to_pixels, nofa::SET::to_channels};
