// Gradients of positions: of the offsets' lattice and of the rays.

// (sample, 4) of `moved`: how the features change as the looked-up position moves. `x`: gradient of the features.
INLINE void positions_back(const Scene& s, const float* planes, const Positions& at, int used, const float* x, float* to) {
  for (int i = 0; i < used; i++) {
    float g[3] = {0, 0, 0};
    for (int plane = 0; plane < kPlanes; plane++) {
      int across = s.axes[2 * plane], down = s.axes[2 * plane + 1];
      Neighbours u = neighbours(all(at[across][i]), 2 / s.box, s.width);
      Neighbours v = neighbours(all(at[down][i]), 2 / s.box, s.height);
      for (int k = 0; k < 4; k++) {
        int64_t pixel = ((int64_t)plane * s.height + v.at[k / 2][0]) * s.width + u.at[k % 2][0];
        vf product = {};
        for (int c = 0; c < s.padded; c += LANES) product += load(x + i * s.padded + c) * load(planes + pixel * s.padded + c);
        float value = sum(product) / (kPlanes * s.box);
        g[across] += value * u.slope[k % 2][0] * v.weight[k / 2][0] * s.width;
        g[down] += value * u.weight[k % 2][0] * v.slope[k / 2][0] * s.height;
      }
    }
    for (int axis = 0; axis < 3; axis++) to[4 * i + axis] = g[axis];
    to[4 * i + 3] = 0;
  }
}

// Through p + offset(p).
INLINE void moves_back(const Scene& s, int64_t picture, const Positions& at, int used, const float* moved, float* to) {
  for (int i = 0; i < used; i++) {
    for (int axis = 0; axis < 4; axis++) to[4 * i + axis] = moved[4 * i + axis];
    if (!s.offsets) continue;
    Cell c = cell(s, at[0][i], at[1][i], at[2][i]);
    for (int k = 0; k < 8; k++) {
      vf4 product = *(const vf4*)(offsets_of(s, picture) + 4 * c.at[k]) * *(const vf4*)(moved + 4 * i);
      float value = product[0] + product[1] + product[2];
      for (int axis = 0; axis < 3; axis++) to[4 * i + axis] += value * c.slope[axis][k];
    }
  }
}

static void points_back(const Scene& s, const Block& b, int64_t ray_of_wave, const float* x, const Gradients& g) {
  Positions at;
  float *moved = g.moved + ray_of_wave * b.samples * 4, *points = g.points + ray_of_wave * b.samples * 4;
  for (int from = 0; from < b.count; from += kGroup) {
    int used = b.count - from < kGroup ? b.count - from : kGroup;
    place(s, b.first, b.samples, b.count, b.depth, from, at);
    move(s, b.picture, at);
    positions_back(s, planes_of(s, b.picture), at, used, x + (int64_t)from * s.padded, moved + 4 * from);
    place(s, b.first, b.samples, b.count, b.depth, from, at);
    moves_back(s, b.picture, at, used, moved + 4 * from, points + 4 * from);
  }
  if (!g.origins) return;
  for (int i = 0, ray = 0; i < b.count; ray++) {
    float *o = g.origins + 3 * (b.first + ray), *d = g.directions + 3 * (b.first + ray);
    for (int n = 0; n < b.samples; n++, i++)
      for (int axis = 0; axis < 3; axis++) o[axis] += points[4 * i + axis], d[axis] += points[4 * i + axis] * b.depth[i];
  }
}

static void scatter_offsets(const Scene& s, int64_t picture, int64_t ray, int64_t rays, int64_t first_of_wave, const Gradients& g, float* offsets) {
  int n = s.samples();
  const float* from = g.moved + (ray - first_of_wave) * n * 4;
  offsets += picture * s.lattice * s.lattice * s.lattice * 4;
  for (int64_t r = ray; r < ray + rays; r++)
    for (int i = 0; i < n; i++, from += 4) {
      float at[3];
      for (int axis = 0; axis < 3; axis++) at[axis] = s.origins[3 * r + axis] + s.depths[r * n + i] * s.directions[3 * r + axis];
      Cell c = cell(s, at[0], at[1], at[2]);
      for (int k = 0; k < 8; k++) *(vf4*)(offsets + 4 * c.at[k]) += c.weight[k] * *(const vf4*)from;
    }
}
