// Vectors of LANES floats and the few functions that the renderer needs of them. Included once for each instruction set,
// inside a namespace of its own; the compiler turns the operators into that set's instructions.

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef float vf_anywhere __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#define INLINE inline __attribute__((always_inline))

INLINE vf load(const float* p) { return *(const vf_anywhere*)p; }
INLINE void store(float* p, vf v) { *(vf_anywhere*)p = v; }
INLINE vf all(float x) { return x - vf{}; }
#ifdef NOFA_AVX512  // one instruction, which the compiler does not find
INLINE vf larger(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE vf smaller(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
#else
INLINE vf larger(vf a, vf b) { return a > b ? a : b; }
INLINE vf smaller(vf a, vf b) { return a < b ? a : b; }
#endif
INLINE int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

INLINE vi lane_numbers() {
  vi n;
  for (int i = 0; i < LANES; i++) n[i] = i;
  return n;
}

INLINE float sum(vf v) {
  float total[LANES];
  store(total, v);
  for (int step = LANES / 2; step; step /= 2)
    for (int i = 0; i < step; i++) total[i] += total[i + step];
  return total[0];
}

// Adding 1.5 * 2^23 leaves the nearest integer in the last bits of the sum; |x| must stay below 2^22.
constexpr float kRound = 12582912.f;

// 2^x for x <= 126, to 1e-7 of its value; below -126 as at -126.
INLINE vf exp2(vf x) {
  x = larger(x, all(-126.f));
  vf shifted = x + kRound, rest = x - (shifted - kRound);
  vf p = all(1.5469732e-4f);
  p = p * rest + 1.3400433e-3f;
  p = p * rest + 9.6180253e-3f;
  p = p * rest + 5.5503272e-2f;
  p = p * rest + 0.24022651f;
  p = p * rest + 0.69314718f;
  p = p * rest + 1.f;
  return (vf)((vi)p + ((vi)shifted << 23));
}

constexpr float kLog2E = 1.44269504f;

INLINE vf exp_negative(vf x) { return exp2(x * kLog2E); }  // e^x for x <= 0

INLINE vf magnitude(vf x) { return (vf)((vi)x & 0x7fffffff); }

// log(1 + e^x) = max(x, 0) + log(1 + e^-|x|): the last term is a polynomial in e^-|x|, which lies in [0, 1].
INLINE vf softplus(vf x) {
  vf e = exp2(magnitude(x) * -kLog2E);
  vf p = all(5.2534579e-3f);
  p = p * e - 2.9588507e-2f;
  p = p * e + 7.8361668e-2f;
  p = p * e - 0.1367477f;
  p = p * e + 0.19111431f;
  p = p * e - 0.24844369f;
  p = p * e + 0.33319271f;
  p = p * e - 0.49999502f;
  p = p * e + 1.f;
  return larger(x, vf{}) + e * p;
}

INLINE vf reciprocal(vf x) {
#ifdef NOFA_AVX512
  vf guess = (vf)_mm512_maskz_rcp14_ps((__mmask16)-1, (__m512)x);  // 14 bits and one Newton step: a third of a division's time
  return guess * (2.f - x * guess);
#else
  return 1.f / x;
#endif
}

INLINE vf sigmoid(vf x) {
  vf e = exp2(magnitude(x) * -kLog2E), inverse = reciprocal(1.f + e);
  return x > 0.f ? inverse : e * inverse;
}

// Slope of the softplus whose value is given: sigmoid(x) = 1 - e^-softplus(x).
INLINE vf slope_of_softplus(vf value) { return 1.f - exp_negative(-value); }

// ---- transposing LANES x LANES numbers: exchange halves, then quarters, and so on

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define NOFA_SHUFFLEVECTOR
#endif
#endif

template <int... I> struct Lanes {};
template <int N, int... I> struct Count : Count<N - 1, N - 1, I...> {};
template <int... I> struct Count<0, I...> { typedef Lanes<I...> type; };

template <int Step, int... I>
INLINE void exchange(vf& a, vf& b, Lanes<I...>) {
#ifdef NOFA_SHUFFLEVECTOR
  vf low = __builtin_shufflevector(a, b, (I & Step ? I - Step + LANES : I)...);
  vf high = __builtin_shufflevector(a, b, (I & Step ? I + LANES : I + Step)...);
#else
  vf low = __builtin_shuffle(a, b, vi{(I & Step ? I - Step + LANES : I)...});
  vf high = __builtin_shuffle(a, b, vi{(I & Step ? I + LANES : I + Step)...});
#endif
  a = low, b = high;
}

template <int Step>
INLINE void transpose_step(vf* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++)
    if (!(i & Step)) exchange<Step>(rows[i], rows[i + Step], typename Count<LANES>::type());
}

INLINE void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  vf rows[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) rows[i] = load(from + i * from_stride);
  transpose_step<1>(rows);
  transpose_step<2>(rows);
#if LANES > 4
  transpose_step<4>(rows);
#endif
#if LANES > 8
  transpose_step<8>(rows);
#endif
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) store(to + i * to_stride, rows[i]);
}
