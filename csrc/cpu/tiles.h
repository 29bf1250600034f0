// Tiles of 16 tokens: reading and writing them in any dtype, the matrix product, and the three products with decay inside a tile.
//
// Every dimension is padded with zeros to a multiple of 16 (`padded`), so nothing here has a remainder.
//
// Inside a tile, with a = exp(g) per slot m and decay(j, i) = prod_{j < u <= i} a_u:
//   decay_down   y_im = sum_{j < i} x_ij s_jm decay(j, i) + y0_m decay(start, i)       recurrence over i, forwards
//   decay_up     z_jm = sum_{i > j} x_ij y_im decay(j, i) + z0_m decay(j, end)         the same backwards
//   decay_dots   x_ij = sum_m y_im s_jm decay(j, i), j <= i                            and y_im decay(start, i)
// Each runs through the tile with the gates themselves as factors: no exponent of a sum, no division, nothing that could overflow,
// and each term keeps its relative accuracy however hard a gate closes.

constexpr int TILE = 16;
constexpr int padded(int n) { return (n + TILE - 1) / TILE * TILE; }

// The tokens of one sequence and head in the order they are visited.
struct Rows {
  char* first = nullptr;
  int64_t step = 0;      // bytes from one token to the next, negative in reverse
  DType dtype = DType::none;
  explicit operator bool() const { return first != nullptr; }
};

GSA_INLINE Rows rows(const View& v, const Sequence& s, int64_t head, bool reverse) {
  if (!v.ptr) return {};
  const int64_t size = bytes_of(v.dtype), token = reverse ? s.begin + s.length - 1 : s.begin;
  return {static_cast<char*>(v.ptr) + (s.batch * v.batch + token * v.token + head * v.head) * size, (reverse ? -v.token : v.token) * size, v.dtype};
}

// dst [16][ld]: tokens t .. t + count - 1 times factor, then rows of zeros
template <class T> void load_tile(T* dst, int ld, const Rows& src, int64_t t, int count, int dim, T factor = T(1)) {
  constexpr int W = LANES<T>;
  with_dtype<T>(src.dtype, [&](auto* type) GSA_LAMBDA {
    using S = std::remove_pointer_t<decltype(type)>;
    for (int i = 0; i < count; ++i) {
      const S* from = reinterpret_cast<const S*>(src.first + (t + i) * src.step);
      T* to = dst + i * ld;
      int c = 0;
      for (; c + W <= dim; c += W) store<T>(to + c, load_as<T>(from + c) * factor);
      for (; c < ld; c += W) store<T>(to + c, c < dim ? load_part<T>(from + c, dim - c) * factor : splat(T(0)));
    }
  });
  if (count < TILE) std::memset(static_cast<void*>(dst + count * ld), 0, (TILE - count) * ld * sizeof(T));
}

template <class T> void store_tile(const Rows& dst, int64_t t, int count, int dim, const T* src, int ld, T factor = T(1)) {
  constexpr int W = LANES<T>;
  with_dtype<T>(dst.dtype, [&](auto* type) GSA_LAMBDA {
    using S = std::remove_pointer_t<decltype(type)>;
    for (int i = 0; i < count; ++i) {
      S* to = reinterpret_cast<S*>(dst.first + (t + i) * dst.step);
      const T* from = src + i * ld;
      int c = 0;
      for (; c + W <= dim; c += W) store_as<T>(to + c, load<T>(from + c) * factor);
      if (c < dim) store_part<T>(to + c, load<T>(from + c) * factor, dim - c);
    }
  });
}

// dst [cols][ldd] = src [rows][lds] transposed; rows and cols are multiples of 16
template <class T> void transpose(T* dst, int ldd, const T* src, int lds, int rows, int cols) {
  constexpr int W = LANES<T>;
  for (int i = 0; i < rows; i += W)
    for (int j = 0; j < cols; j += W) {
      Vec<T> x[W];
      unroll<W>([&](auto u) GSA_LAMBDA { x[u] = load<T>(src + (i + u) * lds + j); });
      transpose<T>(x);
      unroll<W>([&](auto u) GSA_LAMBDA { store<T>(dst + (j + u) * ldd + i, x[u]); });
    }
}

// ---- matrix product --------------------------------------------------------------------------------------------------------------
// c [m][n] = start + sum of products. The rows of b run along the vector; a may be strided in any way, its elements are broadcast.
template <class T> struct Product {
  const T* a;
  int64_t row, inner;    // a(i, k) = a[i * row + k * inner]
  const T* b;
  int64_t ldb;           // b(k, j) = b[k * ldb + j]
  int depth;
};

enum class Start { zero, scale_columns, scale_rows };        // 0, c0 * factor[column], c0 * factor[row]

// Sums of more than BLOCK terms are taken in blocks of that many, so that rounding errors do not grow with the depth.
template <class T, int MR, int NV, Start START, int BLOCK, int NP>
GSA_INLINE void product_block(T* c, int64_t ldc, const T* c0, int64_t ld0, const T* factor, const Product<T> (&products)[NP], int i, int j) {
  constexpr int W = LANES<T>;
  Vec<T> acc[MR][NV];
  unroll<MR>([&](auto u) GSA_LAMBDA {
    unroll<NV>([&](auto v) GSA_LAMBDA {
      if constexpr (START == Start::zero) {
        acc[u][v] = splat(T(0));
      } else {
        acc[u][v] = load<T>(c0 + (i + u) * ld0 + j + v * W);
        if constexpr (START == Start::scale_columns) acc[u][v] *= load<T>(factor + j + v * W);
        if constexpr (START == Start::scale_rows) acc[u][v] *= splat(factor[i + u]);
      }
    });
  });
  unroll<NP>([&](auto n) GSA_LAMBDA {
    const Product<T>& p = products[n];
    const int64_t row = p.row, inner = p.inner, ldb = p.ldb;
    const T *a = p.a + i * row, *b = p.b + j;
    for (int left = p.depth; left > 0; left -= BLOCK) {
      if (n > 0 || left < p.depth) {                                  // c keeps the sum of the blocks before
        unroll<MR>([&](auto u) GSA_LAMBDA { unroll<NV>([&](auto v) GSA_LAMBDA { acc[u][v] = splat(T(0)); }); });
      }
      for (int k = std::min(left, BLOCK); k > 0; --k, a += inner, b += ldb) {
        Vec<T> bk[NV];
        unroll<NV>([&](auto v) GSA_LAMBDA { bk[v] = load<T>(b + v * W); });
        unroll<MR>([&](auto u) GSA_LAMBDA {
          const Vec<T> x = splat(a[u * row]);
          unroll<NV>([&](auto v) GSA_LAMBDA { acc[u][v] = fma_<T>(x, bk[v], acc[u][v]); });
        });
      }
      const bool first = n == 0 && left == p.depth;
      unroll<MR>([&](auto u) GSA_LAMBDA {
        unroll<NV>([&](auto v) GSA_LAMBDA {
          T* to = c + (i + u) * ldc + j + v * W;
          store<T>(to, first ? acc[u][v] : acc[u][v] + load<T>(to));
        });
      });
    }
  });
}

template <Start START = Start::zero, int BLOCK = 64, class T, int NP>
void product(int m, int n, T* c, int64_t ldc, const Product<T> (&products)[NP], const T* c0 = nullptr, int64_t ld0 = 0, const T* factor = nullptr) {
  constexpr int W = LANES<T>, MR = GSA_VECTOR_REGISTERS == 32 ? 8 : 4;
  int j = 0;
  for (; j + 2 * W <= n; j += 2 * W)
    for (int i = 0; i < m; i += MR) product_block<T, MR, 2, START, BLOCK, NP>(c, ldc, c0, ld0, factor, products, i, j);
  if (j < n)
    for (int i = 0; i < m; i += 2 * MR) product_block<T, 2 * MR, 1, START, BLOCK, NP>(c, ldc, c0, ld0, factor, products, i, j);
}

// ---- products with decay inside a tile -----------------------------------------------------------------------------------------
// x [16][16] of which j < i is read; a, s, y [16][M]. On entry every row of y holds its own start value y0.
template <class T> void decay_down(const T* x, const T* a, const T* s, T* y, int M) {
  constexpr int W = LANES<T>;
  for (int m = 0; m < M; m += W) {
    Vec<T> acc[TILE];
    unroll<TILE>([&](auto i) GSA_LAMBDA { acc[i] = load<T>(y + i * M + m); });
    unroll<TILE>([&](auto j) GSA_LAMBDA {
      const Vec<T> aj = load<T>(a + j * M + m), sj = load<T>(s + j * M + m);
      store<T>(y + j * M + m, acc[j] * aj);
      unroll<TILE - 1 - j>([&](auto u) GSA_LAMBDA {
        constexpr int i = j + 1 + u;
        acc[i] = fma_<T>(acc[i], aj, splat(x[i * TILE + j]) * sj);
      });
    });
  }
}

// For `heads` pairs (x1, y1), (x2, y2) at once, whose terms add up; x [heads][16][16], y [heads][16][M]; z [16][M] holds z0 on entry.
template <class T> void decay_up(int heads, const T* x1, const T* y1, const T* x2, const T* y2, const T* a, T* z, int M) {
  constexpr int W = LANES<T>;
  for (int m = 0; m < M; m += W) {
    Vec<T> acc[TILE];
    unroll<TILE>([&](auto j) GSA_LAMBDA { acc[j] = load<T>(z + j * M + m); });
    unroll<TILE>([&](auto back) GSA_LAMBDA {
      constexpr int i = TILE - 1 - back;
      for (int h = 0; h < heads; ++h) {
        const Vec<T> p = load<T>(y1 + (h * TILE + i) * M + m), d = load<T>(y2 + (h * TILE + i) * M + m);
        const T *xp = x1 + (h * TILE + i) * TILE, *xd = x2 + (h * TILE + i) * TILE;
        unroll<i>([&](auto j) GSA_LAMBDA { acc[j] += fma_<T>(splat(xp[j]), p, splat(xd[j]) * d); });
      }
      const Vec<T> ai = load<T>(a + i * M + m);
      unroll<i>([&](auto j) GSA_LAMBDA { acc[j] *= ai; });
    });
    unroll<TILE>([&](auto j) GSA_LAMBDA { store<T>(z + j * M + m, acc[j]); });
  }
}

// Writes x [16][16], zero above the diagonal, and y_im decay(start, i) to out [16][M].
template <class T> void decay_dots(const T* y, const T* a, const T* s, T* x, T* out, int M) {
  constexpr int W = LANES<T>;
  unroll<TILE>([&](auto row) GSA_LAMBDA {
    constexpr int i = row;
    Vec<T> acc[TILE];
    unroll<TILE>([&](auto j) GSA_LAMBDA { acc[j] = splat(T(0)); });
    for (int m = 0; m < M; m += W) {
      Vec<T> f = load<T>(y + i * M + m);
      unroll<i + 1>([&](auto back) GSA_LAMBDA {
        constexpr int j = i - back;
        acc[j] = fma_<T>(f, load<T>(s + j * M + m), acc[j]);
        f *= load<T>(a + j * M + m);
      });
      store<T>(out + i * M + m, f);
    }
    unroll<TILE / W>([&](auto part) GSA_LAMBDA {
      if constexpr (part * W <= i) store<T>(x + i * TILE + part * W, lane_sums<T>(acc + part * W));
      else store<T>(x + i * TILE + part * W, splat(T(0)));
    });
  });
}

// What is left of each write at the end of the tile: w_j = s_j decay(j, end), and the decay of the whole tile.
template <class T> void tile_writes(const T* a, const T* s, T* w, T* total, int M) {
  constexpr int W = LANES<T>;
  for (int m = 0; m < M; m += W) {
    Vec<T> d = splat(T(1));
    for (int j = TILE - 1; j >= 0; --j) {
      store<T>(w + j * M + m, load<T>(s + j * M + m) * d);
      d *= load<T>(a + j * M + m);
    }
    store<T>(total + m, d);
  }
}

// a = exp(g) and s, read or coupled (1 - exp(g)), of one tile. Rows after the last token and columns after the last slot: a = 1, s = 0.
template <class T> void load_gates(T* a, T* s, const Rows& g, const Rows& write, int64_t t, int count, int slots, int M) {
  constexpr int W = LANES<T>;
  load_tile<T>(a, M, g, t, count, slots);
  if (write) load_tile<T>(s, M, write, t, count, slots);
  for (int i = 0; i < TILE * M; i += W) {
    const ExpParts<T> e = exp_parts<T>(load<T>(a + i));
    store<T>(a + i, exp_<T>(e));
    if (!write) store<T>(s + i, one_minus_exp<T>(e));
  }
}

// softmax over the first `slots` columns of y [M], in place; the others become 0
template <class T> GSA_INLINE void softmax(T* y, int slots, int M) {
  constexpr int W = LANES<T>;
  for (int m = slots; m < M; ++m) y[m] = -std::numeric_limits<T>::infinity();
  Vec<T> high = load<T>(y);
  for (int m = W; m < M; m += W) high = max_<T>(high, load<T>(y + m));
  const T top = max_lanes<T>(high);
  Vec<T> sum = splat(T(0));
  for (int m = 0; m < M; m += W) {
    const Vec<T> e = exp_<T>(load<T>(y + m) - top);
    store<T>(y + m, e);
    sum += e;
  }
  const T norm = T(1) / sum_lanes<T>(sum);
  for (int m = 0; m < M; m += W) store<T>(y + m, load<T>(y + m) * norm);
}

// ---- states ----------------------------------------------------------------------------------------------------------------------
// dst [padded(m)][padded(n)] from src [m][n] (nullptr: zero), or from its transpose; and back.
// o of sequence n, which is padding, for the query heads of key/value head h: 0
inline void zero_padding(const ForwardParams& p, int64_t n, int64_t h) {
  const Sequence all = all_tokens(p, n);
  for (int64_t i = h * (p.HQ / p.H); i < (h + 1) * (p.HQ / p.H); ++i) {
    const Rows o = rows(p.o, all, i, false);
    for (int64_t t = 0; t < all.length; ++t) std::memset(o.first + t * o.step, 0, p.V * bytes_of(p.o.dtype));
  }
}

// dtype: T's, or bf16 where a pool's states are; those that are transposed are T.
template <class T> void load_state(T* dst, int rows, int cols, const void* src, int64_t offset, bool transposed, DType dtype = DType::f32) {
  const int ld = padded(cols);
  std::memset(static_cast<void*>(dst), 0, sizeof(T) * padded(rows) * ld);
  if (!src) return;
  const T* from = static_cast<const T*>(src) + offset;
  for (int i = 0; i < rows; ++i)
    if (transposed)
      for (int j = 0; j < cols; ++j) dst[i * int64_t(ld) + j] = from[j * int64_t(rows) + i];
    else load_row(dst + i * int64_t(ld), src, offset + i * int64_t(cols), cols, dtype);
}
template <class T> void store_state(void* dst, int64_t offset, const T* src, int rows, int cols, bool transposed, DType dtype = DType::f32) {
  if (!dst) return;
  const int ld = padded(cols);
  T* to = static_cast<T*>(dst) + offset;
  for (int i = 0; i < rows; ++i)
    if (transposed)
      for (int j = 0; j < cols; ++j) to[j * int64_t(rows) + i] = src[i * int64_t(ld) + j];
    else store_row(dst, offset + i * int64_t(cols), src + i * int64_t(ld), cols, dtype);
}

// Scratch of one thread: measured first (base == nullptr), then handed out. AddressSanitizer sees what runs over from one array into the next.
class Arena {
 public:
  explicit Arena(char* base = nullptr) : base_(base) {}
  template <class T> void take(T*& p, int64_t count) {
    p = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(base_) + used_);
    const int64_t size = count * int64_t(sizeof(T));
    used_ += (size + 63) / 64 * 64;
#if defined(__SANITIZE_ADDRESS__)
    used_ += 64;
    if (base_) ASAN_POISON_MEMORY_REGION(reinterpret_cast<char*>(p) + size, base_ + used_ - (reinterpret_cast<char*>(p) + size));
#endif
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};
struct Scratch {
  explicit Scratch(int64_t bytes) : memory(static_cast<char*>(::operator new(bytes + 64, std::align_val_t(64)))) {}
  ~Scratch() { ::operator delete(memory, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  char* memory;
};
