// ABC's gates from raw slot logits e, and their gradient. Per slot, over the tokens of a sequence:
//
//   z_t = logaddexp(z_{t-1}, e_t)      g_t = z_{t-1} - z_t      s_t = exp(e_t - z_t)      a_t = exp(g_t) = 1 - s_t
//
//   With c the cotangent that reaches z_t from later tokens (dzT behind the last one):
//     de_t = s_t (a_t ds_t + c - dg_t)       c' = a_t (c - ds_t s_t) + s_t dg_t       the cotangent of z_{t-1}
//   e_t = -inf (silent):                      de_t = 0,  c' = c
//   first write of a slot (g, s constant):    de_t = c,  c' = 0          known by s = 1 with g = 0 or g = -inf: never both otherwise

template <class T> void abc_rows(const AbcParams& p, int64_t n, int64_t h) {
  constexpr int W = LANES<T>;
  const Sequence seq = sequence(p, n);
  const Rows e = rows(p.e, seq, h, p.reverse), s = rows(p.s, seq, h, p.reverse), g = rows(p.g, seq, h, p.reverse);
  const int64_t row = state_row(p, n) * p.H + h;
  if (row < 0) return;
  with_dtype<T>(e.dtype, [&](auto* type) GSA_LAMBDA {
    using E = std::remove_pointer_t<decltype(type)>;
    for (int m = 0; m < p.M; m += W) {
      const int left = p.M - m;
      T first[W];
      for (int i = 0; i < W; ++i) first[i] = -std::numeric_limits<T>::infinity();
      const int some = std::min(left, W);
      if (p.z0) load_row(first, p.z0, row * p.M + m, some, p.state_dtype);
      Vec<T> z = load<T>(first);
      for (int64_t t = 0; t < seq.length; ++t) {
        const AbcGate<T> gate = abc_gate<T>(z, load_some<T>(reinterpret_cast<const E*>(e.first + t * e.step) + m, left), p.z0 != nullptr);
        z = gate.z;
        store_some<T>(reinterpret_cast<T*>(g.first + t * g.step) + m, gate.g, left);
        store_some<T>(reinterpret_cast<T*>(s.first + t * s.step) + m, gate.s, left);
      }
      store<T>(first, z);
      if (p.zT) store_row(p.zT, row * p.M + m, first, some, p.state_dtype);
    }
  });
}

template <class T> void abc_rows_backward(const AbcParams& p, int64_t n, int64_t h) {
  constexpr int W = LANES<T>;
  const Sequence seq = sequence(p, n);
  const auto of = [&](const View& v) GSA_LAMBDA { return rows(v, seq, h, p.reverse); };
  const Rows e = of(p.e), s = of(p.s), g = of(p.g), ds = of(p.ds), dg = of(p.dg), de = of(p.de);
  const T* dzT = p.dzT ? static_cast<const T*>(p.dzT) + (n * p.H + h) * p.M : nullptr;
  T* dz0 = p.dz0 ? static_cast<T*>(p.dz0) + (n * p.H + h) * p.M : nullptr;
  const Vec<T> zero = splat(T(0)), one = splat(T(1)), none = splat(-std::numeric_limits<T>::infinity());
  with_dtype<T>(e.dtype, [&](auto* type) GSA_LAMBDA {
    using E = std::remove_pointer_t<decltype(type)>;
    const auto read = [&](const Rows& x, int64_t t, int m)
                          GSA_LAMBDA { return x ? load_some<T>(reinterpret_cast<const T*>(x.first + t * x.step) + m, p.M - m) : splat(T(0)); };
    for (int m = 0; m < p.M; m += W) {
      const int left = p.M - m;
      Vec<T> c = dzT ? load_some<T>(dzT + m, left) : zero;
      for (int64_t t = seq.length - 1; t >= 0; --t) {
        const Vec<T> st = read(s, t, m), gt = read(g, t, m), dst = read(ds, t, m), dgt = read(dg, t, m);
        const Vec<T> et = load_some<T>(reinterpret_cast<const E*>(e.first + t * e.step) + m, left), at = exp_<T>(gt);
        const auto silent = et == none, first = (st == one) & ((gt == zero) | (gt == none));
        const Vec<T> det = silent ? zero : first ? c : st * (at * dst + (c - dgt));
        c = silent ? c : first ? zero : at * (c - dst * st) + st * dgt;
        store_some<T>(reinterpret_cast<E*>(de.first + t * de.step) + m, det, left);
      }
      if (dz0) store_some<T>(dz0 + m, c, left);
    }
  });
}

template <class T> void abc_gates(const AbcParams& params) {
  parallel(
      params.N * params.H,
      [](const void* context, Items& items) {
        const auto& p = *static_cast<const AbcParams*>(context);
        for (int64_t item; items.next(item);) abc_rows<T>(p, item / p.H, item % p.H);
      },
      &params);
}
template <class T> void abc_gates_backward(const AbcParams& params) {
  parallel(
      params.N * params.H,
      [](const void* context, Items& items) {
        const auto& p = *static_cast<const AbcParams*>(context);
        for (int64_t item; items.next(item);) abc_rows_backward<T>(p, item / p.H, item % p.H);
      },
      &params);
}
