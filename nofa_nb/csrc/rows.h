// The decoder of the forward pass. A row is a sample with its channels side by side, as the planes hold them, so nothing
// needs turning, and each row can be left out. A tile of kTall rows x up to kWide vectors of outputs stays in registers
// while it runs over the inputs: each weight serves kTall rows.

#if LANES == 16
constexpr int kTall = 12;  // 24 of 32 registers
#else
constexpr int kTall = 6;  // 12 of 16 registers
#endif
constexpr int kWide = 2;
static_assert(kGroup % kTall == 0, "a group is made of whole tiles");

// (out, in) by bands of kWide vectors of outputs: (in, band), zeros behind the last output.
INLINE void pack_rows(const float* from, int out, int in, float* to) {
  for (int first = 0, wide = up(out, LANES); first < wide; first += kWide * LANES)
    for (int i = 0; i < in; i++)
      for (int j = first; j < first + kWide * LANES && j < wide; j++) *to++ = j < out ? from[j * in + i] : 0.f;
}

template <int V> struct Sums { vf of[kTall][V]; };

template <int V>
INLINE Sums<V> sums(const float* w, const float* bias, int in, const float* const* x) {
  Sums<V> total;
#pragma GCC unroll 12
  for (int m = 0; m < kTall; m++)
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) total.of[m][v] = bias ? load(bias + v * LANES) : vf{};
  for (int i = 0; i < in; i++, w += V * LANES) {
#pragma GCC unroll 12
    for (int m = 0; m < kTall; m++)
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) total.of[m][v] += x[m][i] * load(w + v * LANES);
  }
  return total;
}

// `count` rows of x through a band of V vectors of outputs to y.
template <int V>
static __attribute__((noinline)) void band(const float* w, const float* bias, int in, const float* x, int64_t xs, float* y, int64_t ys, int64_t count) {
  for (int64_t first = 0; first < count; first += kTall) {
    const float* row[kTall];
    for (int m = 0; m < kTall; m++) row[m] = x + (first + m < count ? first + m : count - 1) * xs;
    Sums<V> total = sums<V>(w, bias, in, row);
#pragma GCC unroll 12
    for (int m = 0; m < kTall; m++)
#pragma GCC unroll 2
      for (int v = 0; v < V; v++)
        if (first + m < count) store(y + (first + m) * ys + v * LANES, total.of[m][v]);
  }
}

// What a band of V vectors of features adds up to: each row's sigmoid, weighted by its share. n: whole tiles.
template <int V>
static __attribute__((noinline)) void shade_band(const float* w, const float* bias, int in, const float* const* row, const float* share, int n, float* out) {
  vf seen[V] = {};
  for (int first = 0; first < n; first += kTall) {
    Sums<V> total = sums<V>(w, bias, in, row + first);
#pragma GCC unroll 12
    for (int m = 0; m < kTall; m++)
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) seen[v] += share[first + m] * sigmoid(total.of[m][v]);
  }
#pragma GCC unroll 2
  for (int v = 0; v < V; v++) store(out + v * LANES, seen[v]);
}

// Calls one or the other with the first output of each band, by its vectors.
template <class One, class Two>
INLINE void bands(int out, One one, Two two) {
  int first = 0;
  for (; first + LANES < out; first += kWide * LANES) two(first);
  if (first < out) one(first);
}

INLINE void through(const float* w, const float* bias, int in, int out, const float* x, int64_t xs, float* y, int64_t ys, int64_t count) {
  bands(out, [&](int o) { band<1>(w + (int64_t)o * in, bias ? bias + o : nullptr, in, x, xs, y + o, ys, count); },
        [&](int o) { band<2>(w + (int64_t)o * in, bias ? bias + o : nullptr, in, x, xs, y + o, ys, count); });
}

INLINE void shade(const float* w, const float* bias, int in, int out, const float* const* row, const float* share, int n, float* seen) {
  bands(out, [&](int o) { shade_band<1>(w + (int64_t)o * in, bias + o, in, row, share, n, seen + o); },
        [&](int o) { shade_band<2>(w + (int64_t)o * in, bias + o, in, row, share, n, seen + o); });
}

// ---- the softplus of many numbers

#ifdef NOFA_AVX512
// log(1 + e^-t) for t in [0, 15.5]: polynomials on 32 pieces, each half a unit wide around a multiple of a half. Their
// coefficients lie in pairs of registers that one instruction looks up. To 2e-7.
constexpr int kTerms = 5, kPieces = 32;

// Interpolates between Chebyshev's points, in r = 2 t - piece.
static void fit_curve(float* curve) {
  for (int piece = 0; piece < kPieces; piece++) {
    double at[kTerms], value[kTerms], term[kTerms] = {};
    for (int k = 0; k < kTerms; k++) {
      at[k] = 0.5 * __builtin_cos((2 * k + 1) * 3.14159265358979 / (2 * kTerms));
      value[k] = __builtin_log1p(__builtin_exp(-0.5 * (piece + at[k])));
    }
    for (int j = 1; j < kTerms; j++)
      for (int k = kTerms - 1; k >= j; k--) value[k] = (value[k] - value[k - 1]) / (at[k] - at[k - j]);
    for (int k = kTerms - 1; k >= 0; k--) {
      for (int j = kTerms - 1; j >= 0; j--) term[j] = (j ? term[j - 1] : value[k]) - at[k] * term[j];
    }
    for (int j = 0; j < kTerms; j++) curve[j * kPieces + piece] = (float)term[j];
  }
}

INLINE void activate(float* x, int64_t n, const float* curve) {
  vf table[kTerms][2];
#pragma GCC unroll 10
  for (int i = 0; i < 2 * kTerms; i++) table[i / 2][i % 2] = load(curve + i * LANES);
  for (int64_t i = 0; i < n; i += LANES) {
    vf v = load(x + i), t = smaller(magnitude(v) * 2.f, all(kPieces - 1.f)), shifted = t + kRound, rest = t - (shifted - kRound);
    auto term = [&](int k) { return (vf)_mm512_permutex2var_ps((__m512)table[k][0], (__m512i)shifted, (__m512)table[k][1]); };
    vf p = term(kTerms - 1);
#pragma GCC unroll 5
    for (int k = kTerms - 2; k >= 0; k--) p = p * rest + term(k);
    store(x + i, larger(v, vf{}) + p);
  }
}
#else
constexpr int kTerms = 0, kPieces = 0;
static void fit_curve(float*) {}
INLINE void activate(float* x, int64_t n, const float*) {
  for (int64_t i = 0; i < n; i += LANES) store(x + i, softplus(load(x + i)));
}
#endif

// The sums over lanes of 2 Step vectors to the lanes of the first.
template <int Step>
INLINE void fold(vf* rows) {
#pragma GCC unroll 8
  for (int i = 0; i < Step; i++) {
    exchange<Step>(rows[i], rows[i + Step], typename Count<LANES>::type());
    rows[i] += rows[i + Step];
  }
  if constexpr (Step > 1) fold<Step / 2>(rows);
}

// Products of LANES rows with one more: one lane for each.
INLINE vf dots(const float* x, int64_t stride, const float* w) {
  vf total[LANES] = {};
#pragma GCC unroll 16
  for (int row = 0; row < LANES; row++)
    for (int64_t c = 0; c < stride; c += LANES) total[row] += load(x + row * stride + c) * load(w + c);
  fold<LANES / 2>(total);
  return total[0];
}
