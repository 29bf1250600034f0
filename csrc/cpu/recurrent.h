// The recurrence itself, one token after the other: a whole sequence (recurrent_forward), and one token of decoding (step).
//
//   Hk[k][m] = Hk[k][m] a[m] + k[k] s[m]      o1[m] += q[k] Hk[k][m]        p = softmax(o1)
//   Hv[m][v] = Hv[m][v] a[m] + s[m] v[v]      o[v]  += p[m] Hv[m][v]
//
// Each state is read and written once per token, all query heads of the group reading it on the way.

// H [rows][cols] <- H * decay + x[row] y[col]; out[h][col] = sum_row in[h][row] H[row][col] for HEADS heads.
// The decay belongs to the column (Hk) or to the row (Hv). S is the type the state is kept in.
template <class T, class S> struct StatePass {
  S* H;
  int rows, cols;
  const T *decay, *x, *y;
  const T* in;             // [heads][in_ld]
  int64_t in_ld;
  T* out;                  // [heads][out_ld]
  int64_t out_ld;
};

template <bool ROW_DECAY, bool UPDATE, int HEADS, int NV, class T, class S>
GSA_INLINE void pass_columns(const StatePass<T, S>& p, int c, int width) {        // width: columns left, used by NV == 1 only
  constexpr int W = LANES<T>;
  Vec<T> decay[NV], y[NV], sum[HEADS][NV];
  unroll<NV>([&](auto v) GSA_LAMBDA {
    y[v] = load<T>(p.y + c + v * W);
    if constexpr (!ROW_DECAY) decay[v] = load<T>(p.decay + c + v * W);
    unroll<HEADS>([&](auto h) GSA_LAMBDA { sum[h][v] = splat(T(0)); });
  });
  S* H = p.H + c;
  for (int row = 0; row < p.rows; ++row, H += p.cols) {
    unroll<NV>([&](auto v) GSA_LAMBDA {
      Vec<T> state = NV == 1 ? load_some<T>(H, width) : load_as<T>(H + v * W);
      if constexpr (UPDATE) {
        if constexpr (ROW_DECAY) state = fma_<T>(state, splat(p.decay[row]), splat(p.x[row]) * y[v]);
        else state = fma_<T>(state, decay[v], splat(p.x[row]) * y[v]);
        if constexpr (NV == 1) store_some<T>(H, state, width);
        else store_as<T>(H + v * W, state);
      }
      unroll<HEADS>([&](auto h) GSA_LAMBDA { sum[h][v] = fma_<T>(splat(p.in[h * p.in_ld + row]), state, sum[h][v]); });
    });
  }
  unroll<HEADS>([&](auto h) GSA_LAMBDA { unroll<NV>([&](auto v) GSA_LAMBDA { store<T>(p.out + h * p.out_ld + c + v * W, sum[h][v]); }); });
}

template <bool ROW_DECAY, bool UPDATE, int HEADS, class T, class S> void pass_heads(const StatePass<T, S>& p) {
  constexpr int W = LANES<T>, NV = GSA_VECTOR_REGISTERS == 32 || HEADS == 1 ? 4 : 2;
  int c = 0;
  for (; c + NV * W <= p.cols; c += NV * W) pass_columns<ROW_DECAY, UPDATE, HEADS, NV>(p, c, 0);
  for (; c < p.cols; c += W) pass_columns<ROW_DECAY, UPDATE, HEADS, 1>(p, c, p.cols - c);
}

template <bool ROW_DECAY, class T, class S> void state_pass(StatePass<T, S> p, int heads) {
  for (bool update = true; heads > 0; update = false) {              // the first heads to come update the state
    const int now = heads >= 4 ? 4 : heads >= 2 ? 2 : 1;
    if (update) {
      if (now == 4) pass_heads<ROW_DECAY, true, 4>(p);
      else if (now == 2) pass_heads<ROW_DECAY, true, 2>(p);
      else pass_heads<ROW_DECAY, true, 1>(p);
    } else {
      if (now == 4) pass_heads<ROW_DECAY, false, 4>(p);
      else if (now == 2) pass_heads<ROW_DECAY, false, 2>(p);
      else pass_heads<ROW_DECAY, false, 1>(p);
    }
    heads -= now, p.in += now * p.in_ld, p.out += now * p.out_ld;
  }
}

template <class T> struct Token {
  int r, K, V, M, Kp, Vp, Mp;
  T *q, *k, *v, *a, *s, *p, *o;         // [r][K] (times scale), [K], [V], [M], [M], [r][M], [r][V]
  Token(Arena& m, int r, int K, int V, int M) : r(r), K(K), V(V), M(M), Kp(padded(K)), Vp(padded(V)), Mp(padded(M)) {
    m.take(q, r * Kp), m.take(k, Kp), m.take(v, Vp), m.take(a, Mp), m.take(s, Mp), m.take(p, r * Mp), m.take(o, r * Vp);
  }
  // one row of a tile: to [ld] <- dim elements times factor, then zeros
  void read(T* to, int ld, const Rows& from, int64_t t, int dim, T factor = T(1)) const {
    with_dtype<T>(from.dtype, [&](auto* type) GSA_LAMBDA {
      using E = std::remove_pointer_t<decltype(type)>;
      const E* row = reinterpret_cast<const E*>(from.first + t * from.step);
      for (int c = 0; c < ld; c += LANES<T>) store<T>(to + c, c < dim ? load_some<T>(row + c, dim - c) * factor : splat(T(0)));
    });
  }
  void gates(bool coupled) {            // a holds g on entry
    for (int m = 0; m < Mp; m += LANES<T>) {
      const ExpParts<T> e = exp_parts<T>(load<T>(a + m));
      store<T>(a + m, exp_<T>(e));
      if (coupled) store<T>(s + m, one_minus_exp<T>(e));
    }
  }
  template <class S> void advance(S* Hk, S* Hv) const {
    state_pass<false>(StatePass<T, S>{Hk, K, M, a, k, s, q, Kp, p, Mp}, r);
    for (int i = 0; i < r; ++i) softmax(p + i * Mp, M, Mp);
    state_pass<true>(StatePass<T, S>{Hv, M, V, a, s, v, p, Mp, o, Vp}, r);
  }
  void write(const Rows& to, int64_t t, int head) const { store_tile(to, t, 1, V, o + head * Vp, Vp); }
};

template <class T> void recurrent_forward(const ForwardParams& params) {
  parallel(
      params.N * params.H,
      [](const void* context, Items& items) {
        const auto& p = *static_cast<const ForwardParams*>(context);
        const int H = p.H, r = p.HQ / p.H, K = p.K, V = p.V, M = p.M;
        T *Hk, *Hv;
        const auto plan = [&](Arena& m) GSA_LAMBDA {
          m.take(Hk, int64_t(K) * M), m.take(Hv, int64_t(M) * V);
          return Token<T>(m, r, K, V, M);
        };
        Arena measure;
        plan(measure);
        const Scratch scratch(measure.used());
        Arena arena(scratch.memory);
        Token<T> token = plan(arena);
        const auto start_from = [&](T* to, const void* from, int64_t row, int64_t size) GSA_LAMBDA {
          if (from) load_row(to, from, row * size, size, p.state_dtype);
          else std::memset(static_cast<void*>(to), 0, size * sizeof(T));
        };
        for (int64_t item; items.next(item);) {
          const int64_t n = item / H, h = item % H, rowT = state_row(p, n) * H + h, row0 = p.h0_broadcast ? h : rowT, KM = int64_t(K) * M, MV = int64_t(M) * V;
          if (rowT < 0) {
            zero_padding(p, n, h);
            continue;
          }
          const Sequence seq = sequence(p, n);
          const Rows k = rows(p.k, seq, h, p.reverse), v = rows(p.v, seq, h, p.reverse), g = rows(p.g, seq, h, p.reverse), s = rows(p.s, seq, h, p.reverse);
          start_from(Hk, p.hk0, row0, KM);
          start_from(Hv, p.hv0, row0, MV);
          for (int64_t t = 0; t < seq.length; ++t) {
            for (int i = 0; i < r; ++i) token.read(token.q + i * token.Kp, token.Kp, rows(p.q, seq, h * r + i, p.reverse), t, K, T(p.scale));
            token.read(token.k, token.Kp, k, t, K);
            token.read(token.v, token.Vp, v, t, V);
            token.read(token.a, token.Mp, g, t, M);
            if (s) token.read(token.s, token.Mp, s, t, M);
            token.gates(!s);
            token.advance(Hk, Hv);
            for (int i = 0; i < r; ++i) token.write(rows(p.o, seq, h * r + i, p.reverse), t, i);
          }
          if (p.hkT) store_row(p.hkT, rowT * KM, Hk, KM, p.state_dtype);
          if (p.hvT) store_row(p.hvT, rowT * MV, Hv, MV, p.state_dtype);
        }
      },
      &params);
}

// ---- decoding --------------------------------------------------------------------------------------------------------------------
// ABC for one slot vector: z becomes logaddexp(z, e); gives a = exp(z_old - z_new) and s = exp(e - z_new). e = -inf writes nothing.
// `handed_over`: z = -inf came from outside, so a first write forgets what the slot held.
template <class T> struct AbcGate {
  Vec<T> z, g, s, a;
};
template <class T> GSA_INLINE AbcGate<T> abc_gate(Vec<T> z, Vec<T> e, bool handed_over) {
  const Vec<T> none = splat(-std::numeric_limits<T>::infinity()), zero = splat(T(0)), one = splat(T(1));
  const auto louder = e > z;
  const Vec<T> gap = louder ? z - e : e - z, x = exp_<T>(gap), l = log1p_<T>(x), inverse = one / (x + one);
  AbcGate<T> gate{(louder ? e : z) + l, louder ? gap - l : -l, louder ? inverse : x * inverse, louder ? x * inverse : inverse};
  const auto silent = e == none, first = z == none;
  gate.z = silent ? z : first ? e : gate.z;
  gate.g = silent ? zero : first ? (handed_over ? none : zero) : gate.g;
  gate.s = silent ? zero : first ? one : gate.s;
  gate.a = silent ? one : first ? (handed_over ? zero : one) : gate.a;
  return gate;
}

template <class T> GSA_INLINE Vec<T> rounded(Vec<T> x, DType dtype) {
  with_dtype<T>(dtype, [&](auto* type) GSA_LAMBDA {
    std::remove_pointer_t<decltype(type)> row[LANES<T>];
    store_as<T>(row, x);
    x = load_as<T>(row);
  });
  return x;
}
// x <- silu(x)
template <class T> void silu_row(T* x, int length, DType dtype) {
  for (int i = 0; i < length; i += LANES<T>) {
    const Vec<T> y = load<T>(x + i), one = splat(T(1));
    store<T>(x + i, rounded<T>(y / (one + exp_<T>(-y)), dtype));
  }
}
// x <- x cos + (its halves swapped, the first negated) sin; `spare` is as long as x
template <class T> void rotate_row(T* x, int length, int rotary, const T* cos, const T* sin, T* spare, DType dtype) {
  for (int i = 0; i < length; ++i) {
    const int half = rotary / 2;
    spare[i] = i >= rotary ? T(0) : i < half ? -x[i + half] : x[i - half];
  }
  for (int i = 0; i < length; i += LANES<T>) {
    const Vec<T> a = rounded<T>(load<T>(x + i) * load<T>(cos + i), dtype), b = rounded<T>(load<T>(spare + i) * load<T>(sin + i), dtype);
    store<T>(x + i, rounded<T>(a + b, dtype));
  }
}
// x <- logsigmoid(x) / normalizer
template <class T> void log_gate_row(T* x, int length, T normalizer) {
  for (int i = 0; i < length; i += LANES<T>) {
    const Vec<T> y = load<T>(x + i), zero = splat(T(0)), size = y < zero ? y : -y;
    store<T>(x + i, ((y < zero ? y : zero) - log1p_<T>(exp_<T>(size))) / splat(normalizer));
  }
}

template <class T, class S> void step_items(const StepParams& p, Items& items, int64_t per_item) {
  const int H = p.H, r = p.HQ / p.H, K = p.K, V = p.V, M = p.M;
  T *cos, *sin, *spare;
  const auto plan = [&](Arena& m) GSA_LAMBDA {
    m.take(cos, padded(K)), m.take(sin, padded(K)), m.take(spare, padded(K));
    return Token<T>(m, r, K, V, M);
  };
  Arena measure;
  plan(measure);
  const Scratch scratch(measure.used());
  Arena arena(scratch.memory);
  Token<T> token = plan(arena);
  const bool late = p.rotary || p.silu_qk;         // the scale comes after these
  const int64_t total = p.B * H;
  for (int64_t item; items.next(item);)
    for (int64_t work = item * per_item; work < std::min(total, (item + 1) * per_item); ++work) {
      const Sequence b{work / H, 0, 1};
      const int64_t h = work % H;
      const auto out = [&](int i) GSA_LAMBDA { return rows(p.o, b, h * r + i, false); };
      int64_t row = b.batch;
      if (p.state_indices)
        row = p.indices_64 ? static_cast<const int64_t*>(p.state_indices)[b.batch] : int64_t(static_cast<const int32_t*>(p.state_indices)[b.batch]);
      if (row < 0 || row >= p.P || (p.mask && !p.mask[b.batch])) {
        std::fill_n(token.o, r * token.Vp, T(0));
        for (int i = 0; i < r; ++i) token.write(out(i), 0, i);
        continue;
      }
      S *Hk = static_cast<S*>(p.hk) + (row * H + h) * K * M, *Hv = static_cast<S*>(p.hv) + (row * H + h) * M * V;
      for (int i = 0; i < r; ++i) token.read(token.q + i * token.Kp, token.Kp, rows(p.q, b, h * r + i, false), 0, K, late ? T(1) : T(p.scale));
      token.read(token.k, token.Kp, rows(p.k, b, h, false), 0, K);
      token.read(token.v, token.Vp, rows(p.v, b, h, false), 0, V);
      if (p.rotary) {
        token.read(cos, token.Kp, rows(p.cos, b, 0, false), 0, p.rotary);
        token.read(sin, token.Kp, rows(p.sin, b, 0, false), 0, p.rotary);
        std::fill(cos + p.rotary, cos + token.Kp, T(1));
        for (int i = 0; i < r; ++i) rotate_row(token.q + i * token.Kp, token.Kp, p.rotary, cos, sin, spare, p.q.dtype);
        rotate_row(token.k, token.Kp, p.rotary, cos, sin, spare, p.k.dtype);
      }
      if (p.silu_qk) silu_row(token.q, r * token.Kp, p.q.dtype), silu_row(token.k, token.Kp, p.k.dtype);
      if (p.silu_v) silu_row(token.v, token.Vp, p.v.dtype);
      for (int i = 0; i < r * token.Kp && late; i += LANES<T>) store<T>(token.q + i, load<T>(token.q + i) * T(p.scale));
      if (p.s.ptr) token.read(token.s, token.Mp, rows(p.s, b, h, false), 0, M);
      if (p.g.ptr) {
        token.read(token.a, token.Mp, rows(p.g, b, h, false), 0, M);
        if (p.gate_normalizer != 0) log_gate_row(token.a, token.Mp, T(p.gate_normalizer));
        token.gates(!p.s.ptr);
      } else {
        S* z = static_cast<S*>(p.z) + (row * H + h) * M;
        for (int m = 0; m < M; m += LANES<T>) {
          const AbcGate<T> gate = abc_gate<T>(load_some<T>(z + m, M - m), load<T>(token.s + m), true);
          store_some<T>(z + m, gate.z, M - m);
          store<T>(token.s + m, gate.s);
          store<T>(token.a + m, gate.a);
        }
      }
      token.advance(Hk, Hv);
      for (int i = 0; i < r; ++i) token.write(out(i), 0, i);
    }
}

// Half a megabyte of traffic is not worth waking threads for: from cache one thread is through with it in 7 us, two in 5, but while another process has
// the second one's core it takes a turn of the scheduler's.
template <class T> void step(const StepParams& params) {
  constexpr int64_t alone = 65536, at_a_time = 32768;   // elements of state
  struct Work {
    const StepParams& p;
    int64_t per_item;
  };
  const int64_t head = int64_t(params.K + params.V) * params.M, heads = params.B * params.H;
  const Work work{params, heads * head <= alone ? heads : std::max<int64_t>(1, at_a_time / head)};
  parallel((heads + work.per_item - 1) / work.per_item,
           [](const void* context, Items& items) {
             const auto& w = *static_cast<const Work*>(context);
             if constexpr (sizeof(T) == 8) step_items<T, double>(w.p, items, w.per_item);
             else if (w.p.state_dtype == DType::bf16) step_items<T, bf16>(w.p, items, w.per_item);
             else step_items<T, float>(w.p, items, w.per_item);
           },
           &work);
}
