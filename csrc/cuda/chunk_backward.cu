// Chunked backward, portable (sm_80 and up), in three sweeps after the boundary states (recomputed by core/scan.cuh unless they were kept):
//
// 1. backward_queries, every chunk and query head by itself; needs forward states only:
//        A1, o1, p as in chunk_forward.cu;   B = tril(d_o v^T)
//        dp  = exp(G) (d_o Hv^T) + sum_j B_ij s_j exp(G_i - G_j)                       Triangle::apply
//        do1 = p (dp - <p, dp>)
//        A2  = tril(sum_m p_im s_jm exp(G_im - G_jm)),  dA1 likewise from do1          Triangle::contract
//        dq  = scale (dA1 k + (do1 exp(G)) Hk^T)
//        e   = o1 do1 + p dp, without the diagonal (j = i) of o1 and dp
//    It leaves p, do1, e and the four triangles to the next two.
// 2. state_scan<gradient>: cotangents of the states at the chunk boundaries, last chunk first.
// 3. backward_keys, every chunk and key/value head by itself, sums over the query heads of its group:
//        dk_j = sum_i scale dA1_ij q_i + dHk_end (s_j exp(G_end - G_j)),   dv_j = sum_i A2_ij d_o_i + dHv_end (s_j exp(G_end - G_j))
//        ds_j = exp(G_end - G_j) (k_j dHk_end + v_j dHv_end) + sum_{i > j} exp(G_i - G_j) (B_ij p_i + A1_ij do1_i)        + diagonal
//        dg_t = what crosses from before t to t or later (j < t <= u)
//             = sum_{u >= t} (e_u - s_u ds_u[i in the chunk]) + sum_{j < t} s_j ds_j[after the chunk] + exp(G_end) (Hk dHk_end + Hv dHv_end)
//    where Hk, Hv are the states before the chunk. In dg neither e nor s ds has its diagonal, and what comes from after the chunk is summed from the
//    front: no large terms are left to cancel (gates of -40 give their tiny gradient to full relative accuracy, resets give 0).
#include "core/scan.cuh"
#include "core/select.cuh"
#include "core/tile_io.cuh"
#include "hopper.h"
#include "states.h"

namespace gsa::cuda {

namespace {

// What sweep 1 leaves behind, per slot and query head.
struct Saved {
  const void* states;        // [slots, H, K + V, M]       E   before each chunk (forward_states)
  float* gradients;          // [slots, H, K + V, M]           cotangents after each chunk
  float *p, *do1, *e;        // [slots, HQ, C, MP]
  void *p_decayed, *do1_decayed;   // [slots, HQ, C, MP]   E   p exp(G), scale do1 exp(G)
  float* inter;              // [slots, H, C, MP]              the part of ds from after the chunk, decayed to its end
  float *A1, *B;             // [slots, HQ] Packed             strictly lower
  void *dA1, *A2, *A2_low;   // [slots, HQ] Packed         E   lower; dA1 times scale; A2 is the sum of two (16 bit)
  const float* gate_tiles;   // [slots, H] GateTile            forward_states
  float* diagonals;          // [slots, HQ, 2, C]              of A1 and B
  int64_t bytes;
};

template <class Cfg>
Saved plan(const Params& p, char* base) {
  const int64_t slots = boundary_slots(p.B, p.T, p.N, p.cu_seqlens != nullptr, Cfg::C);
  Saved s{};
  s.bytes = (states_workspace(p) + 255) / 256 * 256;      // which comes first
  auto take = [&](int64_t n) {
    char* r = base + s.bytes;
    s.bytes += (n + 255) / 256 * 256;
    return r;
  };
  auto floats = [&](int64_t n) { return reinterpret_cast<float*>(take(n * 4)); };
  const int64_t states = slots * p.H * (p.K + p.V) * p.M, rows = slots * p.HQ * Cfg::C;
  s.gradients = floats(states);
  s.p = floats(rows * Cfg::MP);
  s.do1 = floats(rows * Cfg::MP);
  s.e = floats(rows * Cfg::MP);
  s.p_decayed = take(rows * Cfg::MP * int64_t(sizeof(typename Cfg::E)));
  s.do1_decayed = take(rows * Cfg::MP * int64_t(sizeof(typename Cfg::E)));
  s.inter = floats(slots * p.H * Cfg::C * Cfg::MP);
  const int64_t triangles = slots * p.HQ * Packed<Cfg>::elements;
  s.A1 = floats(triangles);
  s.B = floats(triangles);
  for (void** x : {&s.dA1, &s.A2, &s.A2_low}) *x = take(triangles * int64_t(sizeof(typename Cfg::E)));
  s.diagonals = floats(rows * 2);
  return s;
}

// ------------------------------------------------------------------------------------------------------------ 1. queries

template <class Cfg>
__global__ __launch_bounds__(Cfg::threads, Cfg::blocks_per_sm) void backward_queries(const __grid_constant__ BackwardParams p,
                                                                                     const __grid_constant__ Saved saved) {
  using E = typename Cfg::E;
  using A = typename Cfg::A;
  constexpr int C = Cfg::C, MP = Cfg::MP, MT = Cfg::MT, CT = Cfg::CT, DS = Cfg::DS, DT = Cfg::DT, NB = Cfg::NB, ldm = Cfg::ldm, ldd = Cfg::ldd;
  const int64_t q_head = blockIdx.x % p.HQ, head = q_head / (p.HQ / p.H);
  __shared__ Chunk shared_chunk;                           // its 20 registers would be spilled
  {
    Chunk found;
    if (!find_chunk(p, blockIdx.x / p.HQ, C, found)) return;
    if (threadIdx.x == 0) shared_chunk = found;
  }
  __syncthreads();
  const Chunk& c = shared_chunk;
  const int warp = threadIdx.x / 32;

  extern __shared__ __align__(16) char shared[];
  Arena mem{shared};
  Gates<Cfg> gates(mem, p, c, head, saved.gate_tiles);
  float* S = RowsShared<Cfg>::needs_S ? mem.take<float>(C * Cfg::lds) : nullptr;
  const E* states = static_cast<const E*>(saved.states) + (c.slot * p.H + head) * (p.K + p.V) * p.M;
  const int64_t item = c.slot * p.HQ + q_head;
  auto pass_of = [&](int pass) -> Pass {                   // (q, k, Hk), (d_o, v, Hv), then (k, Hk)
    const bool values = pass == 1;
    return {pass == 2 ? Rows{} : rows_of(values ? p.d_o : p.q, c, q_head),
            rows_of(values ? p.v : p.k, c, head),
            rows_of(states + (values ? int64_t(p.K) * p.M : 0), p.M, tile_dtype<Cfg>()),
            values ? p.V : p.K,
            c.length,
            p.M};
  };
  Ring<Cfg> ring{mem.p};
  ring.open(pass_of(0));
  gates.template load<Cfg::threads>();
  gates.template load_R<Cfg::threads>();
  if (S) gates.template load_S<Cfg::threads>(S, Cfg::lds);
  ring.send(3, pass_of);

  // Triangle and state products, then the sum over the chunk; the diagonals stay apart. One copy of the code for both passes: it would not fit the
  // instruction cache twice.
  float o1[MT][4], dp[MT][4], x[CT][4], a1[2], b1[2];
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
    const int D = pass ? p.V : p.K;
    const float scale = pass ? 1.f : static_cast<float>(p.scale);
    zero(x);
    zero(dp);
#pragma unroll 1
    for (int d = 0; d < D; d += DS) {
      const auto s = ring.next(3, pass_of);
      typename A::template TileOp<DS> op;
      A::template from_tile<DS>(op, s.x + warp * 16 * ldd, ldd);
#pragma unroll
      for (int J = 0; J < NB; ++J)
        if (J <= warp) A::template mma_nt<2, DS>(x + 2 * J, op, s.y + J * 16 * ldd, ldd);
      A::template mma_nn<MT, DS>(dp, op, s.h, ldm);
    }
    __syncthreads();                                       // scratch is free
#pragma unroll
    for (int t = 0; t < MT; ++t)
#pragma unroll
      for (int e = 0; e < 4; ++e) dp[t][e] *= scale;
#pragma unroll
    for (int t = 0; t < CT; ++t)
#pragma unroll
      for (int e = 0; e < 4; ++e) x[t][e] *= scale;
    const Triangle<Cfg> triangle{gates, S, ring.x_scratch(warp), ring.y_scratch(warp), warp};
    triangle.split_diagonal(x, b1);
    float* out = saved.diagonals + (item * 2 + pass) * C + warp * 16 + frag_row();
    if ((lane_id() & 3) == 0) out[0] = b1[0], out[8] = b1[1];
    Packed<Cfg>::store((pass ? saved.B : saved.A1) + item * Packed<Cfg>::elements, static_cast<float*>(nullptr), x, warp);
    triangle.apply(dp, x);
    if (pass == 0) {
      a1[0] = b1[0], a1[1] = b1[1];
#pragma unroll
      for (int t = 0; t < MT; ++t)
#pragma unroll
        for (int e = 0; e < 4; ++e) o1[t][e] = dp[t][e];
    }
  }
  const Triangle<Cfg> triangle{gates, S, ring.x_scratch(warp), ring.y_scratch(warp), warp};

  // p, do1 = p (dp - <p, dp>), e; afterwards o1 holds p and dp holds do1.
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int i = warp * 16 + frag_row() + 8 * h;
    float s[MT][2], top = -INFINITY, sum = 0.f, dot = 0.f;
    gates.row_writes(i, S, s);
    auto logit = [&](int t, int e) { return t * 8 + frag_col() + e < p.M ? fmaf(a1[h], s[t][e], o1[t][2 * h + e]) : -INFINITY; };
#pragma unroll
    for (int t = 0; t < MT; ++t)
#pragma unroll
      for (int e = 0; e < 2; ++e) top = fmaxf(top, logit(t, e));
    top = quad_max(top);
#pragma unroll
    for (int t = 0; t < MT; ++t)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float w = exp_of<Cfg::exact>(logit(t, e) - top);
        sum += w;
        dot += w * fmaf(b1[h], s[t][e], dp[t][2 * h + e]);
      }
    const float inv = 1.f / quad_sum(sum);
    dot = quad_sum(dot) * inv;
    float* e_out = saved.e + (item * C + i) * MP + frag_col();
#pragma unroll
    for (int t = 0; t < MT; ++t) {
      float e_row[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float &o1_off = o1[t][2 * h + e], &dp_off = dp[t][2 * h + e];
        const float prob = exp_of<Cfg::exact>(logit(t, e) - top) * inv;
        const float grad = prob * (fmaf(b1[h], s[t][e], dp_off) - dot);
        e_row[e] = o1_off * grad + prob * dp_off;
        o1_off = prob;
        dp_off = grad;
      }
      *reinterpret_cast<float2*>(e_out + t * 8) = make_float2(e_row[0], e_row[1]);
    }
  }

  // A2 from p, then dA1 from do1; y ends as do1 exp(G).
  float y[MT][4];
#pragma unroll
  for (int t = 0; t < MT; ++t)
#pragma unroll
    for (int e = 0; e < 4; ++e) y[t][e] = o1[t][e];
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
    float d[2];
    const int64_t rows = (item * C + warp * 16) * MP;
    store_dense<MT>((pass ? saved.do1 : saved.p) + rows, MP, y, 0);
    diagonal_of<Cfg>(gates, S, y, warp, d);
    triangle.contract(x, y);
    triangle.add_diagonal(x, d);
    const float scale = pass ? static_cast<float>(p.scale) : 1.f;
    const int64_t at = item * Packed<Cfg>::elements;
    Packed<Cfg>::store(static_cast<E*>(pass ? saved.dA1 : saved.A2) + at, pass ? nullptr : static_cast<E*>(saved.A2_low) + at, x, warp, scale);
    store_tile<E, MT>(static_cast<E*>(pass ? saved.do1_decayed : saved.p_decayed) + rows, MP, y, scale);
    if (pass == 0) {
#pragma unroll
      for (int t = 0; t < MT; ++t)
#pragma unroll
        for (int e = 0; e < 4; ++e) y[t][e] = dp[t][e];
    }
  }
  typename A::template Op<C> da1;
  typename A::template Op<MP> dg;
  A::template from_acc<C>(da1, x, ring.x_scratch(warp), Cfg::ldx);
  A::template from_acc<MP>(dg, y, ring.y_scratch(warp), Triangle<Cfg>::ldy);
#pragma unroll 1
  for (int k = 0; k < p.K; k += DS) {
    const auto s = ring.next(3, pass_of);
    float acc[DT][4];
    zero(acc);
#pragma unroll
    for (int J = 0; J < NB; ++J)
      if (J <= warp) A::template mma_nn<DT, 16>(acc, da1.block(J), s.y + J * 16 * ldd, ldd);
    A::template mma_nt<DT, MP>(acc, dg, s.h, ldm);
    store_rows<E, DT>(rows_of(p.dq, c, q_head), acc, warp * 16, c.length, k, p.K, static_cast<float>(p.scale));
  }
}

// ------------------------------------------------------------------------------------------------------------ 3. keys

template <class E>
__device__ inline float2 load2(const E* p) {
  if constexpr (sizeof(E) == 4) {
    return *reinterpret_cast<const float2*>(p);
  } else {
    const uint32_t x = *reinterpret_cast<const uint32_t*>(p);
    const E* e = reinterpret_cast<const E*>(&x);
    return make_float2(to_float(e[0]), to_float(e[1]));
  }
}

// Four neighbouring elements, those below n.
__device__ inline void store4(const View& to, int64_t at, const float (&x)[4], int n) {
  if (to.dtype == DType::f32) {
    float* p = static_cast<float*>(to.ptr) + at;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < n) p[i] = x[i];
  } else {
    uint16_t* p = static_cast<uint16_t*>(to.ptr) + at;
    const bool wide = to.dtype == DType::bf16;
    const uint2 v = wide ? make_uint2(pack<bf16>(x[0], x[1]), pack<bf16>(x[2], x[3])) : make_uint2(pack<half>(x[0], x[1]), pack<half>(x[2], x[3]));
    if (n >= 4 && (at & 3) == 0) {
      *reinterpret_cast<uint2*>(p) = v;
    } else {
      if (n > 0) p[0] = static_cast<uint16_t>(v.x);
      if (n > 1) p[1] = static_cast<uint16_t>(v.x >> 16);
      if (n > 2) p[2] = static_cast<uint16_t>(v.y);
      if (n > 3) p[3] = static_cast<uint16_t>(v.y >> 16);
    }
  }
}

// Shared memory: the gates, then while slices stream by two groups of tiles (of the state, of a query head), each arriving behind the work on the other;
// then two stages of rows of A1, B, p and do1; at last two tiles. `small` configurations: one stage, and one of the tiles in the workspace.
template <class Cfg>
struct KeysShared {
  using E = typename Cfg::E;
  static constexpr int DS = Cfg::exact ? Cfg::DS : Cfg::fp32 && Cfg::small ? 16 : 32, ldd = DS + Cfg::pad;
  static constexpr int ldt = Cfg::C + Cfg::pad;                       // of dA1, A2
  static constexpr int ldr = Cfg::C + 8;                              // rows of A1, B
  static constexpr int ldz = Cfg::MP + 4;                             // of the scratch of a slow block
  static constexpr int threads = Cfg::threads * Cfg::keys_split;
  static constexpr int edge = Cfg::MP > 2 * threads ? Cfg::MP : 2 * threads;
  static constexpr int64_t slices =
      2 * arena(Cfg::C * ldd, sizeof(E)) + arena(DS * Cfg::lds, 4) + arena(DS * Cfg::ldm, sizeof(E)) + (Cfg::fp32 ? 1 : 2) * arena(Cfg::C * ldt, sizeof(E));
  static constexpr bool needs_products = !(Cfg::exact && Cfg::NB == 1);   // else every product is one of the exact in-block ones
  static constexpr int64_t stage = 2 * arena(16 * ldr, 4) + (needs_products ? 2 * arena(16 * Cfg::lds, 4) : 0);
  static constexpr int stages = Cfg::small ? 1 : 2;
  static constexpr int64_t rows = stages * stage + arena(16 * ldz, 4);
  static constexpr int64_t tiles = (Cfg::small ? 1 : 2) * arena(Cfg::C * Cfg::ldu, 4);
  static constexpr int64_t region = slices > rows ? (slices > tiles ? slices : tiles) : (rows > tiles ? rows : tiles);
  static constexpr int64_t bytes = Gates<Cfg>::bytes + arena(Cfg::NB * Cfg::MP, 4) + arena(edge, 4) + region;
  static_assert(bytes <= (Cfg::small || Cfg::exact ? 99 : 113) * 1024);
};

// Slow blocks only, so not inlined. W[j][m] = a_{j+1} ... a_15, the decay from row j to the end of the block,
// for the slots from begin to end.
template <class Cfg>
__device__ __noinline__ void decays_to_end(const Gates<Cfg>& gates, float* w_out, int block, int begin, int end) {
  __syncwarp();
  for (int m = begin + lane_id(); m < end; m += 32) {
    float w = 1.f;
    for (int j = 15; j >= 0; --j) w_out[j * KeysShared<Cfg>::ldz + m] = w, w *= gates.gate(block * 16 + j, m);
  }
  __syncwarp();
}
// z[j][m] (+)= sum_{i > j} exp(G_i - G_j) (B_ij p_i + A1_ij do1_i) inside the block, exactly: z <- (z + ..._i) a_i from the last row down to j + 1.
// a, b: the block's columns of A1 and B; prob, grad: its rows of p and do1.
template <class Cfg>
__device__ __noinline__ void keys_block(const Gates<Cfg>& gates, float* z_out, const float* a, const float* b, int ld, const float* prob, const float* grad,
                                        int block, int begin, int end, bool add) {
  constexpr int ldz = KeysShared<Cfg>::ldz;
  __syncwarp();
  for (int m = begin + lane_id(); m < end; m += 32) {
    float z[16];
#pragma unroll
    for (int j = 0; j < 16; ++j) z[j] = 0.f;
    for (int i = 15; i > 0; --i) {
      const float gate = gates.gate(block * 16 + i, m), pi = prob[i * Cfg::MP + m], gi = grad[i * Cfg::MP + m];
#pragma unroll
      for (int j = 0; j < 15; ++j)
        if (j < i) z[j] = (z[j] + b[i * ld + j] * pi + a[i * ld + j] * gi) * gate;
    }
#pragma unroll
    for (int j = 0; j < 16; ++j) z_out[j * ldz + m] = add ? z_out[j * ldz + m] + z[j] : z[j];
  }
  __syncwarp();
}

template <class Cfg>
__global__ __launch_bounds__(KeysShared<Cfg>::threads, Cfg::blocks_per_sm) void backward_keys(const __grid_constant__ BackwardParams p,
                                                                                              const __grid_constant__ Saved saved) {
  using E = typename Cfg::E;
  using A = typename Cfg::A;
  using X = typename Cfg::X;
  using Shared = KeysShared<Cfg>;
  constexpr int C = Cfg::C, MP = Cfg::MP, MT = Cfg::MT / Cfg::keys_split, DS = Shared::DS, DT = DS / 8 / Cfg::keys_split, NB = Cfg::NB, ldd = Shared::ldd,
                lds = Cfg::lds, ldt = Shared::ldt, ldr = Shared::ldr, ldu = Cfg::ldu, ldm = Cfg::ldm;
  constexpr int threads = Shared::threads;
  const int64_t head = blockIdx.x % p.H;
  const int r = p.HQ / p.H;
  Chunk c;
  if (!find_chunk(p, blockIdx.x / p.H, C, c)) return;
  const int warp = threadIdx.x / 32 % NB, part = threadIdx.x / 32 / NB;   // rows, and which part of the columns
  const int m0 = part * MT * 8, d0 = part * DT * 8;         // first slot, first column of a slice

  extern __shared__ __align__(16) char shared[];
  Arena mem{shared};
  Gates<Cfg> gates(mem, p, c, head, saved.gate_tiles);
  float* end_s = gates.R;                                   // s_j exp(G_end - G_j), in R's place while the slices stream by
  float* after_s = mem.take<float>(NB * MP);                // the decay from the end of each block to the chunk's
  float* edge = mem.take<float>(Shared::edge);              // sum over K of Hk dHk_end and over V of Hv dHv_end, Hk and Hv before the chunk
  char* region = mem.p;
  Arena slices{region};
  E* x_s = slices.take<E>(C * ldd);                         // k, v
  float* h_s = slices.take<float>(DS * lds);                // dHk_end, dHv_end
  E* start_s = slices.take<E>(DS * ldm);                    // Hk, Hv before the chunk
  E* y_s = slices.take<E>(C * ldd);                         // q, d_o
  E* t_s = slices.take<E>(C * ldt);                         // dA1, A2
  E* low_s = Cfg::fp32 ? nullptr : slices.take<E>(C * ldt);
  auto operand = [](float x) { return Gates<Cfg>::operand(x); };

  const int64_t first_item = c.slot * p.HQ + head * r;
  const float* gradients = saved.gradients + (c.slot * p.H + head) * (p.K + p.V) * p.M;
  const E* starts = static_cast<const E*>(saved.states) + (c.slot * p.H + head) * (p.K + p.V) * p.M;

  // Slices, pass 0 (k, q) -> dk, pass 1 (v, d_o) -> dv: one copy of the code. State tiles go one slice ahead, those of a query head one state product.
  TileLoader<threads, E, C, DS> x_in, y_in;
  TileLoader<threads, float, DS, MP> h_in;
  TileLoader<threads, E, DS, MP> start_in;
  int to_pass = 0, to_d = 0;                                // the state slice to be sent off next
  auto send_state = [&] {
    if (to_pass < 2) {
      const int D = to_pass ? p.V : p.K, left = D - to_d;
      const int64_t row = (to_pass ? int64_t(p.K) : 0) * p.M;
      auto xs = [&] { return rows_of(to_pass ? p.v : p.k, c, head); };
      auto hs = [&] { return rows_of(gradients + row, p.M, DType::f32); };
      auto starts_ = [&] { return rows_of(starts + row, p.M, tile_dtype<Cfg>()); };
      if (to_d == 0) x_in.open(xs(), D), h_in.open(hs(), p.M), start_in.open(starts_(), p.M);
      x_in.load(x_s, ldd, to_d, c.length, left, xs);
      h_in.load(h_s, lds, int64_t(to_d) * p.M, left, p.M, hs);
      start_in.load(start_s, ldm, int64_t(to_d) * p.M, left, p.M, starts_);
      if ((to_d += DS) >= D) to_d = 0, ++to_pass;
    }
    cp_async_commit();
  };
  auto send_head = [&](int pass, int d, int hq) {
    const int D = pass ? p.V : p.K;
    auto ys = [&] { return rows_of(pass ? p.d_o : p.q, c, head * r + hq); };
    if (d == 0 || r > 1) {
      y_in.open(ys(), D);
      const int64_t at = (first_item + hq) * Packed<Cfg>::elements;
      Packed<Cfg>::template load<threads>(t_s, ldt, static_cast<const E*>(pass ? saved.A2 : saved.dA1) + at);
      if (!Cfg::fp32 && pass) Packed<Cfg>::template load<threads>(low_s, ldt, static_cast<const E*>(saved.A2_low) + at);
    }
    y_in.load(y_s, ldd, d, c.length, D - d, ys);
    cp_async_commit();
  };

  gates.template load<threads>();
  load_matrix<threads, MP>(after_s, MP, gates.tile + GateTile<Cfg>::after, NB);
  gates.template load_S<threads>(end_s, ldu);
  cp_async_commit();
  send_state();

  float ds[MT][4];                                          // first the part from after the chunk, then the part from inside it, without the diagonal
  zero(ds);
  // The slot-wise sum of H dH_end. A thread has two slots and every parts-th row of a slice.
  constexpr int pairs = MP / 2, parts = threads > pairs ? threads / pairs : 1, passes = pairs > threads ? pairs / threads : 1;
  const int edge_m = threadIdx.x % pairs * 2, edge_part = threadIdx.x / pairs;
  float edge_sum[passes][2] = {};

  cp_async_wait_for<1>();
  __syncthreads();
#pragma unroll 4
  for (int x = threadIdx.x * 4; x < C * MP; x += threads * 4) {   // S becomes s exp(G_end - G_j)
    const int j = x / MP, m = x % MP;
    const float4 v = *reinterpret_cast<const float4*>(end_s + j * ldu + m), l = *reinterpret_cast<const float4*>(after_s + j / 16 * MP + m);
    *reinterpret_cast<float4*>(end_s + j * ldu + m) = make_float4(operand(v.x * l.x), operand(v.y * l.y), operand(v.z * l.z), operand(v.w * l.w));
  }

#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
    const View out = pass ? p.dv : p.dk;
    const int D = pass ? p.V : p.K;
#pragma unroll 1
    for (int d = 0; d < D; d += DS) {
      cp_async_wait_for<0>();
      __syncthreads();
      send_head(pass, d, 0);
#pragma unroll
      for (int k = 0; k < passes; ++k)
#pragma unroll 8
        for (int i = edge_part; i < DS; i += parts) {
          const int m = edge_m + 2 * k * threads;
          const float2 g = load2(h_s + i * lds + m), h = load2(start_s + i * ldm + m);
          edge_sum[k][0] = fmaf(h.x, g.x, edge_sum[k][0]);
          edge_sum[k][1] = fmaf(h.y, g.y, edge_sum[k][1]);
        }
      float acc[DT][4];
      zero(acc);
      {
        typename X::template Op<MP> op;
        X::template from_tile<MP>(op, end_s + warp * 16 * ldu, ldu);
        X::template mma_nt<DT, MP>(acc, op, h_s + d0 * lds, lds);
        typename X::template Op<DS> xo;
        X::template from_input<DS>(xo, x_s + warp * 16 * ldd, ldd);
        X::template mma_nn<MT, DS>(ds, xo, h_s + m0, lds);
      }
#pragma unroll 1
      for (int hq = 0; hq < r; ++hq) {
        cp_async_wait_for<0>();
        __syncthreads();
        if (hq == 0) send_state();
        typename A::template Op<C> op;
        A::template from_tile_t<C>(op, t_s + warp * 16, ldt);
#pragma unroll
        for (int b = 0; b < NB; ++b)
          if (b >= warp) A::template mma_nn<DT, 16>(acc, op.block(b), y_s + b * 16 * ldd + d0, ldd);
        if (!Cfg::fp32 && pass) {
          A::template from_tile_t<C>(op, low_s + warp * 16, ldt);
#pragma unroll
          for (int b = 0; b < NB; ++b)
            if (b >= warp) A::template mma_nn<DT, 16>(acc, op.block(b), y_s + b * 16 * ldd + d0, ldd);
        }
        if (hq + 1 < r) {
          __syncthreads();
          send_head(pass, d, hq + 1);
        }
      }
      store_rows<E, DT, false>(rows_of(out, c, head), acc, warp * 16, c.length, d + d0, D);
    }
  }

  // ds, rows j of block J = warp, from the last block down to the own one. Fast blocks: acc <- (acc + B^T (p R) + A1^T (do1 R)) lambda, slow ones:
  // acc <- acc lambda + B^T (p U) + A1^T (do1 U); at last decayed to row j: acc / R_j (fast), acc W_j + the exact in-block sums (slow).
#pragma unroll
  for (int k = 0; k < passes; ++k)
#pragma unroll
    for (int e = 0; e < 2; ++e) edge[edge_part * MP + edge_m + 2 * k * threads + e] = edge_sum[k][e];
  float* inter = saved.inter + (c.slot * p.H + head) * C * MP;
  store_dense<MT>(inter + m0, MP, ds, warp * 16);
  zero(ds);
  __syncthreads();                                          // the slices and end_s are done with

  struct Stage {
    float *a, *b, *p, *d;                                   // 16 rows of A1, B, p and do1
  };
  auto stage = [&](int i) {
    Arena mem{region + i % Shared::stages * Shared::stage};
    Stage s;
    s.a = mem.take<float>(16 * ldr), s.b = mem.take<float>(16 * ldr);
    s.p = mem.take<float>(Shared::needs_products ? 16 * lds : 0), s.d = mem.take<float>(Shared::needs_products ? 16 * lds : 0);
    return s;
  };
  float* z_s = reinterpret_cast<float*>(region + Shared::stages * Shared::stage);   // scratch of a slow block
  int to_b = NB - 1, to_hq = 0, sent = 0;
  auto send_rows = [&] {
    if (to_b >= 0) {
      const Stage s = stage(sent++);
      const int64_t at = (first_item + to_hq) * C + to_b * 16;
      const int64_t triangle = (first_item + to_hq) * Packed<Cfg>::elements;
      Packed<Cfg>::template load_rows<threads>(s.a, ldr, saved.A1 + triangle, to_b);
      Packed<Cfg>::template load_rows<threads>(s.b, ldr, saved.B + triangle, to_b);
      if constexpr (Shared::needs_products)
        load_matrix<threads, MP>(s.p, lds, saved.p + at * MP, 16), load_matrix<threads, MP>(s.d, lds, saved.do1 + at * MP, 16);
      if (++to_hq == r) to_hq = 0, --to_b;
    }
    cp_async_commit();
  };
  gates.template load_R<threads>();
  send_rows();
  const bool slow = gates.slow[warp];
  auto decay = [&](int b) {
#pragma unroll
    for (int t = 0; t < MT; ++t) {
      const float2 l = *reinterpret_cast<const float2*>(gates.lambda + b * MP + m0 + t * 8 + frag_col());
      ds[t][0] *= l.x, ds[t][1] *= l.y, ds[t][2] *= l.x, ds[t][3] *= l.y;
    }
  };
#pragma unroll 1
  for (int b = NB - 1; b >= 0; --b) {
    const bool earlier = warp < b, own = warp == b;
    if (earlier && gates.slow[b]) decay(b);
#pragma unroll 1
    for (int hq = 0; hq < r; ++hq) {
      const Stage s = stage(sent - 1);
      cp_async_wait_for<0>();
      if (sent == 1) __syncthreads();                       // R is here, other threads' parts of it too
      if constexpr (Shared::needs_products) {               // p and do1 times R: every thread what it has brought itself
#pragma unroll
        for (int e = threadIdx.x * 4; e < 16 * MP; e += threads * 4) {
          const int i = e / MP, m = e % MP;
          const float4 u = *reinterpret_cast<const float4*>(gates.R + (b * 16 + i) * ldu + m);
          float4 &x = *reinterpret_cast<float4*>(s.p + i * lds + m), &y = *reinterpret_cast<float4*>(s.d + i * lds + m);
          x = make_float4(operand(x.x * u.x), operand(x.y * u.y), operand(x.z * u.z), operand(x.w * u.w));
          y = make_float4(operand(y.x * u.x), operand(y.y * u.y), operand(y.z * u.z), operand(y.w * u.w));
        }
      }
      __syncthreads();
      if (Shared::stages == 2) send_rows();
      if (Shared::needs_products && (earlier || (own && !slow))) {
        typename X::template Op<16> op;
        X::template from_tile_t<16>(op, s.b + warp * 16, ldr);
        X::template mma_nn<MT, 16>(ds, op, s.p + m0, lds);
        X::template from_tile_t<16>(op, s.a + warp * 16, ldr);
        X::template mma_nn<MT, 16>(ds, op, s.d + m0, lds);
      } else if (own) {
        const int64_t at = ((first_item + hq) * C + b * 16) * MP;
        const float* z = z_s + frag_row() * Shared::ldz + m0 + frag_col();
        auto index = [](int t, int e) { return 8 * (e >> 1) * Shared::ldz + t * 8 + (e & 1); };
        const Gates<Cfg> copy = gates;
        if (hq == 0) {
          decays_to_end<Cfg>(copy, z_s, b, m0, m0 + MT * 8);
#pragma unroll
          for (int t = 0; t < MT; ++t)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              ds[t][e] *= z[index(t, e)];
              inter[(warp * 16 + frag_row() + 8 * (e >> 1)) * MP + m0 + t * 8 + frag_col() + (e & 1)] *= z[index(t, e)];
            }
        }
        keys_block<Cfg>(copy, z_s, s.a + b * 16, s.b + b * 16, ldr, saved.p + at, saved.do1 + at, b, m0, m0 + MT * 8, hq > 0);
        if (hq == r - 1) {
#pragma unroll
          for (int t = 0; t < MT; ++t)
#pragma unroll
            for (int e = 0; e < 4; ++e) ds[t][e] += z[index(t, e)];
        }
      }
      if (Shared::stages == 1) {
        __syncthreads();
        send_rows();
      }
    }
    if (earlier && !gates.slow[b]) decay(b);
  }

  // From here on element by element, four slots to a thread, tiles in shared memory: the rest of ds (from after the chunk, decayed to its row; the
  // diagonal); for dg, e - s ds, in R's place, and s times the ds from after the chunk. What comes from memory is sent for before what is done meanwhile.
  const GateReader& reader = gates.reader;
  const bool coupled = !reader.s.ptr;
  const Rows& writes = reader.s;
  const float* diagonals = saved.diagonals + first_item * 2 * C;
  constexpr int elements = C * MP / (threads * 4), batch = elements % 4 == 0 ? 4 : elements % 2 == 0 ? 2 : 1;  // four slots each; loads of a batch go together
  float4 e_in[batch], p_in[batch], d_in[batch];
  float a1[batch], b1[batch];
  Four s_in[batch];
  int x0 = threadIdx.x * 4, hq = 0;  // of the batch and query head that are on their way
  auto fetch = [&] {
#pragma unroll
    for (int k = 0; k < batch; ++k) {
      const int x = x0 + k * threads * 4, j = x / MP, m = x % MP;
      const int64_t at = (first_item + hq) * C * MP + x;
      e_in[k] = *reinterpret_cast<const float4*>(saved.e + at);
      p_in[k] = *reinterpret_cast<const float4*>(saved.p + at);
      d_in[k] = *reinterpret_cast<const float4*>(saved.do1 + at);
      a1[k] = diagonals[hq * 2 * C + j], b1[k] = diagonals[(hq * 2 + 1) * C + j];
      if (hq == 0) {
        if (coupled) s_in[k].load(reader.g, j, m, j < c.length ? p.M - m : 0);
        else s_in[k].load(writes, j, m, j < c.length ? p.M - m : 0);
      }
    }
  };
  fetch();
  if (!slow) {
#pragma unroll
    for (int t = 0; t < MT; ++t)
#pragma unroll
      for (int e = 0; e < 4; ++e) ds[t][e] = __fdividef(ds[t][e], gates.R[(warp * 16 + frag_row() + 8 * (e >> 1)) * ldu + m0 + t * 8 + frag_col() + (e & 1)]);
  }
  __syncthreads();
  float *ds_s = reinterpret_cast<float*>(region), *late_s = Cfg::small ? inter : ds_s + C * ldu, *sum_s = gates.R;
  constexpr int lda = Cfg::small ? MP : ldu;
#pragma unroll
  for (int t = 0; t < MT; ++t)
#pragma unroll
    for (int e = 0; e < 4; e += 2)
      *reinterpret_cast<float2*>(ds_s + (warp * 16 + frag_row() + 4 * e) * ldu + m0 + t * 8 + frag_col()) = make_float2(ds[t][e], ds[t][e + 1]);
  __syncthreads();
  float4 rest[batch], row[batch];
  float s[batch][4];
#pragma unroll 1
  while (x0 < C * MP) {
    const int now = x0;
    if (hq == 0) {
#pragma unroll
      for (int k = 0; k < batch; ++k) rest[k] = *reinterpret_cast<const float4*>(inter + now + k * threads * 4);
#pragma unroll
      for (int k = 0; k < batch; ++k) {
        const int x = now + k * threads * 4, j = x / MP, m = x % MP;
        row[k] = make_float4(0.f, 0.f, 0.f, 0.f);
        s_in[k].get(coupled ? reader.g.dtype : writes.dtype, s[k]);
        float4 l = *reinterpret_cast<const float4*>(after_s + j / 16 * MP + m);
        const float4 sums = *reinterpret_cast<const float4*>(sum_s + j * ldu + m);
        if (!gates.slow[j / 16]) l.x = __fdividef(l.x, sums.x), l.y = __fdividef(l.y, sums.y), l.z = __fdividef(l.z, sums.z), l.w = __fdividef(l.w, sums.w);
        rest[k].x *= l.x, rest[k].y *= l.y, rest[k].z *= l.z, rest[k].w *= l.w;
        if (coupled)
#pragma unroll
          for (int i = 0; i < 4; ++i) s[k][i] = coupled_write(s[k][i]);
        *reinterpret_cast<float4*>(late_s + j * lda + m) = make_float4(s[k][0] * rest[k].x, s[k][1] * rest[k].y, s[k][2] * rest[k].z, s[k][3] * rest[k].w);
      }
    }
#pragma unroll
    for (int k = 0; k < batch; ++k) {
      row[k].x += e_in[k].x, row[k].y += e_in[k].y, row[k].z += e_in[k].z, row[k].w += e_in[k].w;
      rest[k].x += b1[k] * p_in[k].x + a1[k] * d_in[k].x, rest[k].y += b1[k] * p_in[k].y + a1[k] * d_in[k].y;
      rest[k].z += b1[k] * p_in[k].z + a1[k] * d_in[k].z, rest[k].w += b1[k] * p_in[k].w + a1[k] * d_in[k].w;
    }
    if (++hq == r) hq = 0, x0 += threads * 4 * batch;
    if (x0 < C * MP) fetch();
    if (hq == 0) {
#pragma unroll
      for (int k = 0; k < batch; ++k) {
        const int x = now + k * threads * 4, j = x / MP, m = x % MP;
        float4 &grad = *reinterpret_cast<float4*>(ds_s + j * ldu + m), &sums = *reinterpret_cast<float4*>(sum_s + j * ldu + m);
        sums = make_float4(row[k].x - s[k][0] * grad.x, row[k].y - s[k][1] * grad.y, row[k].z - s[k][2] * grad.z, row[k].w - s[k][3] * grad.w);
        grad.x += rest[k].x, grad.y += rest[k].y, grad.z += rest[k].z, grad.w += rest[k].w;
      }
    }
  }
  Four g_in[batch];
  auto fetch_gates = [&](int x0) {
#pragma unroll
    for (int k = 0; k < batch; ++k) {
      const int x = x0 + k * threads * 4, j = x / MP, m = x % MP;
      g_in[k].load(reader.g, j, m, j < c.length ? p.M - m : 0);
    }
  };
  fetch_gates(threadIdx.x * 4);
  __syncthreads();
  for (int x = threadIdx.x; x < 2 * MP; x += threads) {
    if (x < MP) {  // summed from the last row back
      float sum = 0.f;
#pragma unroll 16
      for (int j = C - 1; j >= 0; --j) sum += sum_s[j * ldu + x], sum_s[j * ldu + x] = sum;
    } else {  // from the first row on: exp(G_end) H dH_end, then the rows before
      const int m = x - MP;
      float sum = 0.f;
      for (int i = 0; i < parts; ++i) sum += edge[i * MP + m];
      sum *= gates.lambda[m] * after_s[m];
#pragma unroll 16
      for (int j = 0; j < C; ++j) {
        const float term = late_s[j * lda + m];
        late_s[j * lda + m] = sum, sum += term;
      }
    }
  }
  __syncthreads();
  const Rows ds_rows = rows_of(p.ds, c, head), dg_rows = rows_of(p.dg, c, head);
#pragma unroll 1
  for (int x0 = threadIdx.x * 4; x0 < C * MP; x0 += threads * 4 * batch) {
    float a[batch][4];
#pragma unroll
    for (int k = 0; k < batch; ++k) g_in[k].get(reader.g.dtype, a[k]);
    if (x0 + threads * 4 * batch < C * MP) fetch_gates(x0 + threads * 4 * batch);
#pragma unroll
    for (int k = 0; k < batch; ++k) {
      const int x = x0 + k * threads * 4, j = x / MP, m = x % MP, n = j < c.length ? p.M - m : 0;
      const float4 before = *reinterpret_cast<const float4*>(sum_s + j * ldu + m), late = *reinterpret_cast<const float4*>(late_s + j * lda + m);
      const float4 v = *reinterpret_cast<const float4*>(ds_s + j * ldu + m);
      const float grad[4] = {v.x, v.y, v.z, v.w};
      float sum[4] = {before.x + late.x, before.y + late.y, before.z + late.z, before.w + late.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] = GateReader::forgets(a[k][i]) ? 0.f : sum[i];  // a reset forgets whatever the gate would have changed
      if (coupled) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[i] -= GateReader::decay(a[k][i]) * grad[i];  // s = 1 - exp(g)
      } else {
        store4(p.ds, ds_rows.at(j) + m, grad, n);
      }
      store4(p.dg, dg_rows.at(j) + m, sum, n);
    }
  }
}

}  // namespace

int64_t backward_workspace(const Params& given) {
  if (hopper_takes(given)) return hopper_backward_workspace(given);
  Params p = given;
  if (p.math == Math::tf32) p.boundary = nullptr;
  int64_t bytes = 0;
  select_config(p, [&]<class Cfg>() { bytes = plan<Cfg>(p, nullptr).bytes; });
  return bytes;
}

void chunk_backward(const BackwardParams& given) {
  require_device();
  if (hopper_takes(given)) return hopper_backward(given);
  BackwardParams p = given;
  if (p.math == Math::tf32) p.boundary = nullptr;
  select_config(p, [&]<class Cfg>() {
    Saved saved = plan<Cfg>(p, static_cast<char*>(p.workspace));
    const int64_t slots = boundary_slots(p.B, p.T, p.N, p.cu_seqlens != nullptr, Cfg::C);
    const States states = forward_states(p, nullptr, nullptr, !p.boundary);
    saved.states = states.boundary;
    saved.gate_tiles = states.gate_tiles;
    launch("backward_queries", backward_queries<Cfg>, slots * p.HQ, Cfg::threads, RowsShared<Cfg>::bytes, p.stream, p, saved);

    ScanParams a{};
    a.base = p;
    a.out = saved.gradients;
    a.hk_in = p.dhkT, a.hv_in = p.dhvT;
    a.hk_out = p.dhk0, a.hv_out = p.dhv0;
    a.x_k = p.q, a.x_v = p.d_o;
    a.y_k = saved.do1_decayed, a.y_v = saved.p_decayed;
    a.decay = states.decay;
    const int64_t slices = ceil_div(p.K, kStateRows) + ceil_div(p.V, kStateRows);
    launch("state_scan (backward)", state_scan<Cfg, true>, p.N * p.H * slices, 128, ScanShared<Cfg>::bytes, p.stream, a);
    launch("backward_keys", backward_keys<Cfg>, slots * p.H, KeysShared<Cfg>::threads, KeysShared<Cfg>::bytes, p.stream, p, saved);
  });
}

}  // namespace gsa::cuda
