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

inline int64_t initial_row(const Params& p, int64_t n, int64_t h) { return p.h0_broadcast ? h : state_row(p, n) * p.H + h; }

// What a key/value head reads, tokens in the order they are visited.
struct Head {
  Rows k, v, g, s;
  Head() = default;
  Head(const Params& p, const Sequence& seq, int64_t h)
      : k(rows(p.k, seq, h, p.reverse)), v(rows(p.v, seq, h, p.reverse)), g(rows(p.g, seq, h, p.reverse)), s(rows(p.s, seq, h, p.reverse)) {}
};

// One tile of it.
template <class T> struct Tokens {
  T *k, *v, *a, *s, *w, *total;          // [16][K], [16][V], [16][M], ..., [M]
  void take(Arena& m, const Shape<T>& d) {
    m.take(k, TILE * d.Kp), m.take(v, TILE * d.Vp);
    m.take(a, TILE * d.Mp), m.take(s, TILE * d.Mp), m.take(w, TILE * d.Mp), m.take(total, d.Mp);
  }
  void load(const Shape<T>& d, const Head& head, int64_t t, int count) const {
    load_gates(a, s, head.g, head.s, t, count, d.M, d.Mp);
    load_tile(k, d.Kp, head.k, t, count, d.K);
    load_tile(v, d.Vp, head.v, t, count, d.V);
  }
  void advance(const Shape<T>& d, const T* H, T* next) const {         // states [K + V][M]
    const int64_t Kd = int64_t(d.Kp) * d.Mp;
    tile_writes(a, s, w, total, d.Mp);
    product<Start::scale_columns>(d.Kp, d.Mp, next, d.Mp, {Product<T>{k, 1, d.Kp, w, d.Mp, TILE}}, H, d.Mp, total);
    product<Start::scale_columns>(d.Vp, d.Mp, next + Kd, d.Mp, {Product<T>{v, 1, d.Vp, w, d.Mp, TILE}}, H + Kd, d.Mp, total);
  }
};

// ---- along time ------------------------------------------------------------------------------------------------------------------
// Where sequences and heads are fewer than threads, a sequence is cut into pieces (`cut` in cpu.cpp), and threads work on them side by side.
// A piece is walked twice: for what it hands on when it starts from nothing, and, once the pieces are joined, for its results.
//
//   H (behind)  = decay(piece) H (before)  + what the piece adds from H = 0              over the pieces from first to last
//   dH (before) = decay(piece) dH (behind) + what the piece adds from dH = 0             from last to first
//
// So no piece waits for its neighbour, and the first (last) needs one walk only. States are [K + V][M]: rows 0 .. K - 1 are Hk, the others
// Hv transposed, and every slot m is a column that fades by one factor.

// States between the tokens of split sequences, and the factors they are joined with.
template <class T> class Joints {
 public:
  Joints(const Shape<T>& d, int64_t states) : size(int64_t(d.Kp + d.Vp) * d.Mp), step(size + d.Mp), states_(states) {
    if (states) scratch_.reset(new Scratch(states * d.H * step * int64_t(sizeof(T))));
  }
  T* state(int64_t head, int64_t i) const { return reinterpret_cast<T*>(scratch_->memory) + (head * states_ + i) * step; }
  T* decay(int64_t head, int64_t i) const { return state(head, i) + size; }      // from the start of the piece on, [M]
  const int64_t size, step;            // of one state, from one to the next

 private:
  const int64_t states_;
  std::unique_ptr<Scratch> scratch_;
};

// From the states H before token begin on: those behind every `unit` tokens and behind token end - 1, to `next` and in steps of `step` from
// there; with what is left of H there in `decay` (nullptr: not asked for).
template <class T>
void sweep(const Shape<T>& d, const Tokens<T>& x, const Head& head, int64_t begin, int64_t end, int64_t unit, const T* H, T* next, T* decay, int64_t step) {
  const T* left = nullptr;
  for (int64_t t = begin; t < end; t += TILE) {
    x.load(d, head, t, int(std::min<int64_t>(TILE, end - t)));
    x.advance(d, H, next);
    if (decay)
      for (int m = 0; m < d.Mp; m += LANES<T>) store<T>(decay + m, left ? load(left + m) * load(x.total + m) : load(x.total + m));
    H = next, left = decay;
    if ((t + TILE - begin) % unit == 0) next += step, decay = decay ? decay + step : nullptr;
  }
}

// to += decay * from: 16 rows of the states
template <class T> void join_rows(T* to, const T* from, const T* decay, int64_t row, int64_t Mp) {
  for (int64_t i = row * Mp; i < (row + TILE) * Mp; i += Mp)
    for (int64_t m = 0; m < Mp; m += LANES<T>) store<T>(to + i + m, fma_<T>(load(decay + m), load(from + i + m), load(to + i + m)));
}

// f(worker of this thread, piece, head) for the first `count` pieces and all heads; threads take them as they come.
template <class Worker, class P, class F> void for_pieces(const P& p, const Pieces& pieces, int64_t count, const F& f) {
  struct Work {
    const P& p;
    const Pieces& pieces;
    const F& f;
  } work{p, pieces, f};
  parallel(
      count * p.H,
      [](const void* context, Items& items) {
        const auto& w = *static_cast<const Work*>(context);
        Worker worker(w.p, w.pieces);
        for (int64_t item; items.next(item);) w.f(worker, w.pieces.list[item / w.p.H], item % w.p.H);
      },
      &work);
}

// f(the pieces of a split sequence, head, row) for every 16 rows of its states
template <class T, class F> void for_joins(const Shape<T>& d, const Pieces& pieces, const F& f) {
  struct Work {
    const Pieces& pieces;
    const F& f;
    int64_t heads, blocks;
  } work{pieces, f, d.H, (d.Kp + d.Vp) / TILE};
  parallel(
      pieces.split * work.heads * work.blocks,
      [](const void* context, Items& items) {
        const auto& w = *static_cast<const Work*>(context);
        for (int64_t item; items.next(item);) {
          const Piece* piece = &w.pieces.list[item / w.blocks / w.heads];
          if (piece->first()) w.f(piece, item / w.blocks % w.heads, item % w.blocks * TILE);
        }
      },
      &work);
}

// Over the states before every unit, of which those of the first piece are right already and the others began at 0 in each piece.
template <class T> void join_states(const Shape<T>& d, const Pieces& pieces, const Joints<T>& H) {
  for_joins(d, pieces, [&](const Piece* piece, int64_t head, int64_t row) {
    while (!piece++->last())
      for (int64_t i = 1; i < piece->units + !piece->last(); ++i)
        join_rows(H.state(head, piece->unit + i), H.state(head, piece->unit), H.decay(head, piece->unit + i), row, d.Mp);
  });
}

// ---- forward ---------------------------------------------------------------------------------------------------------------------
template <class T> struct ForwardScratch : Tokens<T> {
  T *Hk, *Hv;                          // [K][M], [M][V], side by side
  T *q, *kT;                           // [r][16][K], [K][16]
  T *x, *p, *o;                        // [r][16][16], [r][16][M], [r][16][V]
  ForwardScratch(Arena& m, const Shape<T>& d) {
    m.take(Hk, int64_t(d.Kp + d.Vp) * d.Mp), Hv = Hk + int64_t(d.Kp) * d.Mp;
    m.take(q, d.r * TILE * d.Kp), m.take(kT, TILE * d.Kp);
    this->take(m, d);
    m.take(x, d.r * TILE * TILE), m.take(p, d.r * TILE * d.Mp), m.take(o, d.r * TILE * d.Vp);
  }
};

template <class T> class Forward {
 public:
  Forward(const ForwardParams& p, const Pieces&) : p(p), d(p), scratch(measure(d)), arena(scratch.memory), w(arena, d) {}

  // What a piece hands on, starting from nothing.
  void hand_on(const Piece& piece, int64_t h, const Joints<T>& H) {
    T* next = H.state(h, piece.unit + 1);
    std::memset(static_cast<void*>(w.Hk), 0, sizeof(T) * H.size);
    sweep(d, w, Head(p, sequence(p, piece.n), h), piece.begin, piece.end, piece.end - piece.begin, w.Hk, next, H.decay(h, piece.unit + 1), 0);
  }

  void run(const Piece& piece, int64_t h, const Joints<T>& H) {
    const Sequence seq = sequence(p, piece.n);
    const int r = d.r, Kp = d.Kp, Vp = d.Vp, Mp = d.Mp;
    const int64_t row0 = initial_row(p, piece.n, h), rowT = state_row(p, piece.n) * d.H + h, Kd = int64_t(Kp) * Mp;
    if (rowT < 0) return zero_padding(p, piece.n, h);
    const Head head(p, seq, h);
    if (piece.first()) {
      load_state(w.Hk, d.K, d.M, p.hk0, row0 * d.K * d.M, false, p.state_dtype);
      load_state(w.Hv, d.M, d.V, p.hv0, row0 * d.M * d.V, false, p.state_dtype);
    } else {
      const T* before = H.state(h, piece.unit);
      std::memcpy(w.Hk, before, sizeof(T) * Kd);
      transpose(w.Hv, Vp, before + Kd, Mp, Vp, Mp);
    }

    for (int64_t t = piece.begin; t < piece.end; t += TILE) {
      const int count = int(std::min<int64_t>(TILE, piece.end - t));
      w.load(d, head, t, count);
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
    if (piece.last()) {
      store_state(p.hkT, rowT * d.K * d.M, w.Hk, d.K, d.M, false, p.state_dtype);
      store_state(p.hvT, rowT * d.M * d.V, w.Hv, d.M, d.V, false, p.state_dtype);
    } else if (piece.first()) {
      T* behind = H.state(h, piece.unit + 1);
      std::memcpy(behind, w.Hk, sizeof(T) * Kd);
      transpose(behind + Kd, Mp, w.Hv, Vp, Mp, Vp);
    }
  }

 private:
  static int64_t measure(const Shape<T>& d) {
    Arena m;
    ForwardScratch<T>(m, d);
    return m.used();
  }
  const ForwardParams& p;
  const Shape<T> d;
  const Scratch scratch;
  Arena arena;
  const ForwardScratch<T> w;
};

template <class T> void chunk_forward(const ForwardParams& p) {
  Pieces pieces = cut(p, TILE);
  for (int64_t i = 0; i < pieces.split; ++i) pieces.list[i].unit = i, pieces.list[i].units = 1;      // states between pieces only
  const Joints<T> H(Shape<T>(p), pieces.split);
  if (pieces.split) {
    for_pieces<Forward<T>>(p, pieces, pieces.split, [&](Forward<T>& worker, const Piece& piece, int64_t h) {
      if (piece.first()) worker.run(piece, h, H);
      else if (!piece.last()) worker.hand_on(piece, h, H);
    });
    join_states(Shape<T>(p), pieces, H);
  }
  for_pieces<Forward<T>>(p, pieces, pieces.list.size(), [&](Forward<T>& worker, const Piece& piece, int64_t h) {
    if (!piece.split() || !piece.first()) worker.run(piece, h, H);
  });
}

// ---- backward --------------------------------------------------------------------------------------------------------------------
// A sequence is walked back in segments of a few tiles. A first pass keeps the states before each segment; then, from the last segment
// to the first, its tiles are recomputed forwards into a stash that fits the second-level cache, and walked back from there.
// States here are [K + V][M]: rows 0 .. K - 1 are Hk, the others Hv transposed. Sequences are cut into pieces between segments.
template <class T> struct Stash : Tokens<T> {        // of one tile
  T *q, *d_o, *e;                        // [r][16][K] (times scale), [r][16][V], [16][M]
  T *X, *Y, *A, *D;                      // [r][16][16]
  T *p, *do1, *PU, *DU;                  // [r][16][M]
  T* H;                                  // [K + V][M] after the tile
  Stash(Arena& m, const Shape<T>& d) {
    this->take(m, d);
    m.take(q, d.r * TILE * d.Kp), m.take(d_o, d.r * TILE * d.Vp), m.take(e, TILE * d.Mp);
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
  Backward(const BackwardParams& p, const Pieces& pieces)
      : p(p), d(p), state_size(int64_t(d.Kp + d.Vp) * d.Mp), tiles(tiles_per_segment(d)), span(int64_t(tiles) * TILE) {
    const int64_t stash_bytes = measure(d), wide = std::max(d.Kp, d.Vp);
    const auto plan = [&](Arena& m) GSA_LAMBDA {
      m.take(w.stash, tiles);
      m.take(w.states, state_size * (pieces.longest / span + 1)), m.take(w.dH, state_size);
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

  // As many tiles as fit the second-level cache, and few enough for the states before the segments to stay small.
  static int tiles_per_segment(const Shape<T>& d) { return int(std::clamp<int64_t>((640 << 10) / measure(d), 2, 16)); }

  // The states before each segment of a piece and behind the piece; but for the first piece, as if there were none before it.
  void keep_states(const Piece& piece, int64_t h, const Joints<T>& H) {
    open(piece, h);
    T *before = w.dH, *next = H.state(h, piece.unit + 1), *decay = H.decay(h, piece.unit + 1);
    if (piece.first()) load_initial(before = H.state(h, piece.unit)), decay = nullptr;
    else std::memset(static_cast<void*>(before), 0, sizeof(T) * state_size);
    sweep(d, w.stash[0], head, piece.begin, piece.last() ? last_segment(piece) : piece.end, span, before, next, decay, H.step);
  }

  // What a piece adds to dH, as if there were none behind it.
  void reach_back(const Piece& piece, int64_t h, const Joints<T>& H, const Joints<T>& dH, int64_t i) {
    open(piece, h);
    std::memset(static_cast<void*>(w.dH), 0, sizeof(T) * state_size);
    walk(piece, H.state(h, piece.unit), H.step, false);
    std::memcpy(dH.state(h, i - 1), w.dH, sizeof(T) * state_size);
  }

  void run(const Piece& piece, int64_t h, const Joints<T>& H, const Joints<T>& dH, int64_t i) {
    open(piece, h);
    const int64_t row = piece.n * d.H + h, Kd = int64_t(d.Kp) * d.Mp;
    if (!piece.split()) {
      load_initial(w.states);
      sweep<T>(d, w.stash[0], head, 0, last_segment(piece), span, w.states, w.states + state_size, nullptr, state_size);
    }
    if (piece.last()) {
      load_state(w.dH, d.K, d.M, p.dhkT, row * d.K * d.M, false);
      load_state(w.dH + Kd, d.V, d.M, p.dhvT, row * d.M * d.V, true);
    } else {
      std::memcpy(w.dH, dH.state(h, i), sizeof(T) * state_size);
    }
    if (piece.split()) walk(piece, H.state(h, piece.unit), H.step, true);
    else walk(piece, w.states, state_size, true);
    if (piece.first()) {
      store_state(p.dhk0, row * d.K * d.M, w.dH, d.K, d.M, false);
      store_state(p.dhv0, row * d.M * d.V, w.dH + Kd, d.V, d.M, true);
    } else if (piece.last()) {
      std::memcpy(dH.state(h, i - 1), w.dH, sizeof(T) * state_size);
    }
  }

 private:
  static int64_t measure(const Shape<T>& d) {
    Arena m;
    Stash<T>(m, d);
    return m.used();
  }
  int64_t last_segment(const Piece& piece) const { return std::max<int64_t>(0, (piece.end - 1) / span * span); }
  int rows_in(int64_t t) const { return int(std::min<int64_t>(TILE, seq.length - t)); }

  void open(const Piece& piece, int64_t h) {
    seq = sequence(p, piece.n), query = h * d.r, head = Head(p, seq, h);
    const auto of = [&](const View& v) GSA_LAMBDA { return rows(v, seq, h, p.reverse); };
    dk = of(p.dk), dv = of(p.dv), ds = of(p.ds), dg = of(p.dg), row0 = initial_row(p, piece.n, h);
  }
  void load_initial(T* H) const {
    load_state(H, d.K, d.M, p.hk0, row0 * d.K * d.M, false);
    load_state(H + int64_t(d.Kp) * d.Mp, d.V, d.M, p.hv0, row0 * d.M * d.V, true);
  }

  // From the last segment of a piece to its first; `states` before its first segment, and in steps of `step` before the others. Into dH only, or
  // into all the gradients.
  void walk(const Piece& piece, const T* states, int64_t step, bool whole) {
    for (int64_t segment = piece.units - 1; segment >= 0; --segment) {
      const int64_t start = piece.begin + segment * span;
      const int count = int((std::min(span, piece.end - start) + TILE - 1) / TILE);
      const auto before = [&](int i) GSA_LAMBDA { return i ? w.stash[i - 1].H : states + segment * step; };
      for (int i = 0; i < count; ++i) forwards(w.stash[i], before(i), start + i * TILE, whole);
      for (int i = count - 1; i >= 0; --i) {
        if (whole) back(w.stash[i], before(i), start + i * TILE);
        advance_back(w.stash[i]);
      }
    }
  }

  void forwards(Stash<T>& x, const T* H, int64_t t, bool whole) {
    constexpr int W = LANES<T>;
    const int r = d.r, Kp = d.Kp, Vp = d.Vp, Mp = d.Mp, count = rows_in(t);
    const T* HvT = H + int64_t(Kp) * Mp;
    x.load(d, head, t, count);
    for (int i = 0; i < r; ++i) {
      load_tile(x.q + i * TILE * Kp, Kp, rows(p.q, seq, query + i, p.reverse), t, count, d.K, d.scale);
      load_tile(x.d_o + i * TILE * Vp, Vp, rows(p.d_o, seq, query + i, p.reverse), t, count, d.V);
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

      if (!whole) continue;
      T square_T[TILE * TILE];
      transpose(square_T, TILE, x.D + square, TILE, TILE, TILE);
      transpose(w.slots, TILE, x.DU + at, Mp, TILE, Mp);
      product(Kp, TILE, w.wide, TILE, {Product<T>{H, Mp, 1, w.slots, TILE, d.M}, Product<T>{x.k, 1, Kp, square_T, TILE, TILE}});
      transpose(w.dk, Kp, w.wide, TILE, Kp, TILE);
      store_tile(rows(p.dq, seq, query + i, p.reverse), t, count, d.K, w.dk, Kp, d.scale);
    }
    x.advance(d, H, x.H);
  }

  void back(Stash<T>& x, const T* H, int64_t t) {
    constexpr int W = LANES<T>;
    const int r = d.r, Kp = d.Kp, Vp = d.Vp, Mp = d.Mp, count = rows_in(t);
    const T *dHk = w.dH, *dHvT = w.dH + int64_t(Kp) * Mp;

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
        store<T>(w.dg + at, head.s ? dgj : fma_<T>(-aj, dsj, dgj));
      }
    }
    if (ds) store_tile(ds, t, count, d.M, w.ds, Mp);
    store_tile(dg, t, count, d.M, w.dg, Mp);
  }

  void advance_back(const Stash<T>& x) {
    const int64_t r = d.r, Kp = d.Kp, Vp = d.Vp, Mp = d.Mp;
    T *dHk = w.dH, *dHvT = w.dH + Kp * Mp;
    product<Start::scale_columns>(Kp, Mp, dHk, Mp, {Product<T>{x.q, 1, Kp, x.DU, Mp, int(r) * TILE}}, dHk, Mp, x.total);
    product<Start::scale_columns>(Vp, Mp, dHvT, Mp, {Product<T>{x.d_o, 1, Vp, x.PU, Mp, int(r) * TILE}}, dHvT, Mp, x.total);
  }

  const BackwardParams& p;
  const Shape<T> d;
  const int64_t state_size;
  const int tiles;
  const int64_t span;                    // tokens of a segment
  std::unique_ptr<Scratch> scratch;
  BackwardScratch<T> w;
  Sequence seq;                          // what is being worked on: a sequence, a head
  int64_t query, row0;
  Head head;
  Rows dk, dv, ds, dg;
};

template <class T> void chunk_backward(const BackwardParams& p) {
  const Shape<T> d(p);
  const Pieces pieces = cut(p, Backward<T>::tiles_per_segment(d) * TILE);
  const Joints<T> H(d, pieces.units), dH(d, pieces.split);      // before every segment; behind every piece
  const auto number = [&](const Piece& piece) GSA_LAMBDA { return &piece - pieces.list.data(); };
  if (pieces.split) {
    for_pieces<Backward<T>>(p, pieces, pieces.split, [&](Backward<T>& worker, const Piece& piece, int64_t h) { worker.keep_states(piece, h, H); });
    join_states(d, pieces, H);
    for_pieces<Backward<T>>(p, pieces, pieces.split, [&](Backward<T>& worker, const Piece& piece, int64_t h) {
      if (piece.last()) worker.run(piece, h, H, dH, number(piece));
      else if (!piece.first()) worker.reach_back(piece, h, H, dH, number(piece));
    });
    for_joins(d, pieces, [&](const Piece* piece, int64_t h, int64_t row) {
      for (piece += piece->count - 2; !piece->first(); --piece)
        join_rows(dH.state(h, number(*piece) - 1), dH.state(h, number(*piece)), H.decay(h, piece->unit + piece->units), row, d.Mp);
    });
  }
  for_pieces<Backward<T>>(p, pieces, pieces.list.size(), [&](Backward<T>& worker, const Piece& piece, int64_t h) {
    if (!piece.split() || !piece.last()) worker.run(piece, h, H, dH, number(piece));
  });
}
