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
#include "states.h"

namespace gsa::cuda {

namespace {

// What sweep 1 leaves behind, per slot and query head.
struct Saved {
  const void* states;        // [slots, H, K + V, M]       E   before each chunk (forward_states)
  float* gradients;          // [slots, H, K + V, M]           cotangents after each chunk
  float *p, *do1, *e;        // [slots, HQ, C, MP]
  void *p_decayed, *do1_decayed;   // [slots, HQ, C, MP]   E   p exp(G), scale do1 exp(G)
  float *after, *inter;      // [slots, H, C, MP]              the part of dg from after the chunk; of ds, decayed to the chunk's end
  float *A1, *B;             // [slots, HQ, C, C]              strictly lower
  float *A2, *dA1;           // [slots, HQ, C, C]              lower; dA1 times scale
  float* diagonals;          // [slots, HQ, 2, C]              of A1 and B
  int64_t bytes;
};

template <class Cfg>
Saved plan(const Params& p, char* base) {
  const int64_t slots = boundary_slots(p.B, p.T, p.N, p.cu_seqlens != nullptr, Cfg::C);
  Saved s{};
  s.bytes = (forward_workspace(p) + 255) / 256 * 256;      // which comes first
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
  s.after = floats(slots * p.H * Cfg::C * Cfg::MP);
  s.inter = floats(slots * p.H * Cfg::C * Cfg::MP);
  s.A1 = floats(rows * Cfg::C);
  s.B = floats(rows * Cfg::C);
  s.A2 = floats(rows * Cfg::C);
  s.dA1 = floats(rows * Cfg::C);
  s.diagonals = floats(rows * 2);
  return s;
}

template <class Cfg>
constexpr DType tile_dtype() {
  return Cfg::fp32 ? DType::f32 : std::is_same_v<typename Cfg::E, bf16> ? DType::bf16 : DType::f16;
}

// ------------------------------------------------------------------------------------------------------------ 1. queries

template <class Cfg>
__global__ __launch_bounds__(Cfg::threads, Cfg::MP == 64 && !Cfg::fp32 ? 3 : 1) void backward_queries(const __grid_constant__ BackwardParams p,
                                                                                                      const __grid_constant__ Saved saved) {
  using E = typename Cfg::E;
  using A = Arith<E>;
  constexpr int C = Cfg::C, MP = Cfg::MP, MT = Cfg::MT, CT = Cfg::CT, DS = Cfg::DS, DT = Cfg::DT, NB = Cfg::NB, ldm = Cfg::ldm, ldd = Cfg::ldd;
  const int64_t q_head = blockIdx.x % p.HQ, head = q_head / (p.HQ / p.H);
  Chunk c;
  if (!find_chunk(p, blockIdx.x / p.HQ, C, c)) return;
  const int warp = threadIdx.x / 32;

  extern __shared__ __align__(16) char shared[];
  Arena mem{shared};
  Gates<Cfg> gates(mem, p, c, head);
  float* S = RowsShared<Cfg>::needs_S ? mem.take<float>(C * Cfg::lds) : nullptr;
  float* x_scratch = mem.take<float>(NB * Triangle<Cfg>::x_floats) + warp * Triangle<Cfg>::x_floats;
  char* region = mem.p;
  float* y_scratch = reinterpret_cast<float*>(region + (Cfg::fp32 ? RowsShared<Cfg>::slices : 0)) + warp * Triangle<Cfg>::y_floats;
  Arena slices{region};
  E* x_s = slices.take<E>(C * ldd);                        // q, d_o
  E* y_s = slices.take<E>(C * ldd);                        // k, v
  E* h_s = slices.take<E>(DS * ldm);                       // Hk, Hv
  const E* states = static_cast<const E*>(saved.states) + (c.slot * p.H + head) * (p.K + p.V) * p.M;
  const Triangle<Cfg> triangle{gates, S, x_scratch, y_scratch, warp};
  const int64_t item = c.slot * p.HQ + q_head;

  gates.fill(S, Cfg::lds);

  auto keep = [&](float* out, const float (&x)[CT][4], float factor) {
    float y[CT][4];
#pragma unroll
    for (int t = 0; t < CT; ++t)
#pragma unroll
      for (int e = 0; e < 4; ++e) y[t][e] = x[t][e] * factor;
    store_dense<CT>(out + item * C * C, C, y, warp * 16);
  };

  // First (q, k, Hk), then (d_o, v, Hv): triangle and state products, then the sum over the chunk; the diagonals stay apart. One copy of the code
  // for both: it would not fit the instruction cache twice.
  float o1[MT][4], dp[MT][4], x[CT][4], a1[2], b1[2];
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
    const int D = pass ? p.V : p.K;
    const Rows rows = rows_of(pass ? p.d_o : p.q, c, q_head), columns = rows_of(pass ? p.v : p.k, c, head);
    const E* state = states + (pass ? int64_t(p.K) * p.M : 0);
    const float scale = pass ? 1.f : static_cast<float>(p.scale);
    zero(x);
    zero(dp);
#pragma unroll 1
    for (int d = 0; d < D; d += DS) {
      __syncthreads();
      load_tile<Cfg::threads, E, C, DS>(x_s, ldd, rows, c.length, d, D);
      load_tile<Cfg::threads, E, C, DS>(y_s, ldd, columns, c.length, d, D);
      load_tile<Cfg::threads, E, DS, MP>(h_s, ldm, rows_of(state + int64_t(d) * p.M, p.M, tile_dtype<Cfg>()), D - d, 0, p.M);
      cp_async_wait();
      __syncthreads();
      typename A::template Op<DS> op;
      A::template from_tile<DS>(op, x_s + warp * 16 * ldd, ldd);
#pragma unroll
      for (int J = 0; J < NB; ++J)
        if (J <= warp) A::template mma_nt<2, DS>(x + 2 * J, op, y_s + J * 16 * ldd, ldd);
      A::template mma_nn<MT, DS>(dp, op, h_s, ldm);
    }
    __syncthreads();                                       // the slices' room becomes scratch
#pragma unroll
    for (int t = 0; t < MT; ++t)
#pragma unroll
      for (int e = 0; e < 4; ++e) dp[t][e] *= scale;
#pragma unroll
    for (int t = 0; t < CT; ++t)
#pragma unroll
      for (int e = 0; e < 4; ++e) x[t][e] = Gates<Cfg>::operand(x[t][e] * scale);
    triangle.split_diagonal(x, b1);
    float* out = saved.diagonals + (item * 2 + pass) * C + warp * 16 + frag_row();
    if ((lane_id() & 3) == 0) out[0] = b1[0], out[8] = b1[1];
    store_dense<CT>((pass ? saved.B : saved.A1) + item * C * C, C, x, warp * 16);
    triangle.apply(dp, x);
    if (pass == 0) {
      a1[0] = b1[0], a1[1] = b1[1];
#pragma unroll
      for (int t = 0; t < MT; ++t)
#pragma unroll
        for (int e = 0; e < 4; ++e) o1[t][e] = dp[t][e];
    }
  }

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
        const float w = exp_of<Cfg::fp32>(logit(t, e) - top);
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
        const float prob = exp_of<Cfg::fp32>(logit(t, e) - top) * inv;
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
    store_dense<MT>((pass ? saved.do1 : saved.p) + item * C * MP, MP, y, warp * 16);
    diagonal_of<Cfg>(gates, S, y, warp, d);
    triangle.contract(x, y);
    triangle.add_diagonal(x, d);
    const float scale = pass ? static_cast<float>(p.scale) : 1.f;
    keep(pass ? saved.dA1 : saved.A2, x, scale);
    E* decayed = static_cast<E*>(pass ? saved.do1_decayed : saved.p_decayed) + (item * C + warp * 16 + frag_row()) * MP + frag_col();
#pragma unroll
    for (int t = 0; t < MT; ++t) {
      store2<E>(decayed + t * 8, y[t][0] * scale, y[t][1] * scale);
      store2<E>(decayed + 8 * MP + t * 8, y[t][2] * scale, y[t][3] * scale);
    }
    if (pass == 0) {
#pragma unroll
      for (int t = 0; t < MT; ++t)
#pragma unroll
        for (int e = 0; e < 4; ++e) y[t][e] = dp[t][e];
    }
  }
  typename A::template Split<C> da1;
  typename A::template Op<MP> dg;
  A::template from_acc_split<C>(da1, x, x_scratch, Cfg::ldx);
  A::template from_acc<MP>(dg, y, y_scratch, Triangle<Cfg>::ldy);
#pragma unroll 1
  for (int k = 0; k < p.K; k += DS) {
    __syncthreads();
    load_tile<Cfg::threads, E, C, DS>(y_s, ldd, rows_of(p.k, c, head), c.length, k, p.K);
    load_tile<Cfg::threads, E, DS, MP>(h_s, ldm, rows_of(states + int64_t(k) * p.M, p.M, tile_dtype<Cfg>()), p.K - k, 0, p.M);
    cp_async_wait();
    __syncthreads();
    float acc[DT][4];
    zero(acc);
#pragma unroll
    for (int J = 0; J < NB; ++J)
      if (J <= warp) A::template mma_nn<DT, 16>(acc, da1.block(J), y_s + J * 16 * ldd, ldd);
    A::template mma_nt<DT, MP>(acc, dg, h_s, ldm);
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

template <class Cfg>
struct KeysShared {
  using E = typename Cfg::E;
  static constexpr int DS = Cfg::DS < 32 ? Cfg::DS : 32, ldd = DS + Cfg::pad;
  static constexpr int ldr = Cfg::C + 8;                              // rows of A1, B
  static constexpr int ldz = Cfg::MP + 4;                             // of the scratch of a slow block
  static constexpr int edge = Cfg::MP > 2 * Cfg::threads ? Cfg::MP : 2 * Cfg::threads;
  static constexpr int64_t slices =
      2 * arena(Cfg::C * ldd, sizeof(E)) + arena(DS * Cfg::lds, 4) + arena(DS * Cfg::ldm, sizeof(E)) + arena(Cfg::C * Cfg::ldx, 4);
  static constexpr bool needs_products = !(Cfg::fp32 && Cfg::NB == 1);   // else every product is one of the exact in-block ones
  static constexpr int64_t rows = 2 * arena(16 * ldr, 4) + arena(16 * ldz, 4) + (needs_products ? 2 * arena(16 * Cfg::lds, 4) : 0);
  static constexpr int64_t tile = arena(Cfg::C * Cfg::ldu, 4);          // ds, at last
  static constexpr int64_t region = slices > rows ? (slices > tile ? slices : tile) : (rows > tile ? rows : tile);
  static constexpr int64_t bytes = Gates<Cfg>::bytes + arena(edge, 4) + region;
  static_assert(bytes <= 101376, "99 KB is what every GPU from sm_80 on has");
};

// Slow blocks only, so not inlined. W[j][m] = a_{j+1} ... a_15, the decay from row j to the end of the block.
template <class Cfg>
__device__ __noinline__ void decays_to_end(const Gates<Cfg>& gates, float* w_out, int block) {
  __syncwarp();
  for (int m = lane_id(); m < Cfg::MP; m += 32) {
    float w = 1.f;
    for (int j = 15; j >= 0; --j) w_out[j * KeysShared<Cfg>::ldz + m] = w, w *= gates.gate(block * 16 + j, m);
  }
  __syncwarp();
}
// z[j][m] (+)= sum_{i > j} exp(G_i - G_j) (B_ij p_i + A1_ij do1_i) inside the block, exactly: z <- (z + ..._i) a_i from the last row down to j + 1.
// a, b: the block's columns of A1 and B; prob, grad: its rows of p and do1.
template <class Cfg>
__device__ __noinline__ void keys_block(const Gates<Cfg>& gates, float* z_out, const float* a, const float* b, int ld, const float* prob, const float* grad,
                                        int block, bool add) {
  constexpr int ldz = KeysShared<Cfg>::ldz;
  __syncwarp();
  for (int m = lane_id(); m < Cfg::MP; m += 32) {
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
__global__ __launch_bounds__(Cfg::threads, Cfg::MP == 64 && !Cfg::fp32 ? 3 : 1) void backward_keys(const __grid_constant__ BackwardParams p,
                                                                                                   const __grid_constant__ Saved saved) {
  using E = typename Cfg::E;
  using A = Arith<E>;
  using X = typename Cfg::X;
  using Shared = KeysShared<Cfg>;
  constexpr int C = Cfg::C, MP = Cfg::MP, MT = Cfg::MT, DS = Shared::DS, DT = DS / 8, NB = Cfg::NB, ldd = Shared::ldd, lds = Cfg::lds, ldx = Cfg::ldx,
                ldr = Shared::ldr, ldu = Cfg::ldu;
  constexpr int threads = Cfg::threads;
  const int64_t head = blockIdx.x % p.H;
  const int r = p.HQ / p.H;
  Chunk c;
  if (!find_chunk(p, blockIdx.x / p.H, C, c)) return;
  const int warp = threadIdx.x / 32;

  extern __shared__ __align__(16) char shared[];
  Arena mem{shared};
  Gates<Cfg> gates(mem, p, c, head);
  float* end_s = gates.R;                                   // s_j exp(G_end - G_j), in R's place while the slices stream by
  float* edge = mem.take<float>(Shared::edge);              // sum over K of Hk dHk_end and over V of Hv dHv_end, Hk and Hv before the chunk
  Arena slices{mem.p}, rows{mem.p};
  E* x_s = slices.take<E>(C * ldd);                         // k, v
  E* y_s = slices.take<E>(C * ldd);                         // q, d_o
  float* h_s = slices.take<float>(DS * lds);                // dHk_end, dHv_end
  E* start_s = slices.take<E>(DS * Cfg::ldm);               // Hk, Hv before the chunk
  float* t_s = slices.take<float>(C * ldx);                 // dA1, A2
  float* a_s = rows.take<float>(16 * ldr);                  // 16 rows of A1
  float* b_s = rows.take<float>(16 * ldr);                  // of B
  float* z_s = rows.take<float>(16 * Shared::ldz);          // scratch of a slow block
  float* pu_s = rows.take<float>(Shared::needs_products ? 16 * lds : 0);   // p U
  float* du_s = rows.take<float>(Shared::needs_products ? 16 * lds : 0);   // do1 U

  gates.fill(end_s, ldu, true);

  float ds[MT][4];                                          // first the part from after the chunk, then the part from inside it, without the diagonal
  zero(ds);
  // The slot-wise sum of H dH_end. A thread has two slots and every parts-th row of a slice.
  constexpr int pairs = MP / 2, parts = threads > pairs ? threads / pairs : 1, passes = pairs > threads ? pairs / threads : 1;
  const int edge_m = threadIdx.x % pairs * 2, edge_part = threadIdx.x / pairs;
  float edge_sum[passes][2] = {};

  const int64_t first_item = c.slot * p.HQ + head * r;
  const float* gradients = saved.gradients + (c.slot * p.H + head) * (p.K + p.V) * p.M;
  const E* starts = static_cast<const E*>(saved.states) + (c.slot * p.H + head) * (p.K + p.V) * p.M;

  auto load_head = [&](const View& yv, const float* triangles, int hq, int d, int D) {
    load_tile<threads, E, C, DS>(y_s, ldd, rows_of(yv, c, head * r + hq), c.length, d, D);
    load_tile<threads, float, C, C>(t_s, ldx, rows_of(triangles + (first_item + hq) * C * C, C, DType::f32), C, 0, C);
  };
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {                    // (k, q) -> dk, then (v, d_o) -> dv: one copy of the code
    const View xv = pass ? p.v : p.k, yv = pass ? p.d_o : p.q, out = pass ? p.dv : p.dk;
    const float* triangles = pass ? saved.A2 : saved.dA1;
    const int D = pass ? p.V : p.K, state_row = pass ? p.K : 0;
#pragma unroll 1
    for (int d = 0; d < D; d += DS) {
      __syncthreads();
      load_tile<threads, E, C, DS>(x_s, ldd, rows_of(xv, c, head), c.length, d, D);
      load_tile<threads, float, DS, MP>(h_s, lds, rows_of(gradients + int64_t(state_row + d) * p.M, p.M, DType::f32), D - d, 0, p.M);
      load_tile<threads, E, DS, MP>(start_s, Cfg::ldm, rows_of(starts + int64_t(state_row + d) * p.M, p.M, tile_dtype<Cfg>()), D - d, 0, p.M);
      cp_async_commit();
      load_head(yv, triangles, 0, d, D);                    // arrives behind the products with the state
      cp_async_commit();
      cp_async_wait_for<1>();
      __syncthreads();
#pragma unroll
      for (int k = 0; k < passes; ++k)
#pragma unroll 8
        for (int i = edge_part; i < DS; i += parts) {
          const int m = edge_m + 2 * k * threads;
          const float2 g = load2(h_s + i * lds + m), h = load2(start_s + i * Cfg::ldm + m);
          edge_sum[k][0] = fmaf(h.x, g.x, edge_sum[k][0]);
          edge_sum[k][1] = fmaf(h.y, g.y, edge_sum[k][1]);
        }
      float acc[DT][4];
      zero(acc);
      {
        typename X::template Op<MP> op;
        X::template from_tile<MP>(op, end_s + warp * 16 * ldu, ldu);
        X::template mma_nt<DT, MP>(acc, op, h_s, lds);
        typename X::template Op<DS> xo;
        X::template from_tile<DS>(xo, x_s + warp * 16 * ldd, ldd);
        X::template mma_nn<MT, DS>(ds, xo, h_s, lds);
      }
#pragma unroll 1
      for (int hq = 0; hq < r; ++hq) {
        if (hq) {
          __syncthreads();
          load_head(yv, triangles, hq, d, D);
        }
        cp_async_wait();
        __syncthreads();
        typename A::template Split<C> op;
        A::template from_tile_t_split<C>(op, t_s + warp * 16, ldx);
#pragma unroll
        for (int b = 0; b < NB; ++b)
          if (b >= warp) A::template mma_nn<DT, 16>(acc, op.block(b), y_s + b * 16 * ldd, ldd);
      }
      store_rows<E, DT>(rows_of(out, c, head), acc, warp * 16, c.length, d, D);
    }
  }

  // What comes from after the chunk into dg_t: exp(G_end) H dH_end + sum_{j < t} s_j ds_j.
#pragma unroll
  for (int k = 0; k < passes; ++k)
#pragma unroll
    for (int e = 0; e < 2; ++e) edge[edge_part * MP + edge_m + 2 * k * threads + e] = edge_sum[k][e];
#pragma unroll
  for (int t = 0; t < MT; ++t)
#pragma unroll
    for (int e = 0; e < 4; ++e) end_s[(warp * 16 + frag_row() + 8 * (e >> 1)) * ldu + t * 8 + frag_col() + (e & 1)] *= ds[t][e];
  float* inter = saved.inter + (c.slot * p.H + head) * C * MP;
  store_dense<MT>(inter, MP, ds, warp * 16);
  zero(ds);
  __syncthreads();
  for (int m = threadIdx.x; m < MP; m += threads) {
    float sum = 0.f;
    for (int i = 0; i < parts; ++i) sum += edge[i * MP + m];
    for (int b = 0; b < NB; ++b) sum *= gates.lambda[b * MP + m];
    float* out = saved.after + (c.slot * p.H + head) * C * MP + m;
#pragma unroll 16
    for (int j = 0; j < C; ++j) out[j * MP] = sum, sum += end_s[j * ldu + m];
  }
  __syncthreads();
  gates.fill(nullptr, 0);                                   // R

  // ds, rows j of block J = warp, from the last block down to the own one. Fast blocks: acc <- (acc + B^T (p R) + A1^T (do1 R)) lambda, slow ones:
  // acc <- acc lambda + B^T (p U) + A1^T (do1 U); at last decayed to row j: acc / R_j (fast), acc W_j + the exact in-block sums (slow).
  const bool slow = gates.slow[warp];
  auto decay = [&](int b) {
#pragma unroll
    for (int t = 0; t < MT; ++t) {
      const float2 l = *reinterpret_cast<const float2*>(gates.lambda + b * MP + t * 8 + frag_col());
      ds[t][0] *= l.x, ds[t][1] *= l.y, ds[t][2] *= l.x, ds[t][3] *= l.y;
    }
  };
  auto operand = [](float x) { return Gates<Cfg>::operand(x); };
#pragma unroll 1
  for (int b = NB - 1; b >= 0; --b) {
    const bool earlier = warp < b, own = warp == b;
    if (earlier && gates.slow[b]) decay(b);
#pragma unroll 1
    for (int hq = 0; hq < r; ++hq) {
      const int64_t item = first_item + hq;
      __syncthreads();
      load_tile<threads, float, 16, C>(a_s, ldr, rows_of(saved.A1 + (item * C + b * 16) * C, C, DType::f32), 16, 0, C);
      load_tile<threads, float, 16, C>(b_s, ldr, rows_of(saved.B + (item * C + b * 16) * C, C, DType::f32), 16, 0, C);
      const float *prob = saved.p + (item * C + b * 16) * MP, *grad = saved.do1 + (item * C + b * 16) * MP;
      if constexpr (Shared::needs_products) {
        constexpr int steps = 16 * MP / 4 / threads;
#pragma unroll
        for (int s = 0; s < steps; ++s) {
          const int e = (s * threads + threadIdx.x) * 4, i = e / MP, m = e % MP;
          const float4 u = *reinterpret_cast<const float4*>(gates.R + (b * 16 + i) * ldu + m);
          const float4 x = *reinterpret_cast<const float4*>(prob + e), y = *reinterpret_cast<const float4*>(grad + e);
          *reinterpret_cast<float4*>(pu_s + i * lds + m) = make_float4(operand(x.x * u.x), operand(x.y * u.y), operand(x.z * u.z), operand(x.w * u.w));
          *reinterpret_cast<float4*>(du_s + i * lds + m) = make_float4(operand(y.x * u.x), operand(y.y * u.y), operand(y.z * u.z), operand(y.w * u.w));
        }
      }
      cp_async_wait();
      __syncthreads();
      if (Shared::needs_products && (earlier || (own && !slow))) {
        typename X::template Op<16> op;
        X::template from_tile_t<16>(op, b_s + warp * 16, ldr);
        X::template mma_nn<MT, 16>(ds, op, pu_s, lds);
        X::template from_tile_t<16>(op, a_s + warp * 16, ldr);
        X::template mma_nn<MT, 16>(ds, op, du_s, lds);
      } else if (own) {
        const float* z = z_s + frag_row() * Shared::ldz + frag_col();
        auto at = [](int t, int e) { return 8 * (e >> 1) * Shared::ldz + t * 8 + (e & 1); };
        const Gates<Cfg> copy = gates;
        if (hq == 0) {
          decays_to_end<Cfg>(copy, z_s, b);
#pragma unroll
          for (int t = 0; t < MT; ++t)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              ds[t][e] *= z[at(t, e)];
              inter[(warp * 16 + frag_row() + 8 * (e >> 1)) * MP + t * 8 + frag_col() + (e & 1)] *= z[at(t, e)];
            }
        }
        keys_block<Cfg>(copy, z_s, a_s + b * 16, b_s + b * 16, ldr, prob, grad, b, hq > 0);
        if (hq == r - 1) {
#pragma unroll
          for (int t = 0; t < MT; ++t)
#pragma unroll
            for (int e = 0; e < 4; ++e) ds[t][e] += z[at(t, e)];
        }
      }
    }
    if (earlier && !gates.slow[b]) decay(b);
  }
  if (!slow) {
#pragma unroll
    for (int t = 0; t < MT; ++t)
#pragma unroll
      for (int e = 0; e < 4; ++e) ds[t][e] = __fdividef(ds[t][e], gates.R[(warp * 16 + frag_row() + 8 * (e >> 1)) * ldu + t * 8 + frag_col() + (e & 1)]);
  }

  // From here on element by element, four slots to a thread, tiles in shared memory: the rest of ds (from after the chunk, decayed to its row; the
  // diagonal), and e - s ds, in R's place, for dg.
  __syncthreads();
  float *ds_s = reinterpret_cast<float*>(mem.p), *sum_s = gates.R;
#pragma unroll
  for (int t = 0; t < MT; ++t)
#pragma unroll
    for (int e = 0; e < 4; e += 2)
      *reinterpret_cast<float2*>(ds_s + (warp * 16 + frag_row() + 4 * e) * ldu + t * 8 + frag_col()) = make_float2(ds[t][e], ds[t][e + 1]);
  __syncthreads();
  const GateReader& reader = gates.reader;
  const float* diagonals = saved.diagonals + first_item * 2 * C;
#pragma unroll 2
  for (int x = threadIdx.x * 4; x < C * MP; x += threads * 4) {
    const int j = x / MP, m = x % MP;
    float s[4], rest[4], row[4] = {};
    const bool coupled = !reader.s.ptr;
    gather(s, coupled ? reader.g.ptr : reader.s.ptr, coupled ? reader.g.dtype : reader.s.dtype, (coupled ? reader.g.at(j) : reader.s.at(j)) + m, 1,
           j < c.length ? p.M - m : 0);
    *reinterpret_cast<float4*>(rest) = *reinterpret_cast<const float4*>(inter + x);
    for (int b = NB - 1; b > j / 16; --b)
#pragma unroll
      for (int i = 0; i < 4; ++i) rest[i] *= gates.lambda[b * MP + m + i];
    if (!gates.slow[j / 16])
#pragma unroll
      for (int i = 0; i < 4; ++i) rest[i] = __fdividef(rest[i], sum_s[j * ldu + m + i]);
#pragma unroll 1
    for (int hq = 0; hq < r; ++hq) {
      const int64_t at = (first_item + hq) * C * MP + x;
      const float4 e = *reinterpret_cast<const float4*>(saved.e + at), u = *reinterpret_cast<const float4*>(saved.p + at),
                   w = *reinterpret_cast<const float4*>(saved.do1 + at);
      const float a1 = diagonals[hq * 2 * C + j], b1 = diagonals[(hq * 2 + 1) * C + j];
      row[0] += e.x, row[1] += e.y, row[2] += e.z, row[3] += e.w;
      rest[0] += b1 * u.x + a1 * w.x, rest[1] += b1 * u.y + a1 * w.y, rest[2] += b1 * u.z + a1 * w.z, rest[3] += b1 * u.w + a1 * w.w;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float& grad = ds_s[j * ldu + m + i];
      sum_s[j * ldu + m + i] = row[i] - (coupled ? coupled_write(s[i]) : s[i]) * grad;
      grad += rest[i];
    }
  }
  __syncthreads();
  for (int m = threadIdx.x; m < MP; m += threads) {         // summed from the last row back
    const float* after = saved.after + (c.slot * p.H + head) * C * MP + m;
    float sum = 0.f;
#pragma unroll 16
    for (int j = C - 1; j >= 0; --j) sum += sum_s[j * ldu + m], sum_s[j * ldu + m] = sum + after[j * MP];
  }
  __syncthreads();
  const Rows ds_rows = rows_of(p.ds, c, head), dg_rows = rows_of(p.dg, c, head);
#pragma unroll 2
  for (int x = threadIdx.x * 4; x < C * MP; x += threads * 4) {
    const int j = x / MP, m = x % MP, n = j < c.length ? p.M - m : 0;
    float a[4], grad[4], sum[4];
    gather(a, reader.g.ptr, reader.g.dtype, reader.g.at(j) + m, 1, n);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[i] = GateReader::decay(a[i]);
      grad[i] = ds_s[j * ldu + m + i];
      sum[i] = a[i] == 0.f ? 0.f : sum_s[j * ldu + m + i];  // a reset forgets whatever the gate would have changed
      if (!p.ds.ptr) sum[i] -= a[i] * grad[i];              // coupled: s = 1 - exp(g)
    }
    if (p.ds.ptr) store4(p.ds, ds_rows.at(j) + m, grad, n);
    store4(p.dg, dg_rows.at(j) + m, sum, n);
  }
}

}  // namespace

int64_t backward_workspace(const Params& p) {
  int64_t bytes = 0;
  select_config(p, [&]<class Cfg>() { bytes = plan<Cfg>(p, nullptr).bytes; });
  return bytes;
}

void chunk_backward(const BackwardParams& p) {
  require_device();
  select_config(p, [&]<class Cfg>() {
    Saved saved = plan<Cfg>(p, static_cast<char*>(p.workspace));
    const int64_t slots = boundary_slots(p.B, p.T, p.N, p.cu_seqlens != nullptr, Cfg::C);
    const States states = forward_states(p, nullptr, nullptr, !p.boundary);
    saved.states = states.boundary;
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
    launch("backward_keys", backward_keys<Cfg>, slots * p.H, Cfg::threads, KeysShared<Cfg>::bytes, p.stream, p, saved);
  });
}

}  // namespace gsa::cuda
