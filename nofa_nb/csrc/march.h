// One ray: from densities along it to weights, to new depths, to what is seen, and back. EG3D's rules.

// What a ray needs while it is summed up; every array has room for all samples and two vectors more.
struct March {
  float *depth, *density, *sorted, *dense, *alpha, *passed, *weight, *share, *shares, *gradient, *spare;
  int32_t* rank;
  static constexpr int kArrays = 12;
  static INLINE int64_t room(int samples) { return up(samples, LANES) + 2 * LANES; }
  March(float* at, int samples) {
    float** all[] = {&depth, &density, &sorted, &dense, &alpha, &passed, &weight, &share, &shares, &gradient, &spare};
    for (float** array : all) *array = at, at += room(samples);
    rank = (int32_t*)at;
  }
};

// Weights of the n - 1 intervals between n ascending depths, and what passed before each; returns the weights' sum.
INLINE float interval_weights(const float* density, const float* depth, int n, float* alpha, float* passed, float* weight) {
  for (int i = 0; i < n - 1; i += LANES) {
    vf middle = softplus((load(density + i) + load(density + i + 1)) * 0.5f - 1.f);
    store(alpha + i, 1.f - exp_negative(-middle * (load(depth + i + 1) - load(depth + i))));
  }
  double light = 1, total = 0;
  for (int i = 0; i < n - 1; i++) {
    passed[i] = (float)light;
    weight[i] = alpha[i] * passed[i];
    total += weight[i];
    light *= 1.f - alpha[i] + 1e-10f;
  }
  return (float)total;
}

// Widens the peaks, lifts the floor, and inverts the cumulative distribution at `numbers`;
// `total` and `edge` are room.
INLINE void importance(const float* depth, const float* weight, int n, const float* numbers, int fine, float* out,
                       float* total, float* edge) {
  int bins = n - 3;
  auto larger_at = [&](int i) { float a = weight[i - 1], b = weight[i]; return a > b ? a : b; };  // 1 <= i <= n - 2
  double sum = 0;
  for (int i = 0; i < bins; i++) {
    total[i + 1] = (larger_at(i + 1) + larger_at(i + 2)) * 0.5f + 0.01f + 1e-5f;
    sum += total[i + 1];
  }
  double running = total[0] = 0;
  for (int i = 0; i < bins; i++) total[i + 1] = (float)(running += total[i + 1] / (float)sum);
  for (int i = 0; i <= bins; i++) edge[i] = (depth[i] + depth[i + 1]) * 0.5f;
  for (int i = 0; i < fine; i += LANES) {
    vf wanted = load(numbers + i);
    vi found = {};
    for (int k = 0; k <= bins; k++) found -= all(total[k]) <= wanted;
    for (int j = 0; j < LANES && i + j < fine; j++) {
      int low = found[j] > 1 ? found[j] - 1 : 0, high = found[j] < bins ? found[j] : bins;
      float held = total[high] - total[low], share = (numbers[i + j] - total[low]) / (held < 1e-5f ? 1.f : held);
      out[i + j] = edge[low] + share * (edge[high] - edge[low]);
    }
  }
}

// Place of each number in ascending order, equal ones in the order they come: counting instead of sorting has no branches.
INLINE void ranks(const float* x, int n, int32_t* rank) {
  bool ascending = true;
  for (int i = 0; i + 1 < n; i++) ascending &= x[i] <= x[i + 1];
  for (int i = 0; i < n; i += LANES) {
    vi lane = lane_numbers() + i, count = lane;
    if (!ascending) {
      vf mine = load(x + i);
      int j = 0, end = i + LANES < n ? i + LANES : n;
      for (count = vi{}; j < i; j++) count -= all(x[j]) <= mine;
      for (; j < end; j++) count -= (all(x[j]) < mine) | ((all(x[j]) == mine) & (j < lane));
      for (; j < n; j++) count -= all(x[j]) < mine;
    }
    __builtin_memcpy(rank + i, &count, sizeof count);
  }
}

// Sorts, finds weights and the samples' shares (in the order they came: `shares`); returns the weights' sum.
INLINE float find_shares(March& m, int n) {
  ranks(m.depth, n, m.rank);
  for (int i = 0; i < n; i++) m.sorted[m.rank[i]] = m.depth[i], m.dense[m.rank[i]] = m.density[i];
  float total = interval_weights(m.dense, m.sorted, n, m.alpha, m.passed, m.weight);
  float before = 0;
  for (int i = 0; i < n; i++) {
    float after = i < n - 1 ? m.weight[i] : 0.f;
    m.share[i] = (before + after) * 0.5f;
    before = after;
  }
  for (int i = 0; i < n; i++) m.shares[i] = m.share[m.rank[i]];
  return total;
}

INLINE float depth_of(const March& m, int n, float total) {
  double depth = 0;
  for (int i = 0; i < n; i++) depth += m.share[i] * m.sorted[i];
  return total > 0 ? (float)depth / total : __builtin_inff();
}

// EG3D's colours reach a little over [0, 1].
constexpr float kStretch = 1.002f, kShift = 0.001f;

// Gradients of the sums to the samples: `out` holds their features and densities (rows of `stride`), `to` gets the
// gradients of the features before the sigmoid and of the densities; up to LANES - 1 numbers behind them are spoilt.
// Given are gradients of features (of colours in [0, 1]), depth and weights' sum.
INLINE void march_back(March& m, int n, float total, int features, const float* feature, float depth, float weight,
                       const float* out, float* to, int64_t stride) {
  for (int i = 0; i < n; i += LANES) {
    vf g = {}, share = load(m.shares + i) * kStretch;
    for (int c = 0; c < features; c++) {
      vf value = load(out + c * stride + i);
      g += feature[c] * (value * kStretch - kShift);
      store(to + c * stride + i, feature[c] * share * value * (1.f - value));
    }
    store(m.spare + i, g);
  }
  float per_depth = total > 0 ? depth / total : 0.f, at = total > 0 ? depth_of(m, n, total) : 0.f;
  for (int i = 0; i < n; i++) m.gradient[m.rank[i]] = m.spare[i] + per_depth * m.depth[i];
  weight -= per_depth * at;
  // to each interval's weight, then to its opacity: what it adds, less what it hides behind it
  float behind = 0;
  for (int i = n - 2; i >= 0; i--) {
    float g = (m.gradient[i] + m.gradient[i + 1]) * 0.5f + weight;
    m.share[i] = m.passed[i] * (g - behind);
    behind = g * m.alpha[i] + (1.f - m.alpha[i] + 1e-10f) * behind;
  }
  for (int i = 0; i < n - 1; i += LANES) {
    vf middle = softplus((load(m.dense + i) + load(m.dense + i + 1)) * 0.5f - 1.f);
    vf slope = (load(m.sorted + i + 1) - load(m.sorted + i)) * (1.f - load(m.alpha + i)) * slope_of_softplus(middle) * 0.5f;
    store(m.weight + i, load(m.share + i) * slope);
  }
  float before = 0;
  for (int i = 0; i < n; i++) {
    float after = i < n - 1 ? m.weight[i] : 0.f;
    m.gradient[i] = before + after;
    before = after;
  }
  for (int i = 0; i < n; i++) to[features * stride + i] = m.gradient[m.rank[i]];
}
