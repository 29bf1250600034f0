// One token of decoding, states updated in place. A cluster of `split` blocks (one block where the states are small) has one row of the batch and one
// key/value head, for all r query heads of the group:
//
//     Hk[k, m] <- Hk[k, m] a[m] + k[k] s[m]        o1[m] = scale sum_k Hk[k, m] q[k]
//     p = softmax(o1)
//     Hv[m, v] <- Hv[m, v] a[m] + s[m] v[v]        o[v]  = sum_m p[m] Hv[m, v]
//
// A block owns a slice of the rows of Hk and a slice of the columns of Hv: all it needs of the others is the sum of o1 over the slices (Exchange); the softmax
// each does for itself. Where there are no clusters (below sm_90) split is 1.
//
// What counts is bytes on their way. A thread has W neighbouring columns (16 bytes) of every TY-th row of a slice, and fetches them by asynchronous copies
// ROWS at a time, STAGES - 1 ahead, from Hk on into Hv (Stream), so that memory works while the block sums and waits. Each state is read once and written
// once; heads beyond HEADS take another turn through the states as they were, only the last turn writes.
//
//     the first rows of Hk on their way; gates, k, v, q -> shared memory     all              barrier
//     Hk: update, partial o1 -> `partial`                                     all              barrier
//     (split > 1: sum over `partial` -> every rank's `sums`)                  all              mbarrier
//     sum of what there is of o1, softmax -> `prob`                           a warp a head    barrier
//     Hv: update, partial o -> `partial`; sum -> o                            all              barriers
//
// The order of every sum follows from the shape alone: neither the batch nor a row's place in it changes a bit.
#include <algorithm>
#include <atomic>

#include "core/chunk.cuh"

namespace gsa::cuda {
namespace {

constexpr int kMaxSplit = 8;                               // what every GPU with clusters allows
// Bytes of state for a block, where clusters make it possible. Small blocks are quicker alone; with several heads to a group the exchange costs more.
constexpr int64_t block_bytes(int heads) { return heads == 1 ? 32 * 1024 : 64 * 1024; }
constexpr int kSlots = 8;                                  // of a lane in the softmax: M <= 256

template <class T, int W>
struct alignas(sizeof(T) * W) Pack {
  T x[W];
  __device__ float get(int w) const { return to_float(x[w]); }
  __device__ static Pack of(const float (&f)[W]) {
    Pack p;
#pragma unroll
    for (int w = 0; w < W; ++w) p.x[w] = from_float<T>(f[w]);
    return p;
  }
};
// Two to a register: as 16-bit variables they would take one each.
template <int W>
  requires(W % 2 == 0)
struct alignas(2 * W) Pack<bf16, W> {
  uint32_t x[W / 2];
  __device__ float get(int w) const { return __uint_as_float(w % 2 ? x[w / 2] & 0xffff0000u : x[w / 2] << 16); }
  __device__ static Pack of(const float (&f)[W]) {
    Pack p;
#pragma unroll
    for (int w = 0; w < W; w += 2) p.x[w / 2] = pack<bf16>(f[w], f[w + 1]);
    return p;
  }
};

// ------------------------------------------------------------------------------------------------------------ clusters

// The sums of o1 over the slices: every rank sends its own to all, and waits for all of them. Stores that count themselves in at an mbarrier of the
// receiver need no fence, which would wait for the stores to the states too. Two buffers, used in turn: who sends into one for the second time has heard
// from everybody since, so everybody is done with what it held.
struct Exchange {
  float* sums;                                             // [2][split][size], of this block
  uint64_t* arrived;                                       // [2] mbarriers
  int split, rank, size;

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  __device__ static uint32_t address(const void* shared) { return static_cast<uint32_t>(__cvta_generic_to_shared(shared)); }
  __device__ void expect(int turn) const {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(arrived + turn)), "r"(split * size * 4) : "memory");
  }
  __device__ void open() const {                           // all threads
    if (threadIdx.x == 0) {
      for (int turn = 0; turn < 2; ++turn) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(arrived + turn)) : "memory");
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncwarp();                                          // one thread's program order would do, but racecheck does not see that
    if (threadIdx.x == 0)
      for (int turn = 0; turn < 2; ++turn) expect(turn);
  }
  // All threads; nobody sends before everybody is there.
  __device__ static void here(bool ordered) {              // ordered: and what was read before is read
    if (ordered) asm volatile("barrier.cluster.arrive.release;" ::: "memory");
    else asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
  }
  __device__ static void all_here() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
  __device__ void send(int turn, int e, float x) const {
    const uint32_t data = address(sums + (turn * split + rank) * size + e), barrier = address(arrived + turn);
    for (int to = 0; to < split; ++to)
      asm volatile(
          "{\n"
          ".reg .b32 data, barrier;\n"
          "mapa.shared::cluster.u32 data, %0, %3;\n"
          "mapa.shared::cluster.u32 barrier, %1, %3;\n"
          "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [data], %2, [barrier];\n"
          "}" ::"r"(data),
          "r"(barrier), "r"(__float_as_uint(x)), "r"(to)
          : "memory");
  }
  __device__ void wait(int turn, int uses) const {         // uses: how often this buffer has been filled before
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(address(arrived + turn)),
        "r"(uses & 1)
        : "memory");
  }
#else
  __device__ void open() const {}
  __device__ void expect(int) const {}
  __device__ static void here(bool) {}
  __device__ static void all_here() {}
  __device__ void send(int, int, float) const {}
  __device__ void wait(int, int) const {}
#endif
};

// ------------------------------------------------------------------------------------------------------------ what follows from the shape

// n / divisor without a division, for n * divisor < 2^32.
struct Divider {
  uint32_t divisor = 1, factor = 0;
  Divider() = default;
  explicit Divider(uint32_t d) : divisor(d), factor(static_cast<uint32_t>(((uint64_t(1) << 32) + d - 1) / d)) {}
  __device__ int quotient(uint32_t n) const { return static_cast<int>(divisor == 1 ? n : __umulhi(n, factor)); }
};

// Divisions by what only the launch knows take a dozen instructions each, at which a block of one row would spend as long as at its state: the host does them.
struct Plan {
  int split, shift;                                        // split = 1 << shift
  int r, k_slice, v_slice;                                 // of a block: query heads, rows of Hk, columns of Hv
  Divider k_across, k_down, v_across, v_down;              // threads side by side, and rows of them, on either slice
  Divider v_columns;                                       // v_slice
};

// ------------------------------------------------------------------------------------------------------------ a thread's part of a slice

// Rows first, first + stride, ... (`count` of them) of W columns that begin at `at`.
template <class T, int W, int THREADS>
struct Part {
  T* at;
  int first, stride, count, column, step;                  // step: elements from one of the thread's rows to the next

  __device__ Part(T* slice, int rows, int columns, int ld, const Divider& across, const Divider& down) {
    first = across.quotient(threadIdx.x), column = static_cast<int>(threadIdx.x - first * across.divisor) * W;
    stride = static_cast<int>(down.divisor);
    count = first < stride && first < rows && column < columns ? down.quotient(rows - first + stride - 1) : 0;
    at = slice + first * ld + column;
    step = stride * ld;
  }
  // partial [stride][HEADS][columns], columns a multiple of W
  template <int HEADS>
  __device__ void leave(float* partial, int columns, const float (&acc)[HEADS][W]) const {
    if (first >= stride) return;
#pragma unroll
    for (int h = 0; h < HEADS; ++h) *reinterpret_cast<Pack<float, W>*>(partial + (first * HEADS + h) * columns + column) = Pack<float, W>::of(acc[h]);
  }
};

template <int BYTES>
__device__ inline void copy_async(void* dst, const void* src) {
  const uint32_t d = static_cast<uint32_t>(__cvta_generic_to_shared(dst));
  if constexpr (BYTES == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(d), "l"(src) : "memory");
  else if constexpr (BYTES == 2) *static_cast<uint16_t*>(dst) = *static_cast<const uint16_t*>(src);
  else asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(d), "l"(src), "n"(BYTES) : "memory");
}

// The rows of both parts, `turns` times Hk's and then Hv's, ROWS at a time, STAGES - 1 of these ahead. A thread reads back what it has fetched itself, so
// that nobody waits for anybody.
template <class T, int W, int ROWS, int STAGES, int THREADS>
struct Stream {
  using P = Pack<T, W>;
  const Part<T, W, THREADS>&hk, &hv;
  P* slots;                                                // [STAGES][ROWS][threads], this thread's
  const T* next;                                           // row to fetch
  int left, rows, to = 0, from = 0;                        // left: takes; rows: of the part at hand
  bool values;

  __device__ Stream(const Part<T, W, THREADS>& hk, const Part<T, W, THREADS>& hv, void* shared, int turns)
      : hk(hk), hv(hv), slots(static_cast<P*>(shared) + threadIdx.x) {
    left = turns * ((hk.count + ROWS - 1) / ROWS + (hv.count + ROWS - 1) / ROWS);
    begin(hk.count == 0);
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) fetch();
  }
  __device__ void begin(bool with_values) {
    values = with_values;
    next = values ? hv.at : hk.at, rows = values ? hv.count : hk.count;
  }
  __device__ void fetch() {
    if (left > 0) {
      const int step = values ? hv.step : hk.step;
#pragma unroll
      for (int i = 0; i < ROWS; ++i, next += step)
        if (i < rows) copy_async<sizeof(P)>(slots + (to * ROWS + i) * THREADS, next);
      rows -= ROWS, --left;
      if (rows <= 0) begin(hk.count == 0 || (hv.count > 0 && !values));
      to = to + 1 == STAGES ? 0 : to + 1;
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  }
  __device__ void take(P (&x)[ROWS]) {
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
#pragma unroll
    for (int i = 0; i < ROWS; ++i) x[i] = slots[(from * ROWS + i) * THREADS];
    from = from + 1 == STAGES ? 0 : from + 1;
    fetch();
  }

  // f <- H gate + outer product, kept in memory when `store`; acc[h][w] = sum of weight[row][h] f. by_row: the gate belongs to the rows (Hv), else to the
  // columns (Hk). row_gate, row_factor, weight: by row; gate, factor: by column.
  template <bool by_row, int HEADS>
  __device__ void advance(const float* row_gate, const float* row_factor, const float* weight, const float* gate, const float* factor, bool store,
                          float (&acc)[HEADS][W]) {
    const Part<T, W, THREADS>& part = by_row ? hv : hk;
    float column_gate[W], column_factor[W];
#pragma unroll
    for (int w = 0; w < W; ++w) {
      column_gate[w] = by_row ? 1.f : gate[part.column + w];
      column_factor[w] = factor[part.column + w];
#pragma unroll
      for (int h = 0; h < HEADS; ++h) acc[h][w] = 0.f;
    }
    T* at = part.at;
#pragma unroll 1
    for (int i0 = 0, row = part.first; i0 < part.count; i0 += ROWS) {
      P x[ROWS];
      take(x);
#pragma unroll
      for (int i = 0; i < ROWS; ++i, row += part.stride, at += part.step)
        if (i0 + i < part.count) {
          const float y = row_factor[row], a = by_row ? row_gate[row] : 0.f;
          const Pack<float, HEADS> q = reinterpret_cast<const Pack<float, HEADS>*>(weight)[row];
          float f[W];
#pragma unroll
          for (int w = 0; w < W; ++w) {
            f[w] = fmaf(x[i].get(w), by_row ? a : column_gate[w], y * column_factor[w]);
#pragma unroll
            for (int h = 0; h < HEADS; ++h) acc[h][w] = fmaf(q.x[h], f[w], acc[h][w]);
          }
          if (store) *reinterpret_cast<P*>(at) = P::of(f);
        }
    }
  }
};

// ------------------------------------------------------------------------------------------------------------ inputs

// What is known of a dtype beforehand: with In = bf16 everything is bf16 (gates may still be fp32), else anything goes.
struct Anything {};
template <class In>
__device__ DType known(DType t) {
  return std::is_same_v<In, bf16> ? DType::bf16 : t;
}
template <class In>
__device__ DType known_gate(DType t) {
  return std::is_same_v<In, bf16> && t != DType::f32 ? DType::bf16 : t;
}

// One element of [B, heads, dim] on its way to a register: between load and get, others can be sent off.
struct Element {
  uint32_t bits = 0;
  __device__ Element() {}
  __device__ Element(const View& x, DType t, int64_t b, int head, int i, bool valid) {
    if (!valid || !x.ptr) return;
    const int64_t at = b * x.batch + head * x.head + i;
    if (t == DType::f32) bits = static_cast<const uint32_t*>(x.ptr)[at];
    else bits = static_cast<const uint16_t*>(x.ptr)[at];
  }
  __device__ float get(DType t) const {
    return t == DType::f32 ? __uint_as_float(bits) : t == DType::bf16 ? __uint_as_float(bits << 16) : to_float(__ushort_as_half(bits));
  }
};
__device__ float rounded(float x, DType t) { return t == DType::f32 ? x : t == DType::bf16 ? to_float(from_float<bf16>(x)) : to_float(from_float<half>(x)); }
__device__ float silu(float x, DType t) { return rounded(x / (1.f + expf(-x)), t); }

template <class In>
struct Rotation {                                          // of component i of q and k, with component `other`
  bool on, low;
  int other;
  Element cos, sin;
  __device__ Rotation(const StepParams& p, int64_t b, int i, bool valid)
      : on(valid && i < p.rotary),
        low(i < p.rotary / 2),
        other(low ? i + p.rotary / 2 : i - p.rotary / 2),
        cos(p.cos, known<In>(p.cos.dtype), b, 0, i, on),
        sin(p.sin, known<In>(p.sin.dtype), b, 0, i, on) {}
  __device__ float get(const StepParams& p, const Element& x, const Element& y) const {
    const DType t = known<In>(p.q.dtype);
    float f = x.get(t);
    if (on) {
      const float g = low ? -y.get(t) : y.get(t);
      f = rounded(__fadd_rn(rounded(__fmul_rn(f, cos.get(t)), t), rounded(__fmul_rn(g, sin.get(t)), t)), t);
    }
    return p.silu_qk ? silu(f, t) : f;
  }
};
template <class In, int HEADS>
struct Queries {                                           // component i of the queries of `count` heads, scaled; 0 for the others
  Rotation<In> turn;
  Element x[HEADS], y[HEADS];
  __device__ Queries(const StepParams& p, int64_t b, int first, int count, int i, bool valid) : turn(p, b, i, valid) {
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
      x[h] = Element(p.q, known<In>(p.q.dtype), b, first + h, i, valid && h < count);
      y[h] = Element(p.q, known<In>(p.q.dtype), b, first + h, turn.other, turn.on && h < count);
    }
  }
  __device__ void put(float* to, const StepParams& p) const {
    float f[HEADS];
#pragma unroll
    for (int h = 0; h < HEADS; ++h) f[h] = turn.get(p, x[h], y[h]) * static_cast<float>(p.scale);
    *reinterpret_cast<Pack<float, HEADS>*>(to) = Pack<float, HEADS>::of(f);
  }
};

// ------------------------------------------------------------------------------------------------------------ the kernel

constexpr int kGridY = 65535;                              // rows of the batch in gridDim.y, the rest in z

template <class T, class In, int W, int HEADS, int ROWS, int STAGES, int THREADS, int BLOCKS>
__global__ __launch_bounds__(THREADS, BLOCKS) void step_kernel(const __grid_constant__ StepParams p, const __grid_constant__ Plan plan) {
  const int split = plan.split, rank = blockIdx.x & (split - 1), head = blockIdx.x >> plan.shift;
  const int64_t b = blockIdx.y + int64_t(kGridY) * blockIdx.z;
  const int r = plan.r, K = p.K, V = p.V, M = p.M, k_slice = plan.k_slice, v_slice = plan.v_slice;
  const int k0 = min(rank * k_slice, K), v0 = min(rank * v_slice, V), rows = min(k_slice, K - k0), columns = min(v_slice, V - v0);
  if (b >= p.B) return;
  int64_t row = b;
  if (p.state_indices) row = p.indices_64 ? static_cast<const int64_t*>(p.state_indices)[b] : static_cast<const int32_t*>(p.state_indices)[b];
  const int64_t out = b * p.o.batch + int64_t(head) * r * p.o.head + v0;
  const DType o_dtype = known<In>(p.o.dtype);
  auto each_output = [&](int heads, auto&& f) {            // f(head, column)
    for (int e = threadIdx.x; e < heads * v_slice; e += THREADS) {
      const int h = plan.v_columns.quotient(e), c = e - h * v_slice;
      if (c < columns) f(h, c);
    }
  };
  if (row < 0 || row >= p.P || (p.mask && !p.mask[b])) {   // padding: nothing is read
    for (int h = 0; h < r; ++h)
      for (int c = threadIdx.x; c < columns; c += THREADS) store_as(p.o.ptr, out + h * p.o.head + c, o_dtype, 0.f);
    return;
  }
  const int64_t state = row * p.H + head;
  const Part<T, W, THREADS> hk(static_cast<T*>(p.hk) + (state * K + k0) * M, rows, M, M, plan.k_across, plan.k_down);
  const Part<T, W, THREADS> hv(static_cast<T*>(p.hv) + state * M * V + v0, M, columns, V, plan.v_across, plan.v_down);

  extern __shared__ __align__(16) char shared[];
  Stream<T, W, ROWS, STAGES, THREADS> stream(hk, hv, shared, HEADS == 1 ? r : (r + HEADS - 1) / HEADS);
  Arena mem{shared + STAGES * ROWS * THREADS * int(sizeof(Pack<T, W>))};
  float* gate = mem.take<float>(M);
  float* write = mem.take<float>(M);
  float* k = mem.take<float>(k_slice);
  float* v = mem.take<float>(v_slice);
  float* q = mem.take<float>(HEADS * k_slice);
  float* prob = mem.take<float>(HEADS * M);
  float* partial = mem.take<float>(HEADS * W * THREADS);
  const int size = HEADS * M;
  float* sums = split > 1 ? mem.take<float>(2 * split * size) : nullptr;
  const Exchange exchange{sums, split > 1 ? mem.take<uint64_t>(2) : nullptr, split, rank, size};
  if (split > 1) exchange.open();

  const int longest = max(M, max(k_slice, v_slice));
#pragma unroll 1
  for (int i = threadIdx.x; i < longest; i += THREADS) {
    const DType t = known<In>(p.q.dtype), g_dtype = known_gate<In>(p.g.dtype), s_dtype = known_gate<In>(p.s.dtype);
    const Element ge(p.g, g_dtype, b, head, i, i < M), se(p.s, s_dtype, b, head, i, i < M);
    const Element ke(p.k, t, b, head, k0 + i, i < rows), ve(p.v, t, b, head, v0 + i, i < columns);
    const Queries<In, HEADS> qe(p, b, head * r, r, k0 + i, i < rows);
    const Element ko(p.k, t, b, head, qe.turn.other, qe.turn.on);
    const float z = !p.g.ptr && i < M ? to_float(static_cast<const T*>(p.z)[state * M + i]) : 0.f;
    if (i < rows) k[i] = qe.turn.get(p, ke, ko), qe.put(q + i * HEADS, p);
    if (i < columns) v[i] = p.silu_v ? silu(ve.get(t), t) : ve.get(t);
    if (i >= M) continue;
    const float e = se.get(s_dtype);
    float g = ge.get(g_dtype);
    if (p.gate_normalizer != 0) g = (fminf(g, 0.f) - log1pf(expf(-fabsf(g)))) / static_cast<float>(p.gate_normalizer);
    float a = 1.f, s = 0.f, next = z;
    if (p.g.ptr) {
      a = expf(g), s = p.s.ptr ? e : -expm1f(g);
    } else if (e != -INFINITY) {                           // ABC: see abc.cu
      if (z == -INFINITY) {
        a = 0.f, s = 1.f, next = e;
      } else {
        const float d = e - z, x = expf(-fabsf(d)), l = log1pf(x);
        s = d > 0.f ? 1.f / (1.f + x) : x / (1.f + x);
        a = d > 0.f ? x / (1.f + x) : 1.f / (1.f + x);
        next = d > 0.f ? e + l : z + l;
      }
    }
    gate[i] = a, write[i] = s, prob[i] = next;
  }
  if (split > 1) Exchange::here(!p.g.ptr);                 // and z is read

#pragma unroll 1
  for (int h0 = 0, turn = 0; h0 < r; h0 += HEADS, turn ^= 1) {
    const int heads = min(HEADS, r - h0);
    const bool last = h0 + HEADS >= r;                     // until then every turn starts from the states as they were
    if (h0 > 0)
      for (int i = threadIdx.x; i < rows; i += THREADS) Queries<In, HEADS>(p, b, head * r + h0, heads, k0 + i, true).put(q + i * HEADS, p);
    __syncthreads();
    if (h0 == 0) {
      if (split > 1) Exchange::all_here();
      if (!p.g.ptr && rank == 0)
        for (int m = threadIdx.x; m < M; m += THREADS) static_cast<T*>(p.z)[state * M + m] = from_float<T>(prob[m]);
    }

    float acc[HEADS][W];
    stream.template advance<false, HEADS>(nullptr, k, q, gate, write, last, acc);
    hk.template leave<HEADS>(partial, M, acc);
    __syncthreads();
    const float* parts = partial;
    int count = hk.stride;
    if (split > 1) {
      for (int e = threadIdx.x; e < size; e += THREADS) {
        float sum = 0.f;
#pragma unroll 4
        for (int i = 0; i < count; ++i) sum += partial[i * size + e];
        exchange.send(turn, e, sum);
      }
      exchange.wait(turn, h0 / HEADS / 2);
      parts = sums + turn * split * size, count = split;
    }
    for (int h = threadIdx.x / 32; h < HEADS; h += THREADS / 32) {
      float x[kSlots], top = -INFINITY, total = 0.f;
#pragma unroll
      for (int j = 0; j < kSlots; ++j) {
        const int m = lane_id() + 32 * j;
        x[j] = -INFINITY;
        if (32 * j < M && m < M) {                         // the same for all lanes first
          x[j] = 0.f;
#pragma unroll 4
          for (int i = 0; i < count; ++i) x[j] += parts[(i * HEADS + h) * M + m];
        }
        top = fmaxf(top, x[j]);
      }
      for (int i = 16; i; i /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, i));
#pragma unroll
      for (int j = 0; j < kSlots; ++j) {
        if (32 * j >= M) break;
        x[j] = lane_id() + 32 * j < M ? expf(x[j] - top) : 0.f;
        total += x[j];
      }
      for (int i = 16; i; i /= 2) total += __shfl_xor_sync(0xffffffffu, total, i);
      const float inverse = 1.f / total;
#pragma unroll
      for (int j = 0; j < kSlots; ++j)
        if (const int m = lane_id() + 32 * j; 32 * j < M && m < M) prob[m * HEADS + h] = x[j] * inverse;
    }
    __syncthreads();
    if (split > 1 && threadIdx.x == 0) exchange.expect(turn);   // its next use

    stream.template advance<true, HEADS>(gate, write, prob, nullptr, v, last, acc);
    hv.template leave<HEADS>(partial, v_slice, acc);
    __syncthreads();
    each_output(heads, [&](int h, int c) {
      float sum = 0.f;
#pragma unroll 4
      for (int i = 0; i < hv.stride; ++i) sum += partial[(i * HEADS + h) * v_slice + c];
      store_as(p.o.ptr, out + (h0 + h) * p.o.head + c, o_dtype, sum);
    });
    __syncthreads();
  }
}

// ------------------------------------------------------------------------------------------------------------ the launch

bool device_has_clusters() {
  static std::atomic<int> known[64];                       // by device: 0 not asked yet, 1 no, 2 yes
  int device = 0, major = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  if (device < 64 && known[device]) return known[device] == 2;
  require_device();
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  if (device < 64) known[device] = major >= 9 ? 2 : 1;
  return major >= 9;
}

template <class T, class In, int W, int HEADS, int ROWS, int STAGES, int THREADS, int BLOCKS>
void run(const StepParams& p, bool clusters) {
  Plan plan;
  plan.split = 1, plan.shift = 0;                          // of the shape alone
  while (clusters && plan.split < kMaxSplit && int64_t(p.K + p.V) * p.M * int64_t(sizeof(T)) > plan.split * block_bytes(HEADS)) plan.split *= 2, ++plan.shift;
  const int split = plan.split;
  plan.r = p.HQ / p.H, plan.k_slice = ceil_div(p.K, split), plan.v_slice = ceil_div(p.V, W * split) * W;
  const int k_across = ceil_div(p.M, W), v_across = ceil_div(plan.v_slice, W);
  plan.k_across = Divider(k_across), plan.k_down = Divider(THREADS / k_across), plan.v_across = Divider(v_across), plan.v_down = Divider(THREADS / v_across);
  plan.v_columns = Divider(plan.v_slice);
  const int64_t shared = int64_t(STAGES) * ROWS * THREADS * W * sizeof(T) + 2 * arena(p.M, 4) + arena(plan.k_slice, 4) + arena(plan.v_slice, 4) +
                         arena(HEADS * plan.k_slice, 4) + arena(HEADS * p.M, 4) + arena(HEADS * W * THREADS, 4) +
                         (split > 1 ? arena(2 * split * HEADS * p.M, 4) + arena(2, 8) : 0);
  const auto kernel = step_kernel<T, In, W, HEADS, ROWS, STAGES, THREADS, BLOCKS>;
  if (int64_t(p.H) * split > 2147483647LL || p.B > int64_t(kGridY) * kGridY) throw std::runtime_error("gsa_ext: step: too many rows or heads; split the batch");
  if (shared > 48 * 1024) check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)), "step");
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(split), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim =
      dim3(static_cast<unsigned>(p.H * split), static_cast<unsigned>(std::min<int64_t>(p.B, kGridY)), static_cast<unsigned>(ceil_div(p.B, kGridY)));
  config.blockDim = dim3(THREADS);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(p.stream);
  config.attrs = &cluster;
  config.numAttrs = split > 1;
  check_launch(cudaLaunchKernelEx(&config, kernel, p, plan), "step");
}

// 16 bytes at a time where the rows of both states allow it.
template <class T, class In>
void choose(const StepParams& p) {
  constexpr int W = 16 / sizeof(T);
  const bool clusters = device_has_clusters();
  const bool wide = p.M % W == 0 && p.V % W == 0 && (reinterpret_cast<uintptr_t>(p.hk) | reinterpret_cast<uintptr_t>(p.hv)) % 16 == 0;
  constexpr bool fp32 = sizeof(T) == 4;
  constexpr int rows = fp32 ? 4 : 2, stages = fp32 ? 4 : 6;
  const int r = p.HQ / p.H;
  if (!wide) run<T, Anything, 1, 4, 8, 3, 512, 1>(p, clusters);
  else if (r == 1) run<T, In, W, 1, rows, stages, 128, 5>(p, clusters);
  else if (r <= 4) run<T, In, W, 4, rows, stages, 128, 5>(p, clusters);
  else run<T, In, W, 8, rows, fp32 ? 3 : 4, 128, 4>(p, clusters);
}

template <class T>
void choose_inputs(const StepParams& p) {
  auto gate = [](const View& x) { return !x.ptr || x.dtype == DType::bf16 || x.dtype == DType::f32; };
  if (p.q.dtype == DType::bf16 && gate(p.g) && gate(p.s)) choose<T, bf16>(p);
  else choose<T, Anything>(p);
}

}  // namespace

void step(const StepParams& p) {
  if (p.state_dtype == DType::bf16) choose_inputs<bf16>(p);
  else choose_inputs<float>(p);
}

}  // namespace gsa::cuda
