// Samples in space and what the planes hold there, a group of samples at a time: positions and addresses for LANES of
// them at once, then each sample's pixels, whose channels are whole vectors.

constexpr int kGroup = 3 * LANES;

struct Positions {
  float axis[3][kGroup];
  float* operator[](int i) { return axis[i]; }
  const float* operator[](int i) const { return axis[i]; }
};

// Position of samples `from`.. of a block of rays that starts at `first`; unused places of the group get the origin (0).
INLINE void place(const Scene& s, int64_t first, int samples, int count, const float* depth, int from, Positions& at) {
  int ray = from / samples, sample = from % samples;
  for (int i = 0; i < kGroup; i++) {
    bool used = from + i < count;
    const float *o = s.origins + 3 * (first + (used ? ray : 0)), *d = s.directions + 3 * (first + (used ? ray : 0));
    float t = used ? depth[from + i] : 0.f;
    for (int axis = 0; axis < 3; axis++) at[axis][i] = used ? o[axis] + t * d[axis] : 0.f;
    if (++sample == samples) sample = 0, ray++;
  }
}

// Both neighbours along one axis of `size` pixels: where, their weights (0 outside), and the weights' slopes.
struct Neighbours { vi at[2]; vf weight[2], slope[2]; };

INLINE Neighbours neighbours(vf position, float per_unit, int size) {  // position in [-1, 1] across the pixels
  vf u = ((position * per_unit + 1.f) * (float)size - 1.f) * 0.5f;
  u = smaller(larger(u, all(-2.f)), all(size + 1.f));  // farther outside is the same; integers stay small
  vf shifted = u + kRound, whole = shifted - kRound;
  vi above = whole > u;
  vi low = ((vi)shifted - 0x4b400000) + above;  // floor
  vf part = u - (above ? whole - 1.f : whole);
  Neighbours n;
  for (int side = 0; side < 2; side++) {
    vi at = low + side, inside = (at >= 0) & (at < size);
    n.at[side] = at < 0 ? vi{} : (at >= size ? vi{} + (size - 1) : at);
    n.weight[side] = inside ? (side ? part : 1.f - part) : vf{};
    n.slope[side] = inside ? all(side ? 1.f : -1.f) : vf{};
  }
  return n;
}

struct Taps {
  int32_t at[kTaps][kGroup];  // of the pixel's first channel, from the picture's first plane on
  float weight[kTaps][kGroup];
};

INLINE void find_taps(const Scene& s, int plane, const Positions& at, Taps& taps) {
  for (int i = 0; i < kGroup; i += LANES) {
    Neighbours x = neighbours(load(at[s.axes[2 * plane]] + i), 2 / s.box, s.width);
    Neighbours y = neighbours(load(at[s.axes[2 * plane + 1]] + i), 2 / s.box, s.height);
    for (int k = 0; k < 4; k++) {
      vi pixel = (y.at[k / 2] + plane * s.height) * s.width + x.at[k % 2];
      *(vi*)(taps.at[4 * plane + k] + i) = pixel * s.padded;
      *(vf*)(taps.weight[4 * plane + k] + i) = y.weight[k / 2] * x.weight[k % 2] * (1.f / kPlanes);
    }
  }
}

template <int V>
INLINE void gather_channels(const float* planes, int padded, const Taps& taps, int first, const float* base, float* out) {
  for (int i = 0; i < kGroup; i++) {
    int later = i + 3 < kGroup ? i + 3 : i;  // whose pixels are asked for now
#pragma GCC unroll 12
    for (int tap = 0; tap < kTaps; tap++) __builtin_prefetch(planes + taps.at[tap][later] + first);
    vf total[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) total[v] = base ? load(base + first + v * LANES) : vf{};
#pragma GCC unroll 12
    for (int tap = 0; tap < kTaps; tap++) {
      const float* pixel = planes + taps.at[tap][i] + first;
      vf weight = all(taps.weight[tap][i]);
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) total[v] += weight * load(pixel + v * LANES);
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) store(out + i * padded + first + v * LANES, total[v]);
  }
}

// Mean of the three planes, and a base where there is one: (sample, padded).
INLINE void gather(const float* planes, int padded, const Taps& taps, const float* base, float* out) {
  int c = 0;
  for (; c + 4 * LANES <= padded; c += 4 * LANES) gather_channels<4>(planes, padded, taps, c, base, out);
  for (; c + 2 * LANES <= padded; c += 2 * LANES) gather_channels<2>(planes, padded, taps, c, base, out);
  for (; c < padded; c += LANES) gather_channels<1>(planes, padded, taps, c, base, out);
}

// ---- offsets: a lattice of vectors over the same cube, corner to corner; points outside the cube stay

typedef float vf4 __attribute__((vector_size(16), aligned(4), may_alias));

struct Cell {
  int at[8];        // nodes, x fastest
  float weight[8];
  float slope[3][8];  // of the weights, per unit of the position
};

INLINE Cell cell(const Scene& s, float x, float y, float z) {
  float position[3] = {x, y, z}, part[3], slope[3], inside = 1, half = 0.5f * s.box;
  int low[3];
  for (int axis = 0; axis < 3; axis++) {
    float u = (position[axis] / s.box + 0.5f) * (s.lattice - 1), top = s.lattice - 1;
    if (!(position[axis] >= -half && position[axis] <= half)) inside = 0;
    slope[axis] = u > 0 && u < top ? top / s.box : 0.f;
    u = u > 0 ? (u < top ? u : top) : 0.f;
    low[axis] = (int)u < s.lattice - 2 ? (int)u : s.lattice - 2;
    part[axis] = u - low[axis];
  }
  Cell c;
  for (int k = 0; k < 8; k++) {
    float w[3], d[3];
    c.at[k] = 0;
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

INLINE const float* offsets_of(const Scene& s, int64_t picture) {
  return s.offsets + picture * s.lattice * s.lattice * s.lattice * 4;
}

INLINE void move(const Scene& s, int64_t picture, Positions& at) {
  if (!s.offsets) return;
  for (int i = 0; i < kGroup; i++) {
    Cell c = cell(s, at[0][i], at[1][i], at[2][i]);
    vf4 total = {};
    for (int k = 0; k < 8; k++) total += c.weight[k] * *(const vf4*)(offsets_of(s, picture) + 4 * c.at[k]);
    for (int axis = 0; axis < 3; axis++) at[axis][i] += total[axis];
  }
}
