// The chunked form, forward and backward, with chunks of one tile (16 tokens): on a CPU the state lives in the nearest cache, so a
// longer chunk would only add work inside it.
//
// One tile of one key/value head; i, j tokens of the tile, H the states before it, r query heads per key/value head:
//
//   forward    X_ij  = scale q_i . k_j                                            o1off = decay_down(X, s | scale q Hk)
//              o1_i  = o1off_i + X_ii s_i          p = softmax(o1)
//              A_ij  = decay_dots(p, s)            PU_i = p_i decay(start, i)     o = PU Hv + A v
//              H'    = decay(start, end) H + [k | v]^T w,   w_j = s_j decay(j, end)
//
//   backward   Y_ij  = do_i . v_j                                                 dpoff = decay_down(Y, s | do Hv^T)
//   (forwards) dp_i  = dpoff_i + Y_ii s_i          do1 = p (dp - <p, dp>)
//              D_ij  = decay_dots(do1, s)          DU_i = do1_i decay(start, i)   dq = scale (DU Hk^T + D k)
//              e_i   = sum over the group's heads of o1off do1 + p dpoff
//   (back)     dk    = scale D^T q + w dHk^T       dv = A^T do + w dHv^T
//              late  = k dHk + v dHv^T             dsin  = decay_up(Y, p; X, do1)
//              ds_j  = dsin_j + late_j decay(j, end) + Y_jj p_j + X_jj do1_j
//              dg_t  = sum_{u >= t} (e_u - s_u dsin_u) + sum_{j < t} w_j late_j + decay(start, end) <H, dH>      [coupled: - exp(g) ds]
//              dH    = decay(start, end) dH + [scale q | do]^T [DU | PU]
//
// <H, dH> is the slot-wise sum over K and V. Every term of dg passes the gate of t or cancels against another of the same tile. The
// diagonal (a token reading what it has just written) passes no gate and is kept out, and what dH brings from behind the tile enters as
// a sum that never cancels: so dg fades with the gates as it should, and is exactly 0 where a gate is closed altogether.

template <class T> struct Shape {
  int HQ, H, r, K, V, M, Kp, Vp, Mp;
  T scale;
  explicit Shape(const Params& p)
      : HQ(p.HQ), H(p.H), r(p.HQ / p.H), K(p.K), V(p.V), M(p.M), Kp(padded(p.K)), Vp(padded(p.V)), Mp(padded(p.M)), scale(T(p.scale)) {}
};

inline int64_t initial_row(const Params& p, int64_t n, int64_t h) { return p.h0_broadcast ? h : n * p.H + h; }

// ---- forward ---------------------------------------------------------------------------------------------------------------------
template <class T> struct ForwardScratch {
  T *Hk, *Hv;                          // [K][M], [M][V]
  T *q, *k, *kT, *v;                   // [r][16][K], [16][K], [K][16], [16][V]
  T *a, *s, *w, *total;                // [16][M], ..., [M]
  T *x, *p, *o;                        // [r][16][16], [r][16][M], [r][16][V]
  ForwardScratch(Arena& m, const Shape<T>& d) {
    m.take(Hk, int64_t(d.Kp) * d.Mp), m.take(Hv, int64_t(d.Mp) * d.Vp);
    m.take(q, d.r * TILE * d.Kp), m.take(k, TILE * d.Kp), m.take(kT, TILE * d.Kp), m.take(v, TILE * d.Vp);
    m.take(a, TILE * d.Mp), m.take(s, TILE * d.Mp), m.take(w, TILE * d.Mp), m.take(total, d.Mp);
    m.take(x, d.r * TILE * TILE), m.take(p, d.r * TILE * d.Mp), m.take(o, d.r * TILE * d.Vp);
  }
};

template <class T> void forward_sequence(const ForwardParams& p, const Shape<T>& d, const ForwardScratch<T>& w, int64_t n, int64_t h) {
  const Sequence seq = sequence(p, n);
  const int r = d.r, Kp = d.Kp, Vp = d.Vp, Mp = d.Mp;
  const Rows k = rows(p.k, seq, h, p.reverse), v = rows(p.v, seq, h, p.reverse), g = rows(p.g, seq, h, p.reverse), s = rows(p.s, seq, h, p.reverse);
  const int64_t row0 = initial_row(p, n, h), rowT = n * d.H + h;
  load_state(w.Hk, d.K, d.M, p.hk0, row0 * d.K * d.M, false);
  load_state(w.Hv, d.M, d.V, p.hv0, row0 * d.M * d.V, false);

  for (int64_t t = 0; t < seq.length; t += TILE) {
    const int count = int(std::min<int64_t>(TILE, seq.length - t));
    load_gates(w.a, w.s, g, s, t, count, d.M, Mp);
    load_tile(w.k, Kp, k, t, count, d.K);
    load_tile(w.v, Vp, v, t, count, d.V);
    for (int i = 0; i < r; ++i) load_tile(w.q + i * TILE * Kp, Kp, rows(p.q, seq, h * r + i, p.reverse), t, count, d.K, d.scale);

    transpose(w.kT, TILE, w.k, Kp, TILE, Kp);
    product(r * TILE, TILE, w.x, TILE, {Product<T>{w.q, Kp, 1, w.kT, TILE, d.K}});
    product(r * TILE, Mp, w.p, Mp, {Product<T>{w.q, Kp, 1, w.Hk, Mp, d.K}});
    for (int i = 0; i < r; ++i) {
      T *x = w.x + i * TILE * TILE, *y = w.p + i * TILE * Mp;
      decay_down(x, w.a, w.s, y, Mp);
      for (int row = 0; row < TILE; ++row) {
        T* o1 = y + row * Mp;
        for (int m = 0; m < Mp; m += LANES<T>) store<T>(o1 + m, fma_<T>(splat(x[row * TILE + row]), load<T>(w.s + row * Mp + m), load<T>(o1 + m)));
        softmax(o1, d.M, Mp);
      }
      decay_dots(y, w.a, w.s, x, y, Mp);
    }
    product(r * TILE, Vp, w.o, Vp, {Product<T>{w.p, Mp, 1, w.Hv, Vp, d.M}, Product<T>{w.x, TILE, 1, w.v, Vp, TILE}});
    for (int i = 0; i < r; ++i) store_tile(rows(p.o, seq, h * r + i, p.reverse), t, count, d.V, w.o + i * TILE * Vp, Vp);

    tile_writes(w.a, w.s, w.w, w.total, Mp);
    product<Start::scale_columns>(Kp, Mp, w.Hk, Mp, {Product<T>{w.k, 1, Kp, w.w, Mp, TILE}}, w.Hk, Mp, w.total);
    product<Start::scale_rows>(Mp, Vp, w.Hv, Vp, {Product<T>{w.w, 1, Mp, w.v, Vp, TILE}}, w.Hv, Vp, w.total);
  }
  store_state(p.hkT, rowT * d.K * d.M, w.Hk, d.K, d.M, false);
  store_state(p.hvT, rowT * d.M * d.V, w.Hv, d.M, d.V, false);
}

template <class T> void chunk_forward(const ForwardParams& params) {
  parallel(
      params.N * params.H,
      [](const void* context, Items& items) {
        const auto& p = *static_cast<const ForwardParams*>(context);
        const Shape<T> shape(p);
        Arena measure;
        ForwardScratch<T>(measure, shape);
        const Scratch scratch(measure.used());
        Arena arena(scratch.memory);
        const ForwardScratch<T> tiles(arena, shape);
        for (int64_t item; items.next(item);) forward_sequence(p, shape, tiles, item / p.H, item % p.H);
      },
      &params);
}

// ---- backward --------------------------------------------------------------------------------------------------------------------
// A sequence is walked back in segments of a few tiles. A first pass keeps the states before each segment; then, from the last segment
// to the first, its tiles are recomputed forwards into a stash that fits the second-level cache, and walked back from there.
// States here are [K + V][M]: rows 0 .. K - 1 are Hk, the others Hv transposed.
template <class T> struct Stash {        // of one tile
  T *q, *k, *v, *d_o;                    // [r][16][K] (times scale), [16][K], [16][V], [r][16][V]
  T *a, *s, *w, *total, *e;              // [16][M], [M], [16][M]
  T *X, *Y, *A, *D;                      // [r][16][16]
  T *p, *do1, *PU, *DU;                  // [r][16][M]
  T* H;                                  // [K + V][M] after the tile
  Stash(Arena& m, const Shape<T>& d) {
    m.take(q, d.r * TILE * d.Kp), m.take(k, TILE * d.Kp), m.take(v, TILE * d.Vp), m.take(d_o, d.r * TILE * d.Vp);
    m.take(a, TILE * d.Mp), m.take(s, TILE * d.Mp), m.take(w, TILE * d.Mp), m.take(total, d.Mp), m.take(e, TILE * d.Mp);
    for (T** x : {&X, &Y, &A, &D}) m.take(*x, d.r * TILE * TILE);
    for (T** x : {&p, &do1, &PU, &DU}) m.take(*x, d.r * TILE * d.Mp);
    m.take(H, int64_t(d.Kp + d.Vp) * d.Mp);
  }
};

template <class T> struct BackwardScratch {
  Stash<T>* stash;                       // one for each tile of a segment
  T* states;                             // [segments][K + V][M] before each segment
  T* dH;                                 // [K + V][M]
  T *kT, *vT, *o1, *dp;                  // [K][16], [V][16], [r][16][M], [r][16][M]
  T *slots, *wide;                       // [M][16], [max(K, V)][16]
  T *dk, *ds, *dg, *late;                // [16][max(K, V)], [16][M], [16][M], [16][M]
};

template <class T> class Backward {
 public:
  Backward(const BackwardParams& p) : p(p), d(p), state_size(int64_t(d.Kp + d.Vp) * d.Mp), tiles(tiles_per_segment(d)) {
    int64_t longest = 0;
    for (int64_t n = 0; n < p.N; ++n) longest = std::max(longest, sequence(p, n).length);
    Arena measure;
    Stash<T>(measure, d);
    stash_bytes = measure.used();
    const int64_t wide = std::max(d.Kp, d.Vp);
    const auto plan = [&](Arena& m) GSA_LAMBDA {
      m.take(w.stash, tiles);
      m.take(w.states, state_size * (longest / (tiles * TILE) + 1)), m.take(w.dH, state_size);
      m.take(w.kT, TILE * d.Kp), m.take(w.vT, TILE * d.Vp), m.take(w.o1, d.r * TILE * d.Mp), m.take(w.dp, d.r * TILE * d.Mp);
      m.take(w.slots, TILE * d.Mp), m.take(w.wide, TILE * wide), m.take(w.dk, TILE * wide);
      m.take(w.ds, TILE * d.Mp), m.take(w.dg, TILE * d.Mp), m.take(w.late, TILE * d.Mp);
    };
    Arena size;
    plan(size);
    scratch.reset(new Scratch(size.used() + tiles * stash_bytes));
    Arena arena(scratch->memory);
    plan(arena);
    for (int i = 0; i < tiles; ++i) {
      Arena own(scratch->memory + arena.used() + i * stash_bytes);
      new (&w.stash[i]) Stash<T>(own, d);
    }
  }

  void run(int64_t n, int64_t h) {
    seq = sequence(p, n), head = h;
    const auto of = [&](const View& v) GSA_LAMBDA { return rows(v, seq, h, p.reverse); };
    k = of(p.k), v = of(p.v), g = of(p.g), s = of(p.s), dk = of(p.dk), dv = of(p.dv), ds = of(p.ds), dg = of(p.dg);
    const int64_t row0 = initial_row(p, n, h), row = n * d.H + h, Kd = int64_t(d.Kp) * d.Mp, length = seq.length;
    const int64_t span = int64_t(tiles) * TILE, segments = (length + span - 1) / span;

    load_state(w.states, d.K, d.M, p.hk0, row0 * d.K * d.M, false);
    load_state(w.states + Kd, d.V, d.M, p.hv0, row0 * d.M * d.V, true);
    for (int64_t segment = 0; segment + 1 < segments; ++segment)
      for (int i = 0; i < tiles; ++i) {
        T *from = w.states + segment * state_size, *to = from + state_size;
        Stash<T>& tile = w.stash[0];
        load_tokens(tile, segment * span + i * TILE, TILE);
        advance(tile, i ? to : from, to);
      }

    load_state(w.dH, d.K, d.M, p.dhkT, row * d.K * d.M, false);
    load_state(w.dH + Kd, d.V, d.M, p.dhvT, row * d.M * d.V, true);
    for (int64_t segment = segments - 1; segment >= 0; --segment) {
      const int64_t start = segment * span;
      const int count = int(std::min<int64_t>(tiles, (length - start + TILE - 1) / TILE));
      const auto before = [&](int i) GSA_LAMBDA { return i ? w.stash[i - 1].H : w.states + segment * state_size; };
      for (int i = 0; i < count; ++i) forwards(w.stash[i], before(i), start + i * TILE);
      for (int i = count - 1; i >= 0; --i) back(w.stash[i], before(i), start + i * TILE);
    }
    store_state(p.dhk0, row * d.K * d.M, w.dH, d.K, d.M, false);
    store_state(p.dhv0, row * d.M * d.V, w.dH + Kd, d.V, d.M, true);
  }

 private:
  // As many tiles as fit the second-level cache, and few enough for the states before the segments to stay small.
  static int tiles_per_segment(const Shape<T>& d) {
    Arena measure;
    Stash<T>(measure, d);
    return int(std::clamp<int64_t>((640 << 10) / measure.used(), 2, 16));
  }
  int rows_in(int64_t t) const { return int(std::min<int64_t>(TILE, seq.length - t)); }

  void load_tokens(Stash<T>& x, int64_t t, int count) {
    load_gates(x.a, x.s, g, s, t, count, d.M, d.Mp);
    load_tile(x.k, d.Kp, k, t, count, d.K);
    load_tile(x.v, d.Vp, v, t, count, d.V);
  }

  void advance(Stash<T>& x, const T* H, T* next) {
    const int64_t Kd = int64_t(d.Kp) * d.Mp;
    tile_writes(x.a, x.s, x.w, x.total, d.Mp);
    product<Start::scale_columns>(d.Kp, d.Mp, next, d.Mp, {Product<T>{x.k, 1, d.Kp, x.w, d.Mp, TILE}}, H, d.Mp, x.total);
    product<Start::scale_columns>(d.Vp, d.Mp, next + Kd, d.Mp, {Product<T>{x.v, 1, d.Vp, x.w, d.Mp, TILE}}, H + Kd, d.Mp, x.total);
  }

  void forwards(Stash<T>& x, const T* H, int64_t t) {
    constexpr int W = LANES<T>;
    const int r = d.r, Kp = d.Kp, Vp = d.Vp, Mp = d.Mp, count = rows_in(t);
    const T* HvT = H + int64_t(Kp) * Mp;
    load_tokens(x, t, count);
    for (int i = 0; i < r; ++i) {
      load_tile(x.q + i * TILE * Kp, Kp, rows(p.q, seq, head * r + i, p.reverse), t, count, d.K, d.scale);
      load_tile(x.d_o + i * TILE * Vp, Vp, rows(p.d_o, seq, head * r + i, p.reverse), t, count, d.V);
    }
    transpose(w.kT, TILE, x.k, Kp, TILE, Kp);
    transpose(w.vT, TILE, x.v, Vp, TILE, Vp);
    product(r * TILE, TILE, x.X, TILE, {Product<T>{x.q, Kp, 1, w.kT, TILE, d.K}});
    product(r * TILE, TILE, x.Y, TILE, {Product<T>{x.d_o, Vp, 1, w.vT, TILE, d.V}});
    product(r * TILE, Mp, w.o1, Mp, {Product<T>{x.q, Kp, 1, H, Mp, d.K}});
    product(r * TILE, Mp, w.dp, Mp, {Product<T>{x.d_o, Vp, 1, HvT, Mp, d.V}});
    for (int i = 0; i < r; ++i) {
      const int64_t at = int64_t(i) * TILE * Mp, square = int64_t(i) * TILE * TILE;
      decay_down(x.X + square, x.a, x.s, w.o1 + at, Mp);
      decay_down(x.Y + square, x.a, x.s, w.dp + at, Mp);
      for (int row = 0; row < TILE; ++row) {
        const Vec<T> x_ii = splat(x.X[square + row * (TILE + 1)]), y_ii = splat(x.Y[square + row * (TILE + 1)]);
        const T *o1 = w.o1 + at + row * Mp, *dp = w.dp + at + row * Mp, *s_i = x.s + row * Mp;
        T *p_i = x.p + at + row * Mp, *do1 = x.do1 + at + row * Mp, *e = x.e + row * Mp;
        for (int m = 0; m < Mp; m += W) store<T>(p_i + m, fma_<T>(x_ii, load(s_i + m), load(o1 + m)));
        softmax(p_i, d.M, Mp);
        Vec<T> sum = splat(T(0));
        for (int m = 0; m < Mp; m += W) sum = fma_<T>(load(p_i + m), fma_<T>(y_ii, load(s_i + m), load(dp + m)), sum);
        const T mean = sum_lanes<T>(sum);
        for (int m = 0; m < Mp; m += W) {
          const Vec<T> pm = load(p_i + m), dpoff = load(dp + m);
          const Vec<T> dm = pm * (fma_<T>(y_ii, load(s_i + m), dpoff) - mean);
          const Vec<T> before = i ? load(e + m) : splat(T(0));
          store<T>(do1 + m, dm);
          store<T>(e + m, fma_<T>(load(o1 + m), dm, fma_<T>(pm, dpoff, before)));
        }
      }
      decay_dots(x.p + at, x.a, x.s, x.A + square, x.PU + at, Mp);
      decay_dots(x.do1 + at, x.a, x.s, x.D + square, x.DU + at, Mp);

      T square_T[TILE * TILE];
      transpose(square_T, TILE, x.D + square, TILE, TILE, TILE);
      transpose(w.slots, TILE, x.DU + at, Mp, TILE, Mp);
      product(Kp, TILE, w.wide, TILE, {Product<T>{H, Mp, 1, w.slots, TILE, d.M}, Product<T>{x.k, 1, Kp, square_T, TILE, TILE}});
      transpose(w.dk, Kp, w.wide, TILE, Kp, TILE);
      store_tile(rows(p.dq, seq, head * r + i, p.reverse), t, count, d.K, w.dk, Kp, d.scale);
    }
    advance(x, H, x.H);
  }

  void back(Stash<T>& x, const T* H, int64_t t) {
    constexpr int W = LANES<T>;
    const int r = d.r, Kp = d.Kp, Vp = d.Vp, Mp = d.Mp, count = rows_in(t);
    T *dHk = w.dH, *dHvT = w.dH + int64_t(Kp) * Mp;

    transpose(w.slots, TILE, x.w, Mp, TILE, Mp);
    product(Kp, TILE, w.wide, TILE, {Product<T>{dHk, Mp, 1, w.slots, TILE, d.M}, Product<T>{x.q, 1, Kp, x.D, TILE, r * TILE}});
    transpose(w.dk, Kp, w.wide, TILE, Kp, TILE);
    store_tile(dk, t, count, d.K, w.dk, Kp);
    product(Vp, TILE, w.wide, TILE, {Product<T>{dHvT, Mp, 1, w.slots, TILE, d.M}, Product<T>{x.d_o, 1, Vp, x.A, TILE, r * TILE}});
    transpose(w.dk, Vp, w.wide, TILE, Vp, TILE);
    store_tile(dv, t, count, d.V, w.dk, Vp);

    product<Start::zero, 32>(TILE, Mp, w.late, Mp, {Product<T>{x.k, Kp, 1, dHk, Mp, d.K}, Product<T>{x.v, Vp, 1, dHvT, Mp, d.V}});
    for (int m = 0; m < Mp; m += W) {
      Vec<T> sum[8];
      unroll<8>([&](auto u) GSA_LAMBDA { sum[u] = splat(T(0)); });
      for (int row = 0; row < Kp + Vp; row += 8) {
        const int64_t at = int64_t(row) * Mp + m;
        unroll<8>([&](auto u) GSA_LAMBDA { sum[u] = fma_<T>(load(H + at + u * Mp), load(w.dH + at + u * Mp), sum[u]); });
      }
      Vec<T> before = (((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]))) * load(x.total + m);
      for (int j = 0; j < TILE; ++j) {                                  // what the tokens before j hand to the end of the tile
        store<T>(w.dg + j * Mp + m, before);
        before = fma_<T>(load(x.w + j * Mp + m), load(w.late + j * Mp + m), before);
      }
    }
    std::memset(static_cast<void*>(w.ds), 0, sizeof(T) * TILE * Mp);
    decay_up(r, x.Y, x.p, x.X, x.do1, x.a, w.ds, Mp);

    for (int m = 0; m < Mp; m += W) {
      Vec<T> run = splat(T(0)), left = splat(T(1));
      for (int j = count - 1; j >= 0; --j) {
        const int64_t at = int64_t(j) * Mp + m;
        const Vec<T> aj = load(x.a + at);
        Vec<T> dsj = load(w.ds + at);
        run += fma_<T>(-load(x.s + at), dsj, load(x.e + at));
        run = aj == T(0) ? splat(T(0)) : run;
        dsj = fma_<T>(load(w.late + at), left, dsj);
        left *= aj;
        for (int i = 0; i < r; ++i) {
          const int64_t here = int64_t(i) * TILE * Mp + at, diagonal = i * TILE * TILE + j * (TILE + 1);
          dsj += fma_<T>(splat(x.Y[diagonal]), load(x.p + here), splat(x.X[diagonal]) * load(x.do1 + here));
        }
        const Vec<T> dgj = run + load(w.dg + at);
        store<T>(w.ds + at, dsj);
        store<T>(w.dg + at, s ? dgj : fma_<T>(-aj, dsj, dgj));
      }
    }
    if (ds) store_tile(ds, t, count, d.M, w.ds, Mp);
    store_tile(dg, t, count, d.M, w.dg, Mp);

    product<Start::scale_columns>(Kp, Mp, dHk, Mp, {Product<T>{x.q, 1, Kp, x.DU, Mp, r * TILE}}, dHk, Mp, x.total);
    product<Start::scale_columns>(Vp, Mp, dHvT, Mp, {Product<T>{x.d_o, 1, Vp, x.PU, Mp, r * TILE}}, dHvT, Mp, x.total);
  }

  const BackwardParams& p;
  const Shape<T> d;
  const int64_t state_size;
  const int tiles;
  int64_t stash_bytes;
  std::unique_ptr<Scratch> scratch;
  BackwardScratch<T> w;
  Sequence seq;
  int64_t head;
  Rows k, v, g, s, dk, dv, ds, dg;
};

template <class T> void chunk_backward(const BackwardParams& params) {
  parallel(
      params.N * params.H,
      [](const void* context, Items& items) {
        const auto& p = *static_cast<const BackwardParams*>(context);
        Backward<T> backward(p);
        for (int64_t item; items.next(item);) backward.run(item / p.H, item % p.H);
      },
      &params);
}
