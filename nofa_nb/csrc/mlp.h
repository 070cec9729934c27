// The decoder. A vector holds one channel of LANES samples, so the sizes of the layers need not fit the vectors. A tile
// of M outputs x K vectors stays in registers while it runs over the inputs: each weight serves K vectors.

#if LANES == 16
constexpr int kRows = 8;  // 24 of 32 registers
#else
constexpr int kRows = 4;  // 12 of 16 registers
#endif

enum class End { linear, softplus, sigmoid, slope };  // what happens to a sum

INLINE int rows_of_tile(int left) { return left >= kRows ? kRows : left >= 4 ? 4 : left >= 2 ? 2 : 1; }

// (out, in) by tiles: (in, M) for each, so that a tile reads its weights in one line.
INLINE void pack_matrix(const float* from, int out, int in, int64_t row, int64_t column, float* to) {
  for (int m, first = 0; first < out; first += m) {
    m = rows_of_tile(out - first);
    for (int i = 0; i < in; i++)
      for (int j = 0; j < m; j++) *to++ = from[(first + j) * row + i * column];
  }
}

template <int M, int K, End end>
INLINE void tile(const float* w, const float* bias, int in, const float* x, int64_t xs, float* y, int64_t ys, const float* value, int64_t vs) {
  vf total[M][K];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int k = 0; k < K; k++) total[m][k] = bias ? all(bias[m]) : vf{};
  for (int i = 0; i < in; i++) {
    vf v[K];
#pragma GCC unroll 8
    for (int k = 0; k < K; k++) v[k] = load(x + i * xs + k * LANES);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
      for (int k = 0; k < K; k++) total[m][k] += w[i * M + m] * v[k];
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int k = 0; k < K; k++) {
      vf t = total[m][k];
      if (end == End::softplus) t = softplus(t);
      if (end == End::sigmoid) t = sigmoid(t);
      if (end == End::slope) t *= slope_of_softplus(load(value + m * vs + k * LANES));
      store(y + m * ys + k * LANES, t);
    }
}

// Not inlined: inside a large function the compiler no longer keeps all of a tile in registers.
template <int M, End end>
static __attribute__((noinline)) void tile_of(const float* w, const float* bias, int in, const float* x, int64_t xs, float* y, int64_t ys, const float* value, int64_t vs) {
  tile<M, 3, end>(w, bias, in, x, xs, y, ys, value, vs);
}

// One group of samples through one layer: x (in, xs) to y (out, ys). `value`: of the softplus whose slope is wanted.
template <End end>
INLINE void layer(const float* w, const float* bias, int in, int out, const float* x, int64_t xs, float* y, int64_t ys,
                  const float* value = nullptr, int64_t vs = 0) {
  for (int m, first = 0; first < out; first += m) {
    m = rows_of_tile(out - first);
    const float *part = w + (int64_t)first * in, *b = bias ? bias + first : nullptr, *v = value ? value + first * vs : nullptr;
    float* to = y + first * ys;
    if (m == 8) tile_of<kRows, end>(part, b, in, x, xs, to, ys, v, vs);
    else if (m == 4) tile_of<4, end>(part, b, in, x, xs, to, ys, v, vs);
    else if (m == 2) tile_of<2, end>(part, b, in, x, xs, to, ys, v, vs);
    else tile_of<1, end>(part, b, in, x, xs, to, ys, v, vs);
  }
}

// dW (out, stride) += g (out, gs) x (count, stride)^T: here a vector holds LANES inputs of one sample.
template <int M, int V>
INLINE void outer_tile(const float* g, int64_t gs, const float* x, int64_t stride, int count, float* w) {
  vf total[M][V];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) total[m][v] = load(w + m * stride + v * LANES);
  for (int i = 0; i < count; i++) {
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) {
      vf input = load(x + i * stride + v * LANES);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) total[m][v] += g[m * gs + i] * input;
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) store(w + m * stride + v * LANES, total[m][v]);
}

template <int M>
static __attribute__((noinline)) void outer_rows(const float* g, int64_t gs, const float* x, int64_t stride, int count, float* w) {
  int64_t v = 0;
  for (; v + 2 * LANES <= stride; v += 2 * LANES) outer_tile<M, 2>(g, gs, x + v, stride, count, w + v);
  for (; v < stride; v += LANES) outer_tile<M, 1>(g, gs, x + v, stride, count, w + v);
}

INLINE void outer(const float* g, int64_t gs, int out, const float* x, int64_t stride, int count, float* w) {
  for (int m, first = 0; first < out; first += m) {
    m = rows_of_tile(out - first);
    float* to = w + first * stride;
    if (m == 8) outer_rows<kRows>(g + first * gs, gs, x, stride, count, to);
    else if (m == 4) outer_rows<4>(g + first * gs, gs, x, stride, count, to);
    else if (m == 2) outer_rows<2>(g + first * gs, gs, x, stride, count, to);
    else outer_rows<1>(g + first * gs, gs, x, stride, count, to);
  }
}

// bias (out) += sums of the rows of g
INLINE void row_sums(const float* g, int64_t gs, int out, int count, float* bias) {
  for (int m = 0; m < out; m++) {
    vf total = {};
    for (int i = 0; i < count; i += LANES) total += load(g + m * gs + i);
    bias[m] += sum(total);
  }
}

// ---- the decoder's numbers in one array: for each layer what backward reads (the packed matrix, its packed transpose, the
// bias) and what forward reads (the matrix by bands, the bias filled up with zeros); then the row of the density, filled up

struct Net {
  const float *forward[kMaxLayers], *backward[kMaxLayers], *bias[kMaxLayers];
  const float *bands[kMaxLayers], *base[kMaxLayers], *density, *curve;
  int64_t size;
};

INLINE int outputs(const Scene& s, int l) { return l + 1 < s.layers ? s.sizes[l + 1] : s.features(); }

INLINE Net net_of(const Scene& s, const float* at) {
  Net net;
  Cutter cut = {const_cast<float*>(at), 0};
  for (int l = 0; l < s.layers; l++) {
    int64_t size = (int64_t)s.sizes[l] * s.sizes[l + 1], wide = up(outputs(s, l), LANES);
    net.forward[l] = cut.take(size), net.backward[l] = cut.take(size), net.bias[l] = cut.take(s.sizes[l + 1]);
    net.bands[l] = cut.take(s.sizes[l] * wide), net.base[l] = cut.take(wide);
  }
  net.density = cut.take(up(s.sizes[s.layers - 1], LANES));
  net.curve = cut.take(kTerms * kPieces);
  net.size = cut.used;
  return net;
}

static int64_t net_size(const Scene& s) { return net_of(s, nullptr).size; }

// The density moves from the first row of the last layer to its end: the features then fill whole tiles.
INLINE int row_of(const Scene& s, int l, int row) { return l + 1 < s.layers ? row : row ? row - 1 : s.features(); }

static void pack_net(const Scene& s, float* at) {
  Net net = net_of(s, at);
  for (int l = 0; l < s.layers; l++) {
    int in = s.sizes[l], out = s.sizes[l + 1];
    float *ordered = (float*)__builtin_malloc(sizeof(float) * in * out), *bias = const_cast<float*>(net.bias[l]);
    for (int row = 0; row < out; row++) {
      int to = row_of(s, l, row);
      for (int i = 0; i < in; i++) ordered[to * in + i] = s.weight[l][row * in + i];
      bias[to] = s.bias[l][row];
    }
    int first = outputs(s, l);  // the density has a tile of its own
    float* forward = const_cast<float*>(net.forward[l]);
    pack_matrix(ordered, first, in, in, 1, forward);
    pack_matrix(ordered + first * in, out - first, in, in, 1, forward + first * in);
    pack_matrix(ordered, in, out, 1, in, const_cast<float*>(net.backward[l]));
    pack_rows(ordered, first, in, const_cast<float*>(net.bands[l]));
    for (int row = 0; row < first; row++) const_cast<float*>(net.base[l])[row] = bias[row];
    for (int i = 0; first < out && i < in; i++) const_cast<float*>(net.density)[i] = ordered[first * in + i];
    __builtin_free(ordered);
  }
  fit_curve(const_cast<float*>(net.curve));
}
