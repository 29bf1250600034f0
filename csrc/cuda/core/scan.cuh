// States at the chunk boundaries, in one sweep over the sequence. Forward (gradient = false), over k and v; backward, over q and d_o, last chunk first:
//
//     Hk <- exp(G_end) Hk + sum_j k_j (x) s_j exp(G_end - G_j)          dHk <- exp(G_end) dHk + scale sum_i q_i  (x) do1_i exp(G_i)
//     Hv <- exp(G_end) Hv + sum_j v_j (x) s_j exp(G_end - G_j)          dHv <- exp(G_end) dHv +       sum_i do_i (x) p_i   exp(G_i)
//
// The right factors come ready-made as tiles Y [C][MP] (chunk_gates below, which makes all that depends on the gates only; backward_queries), so that the sweep does nothing but load and multiply:
// tiles arrive by asynchronous copies `stages` - 1 steps ahead, one barrier per step. A step is a chunk (half a chunk, where its tiles are as large), in backward of
// one query head.
// A block of 4 warps owns 64 rows of [Hk; Hv^T] (of K or of V) times all slots, in fp32 registers; before each chunk it leaves a copy in memory:
// boundary[slot], in E, is the state before the chunk, gradient[slot], in fp32 (TF32), the cotangent of the state after it.
#pragma once
#include "tile_io.cuh"

namespace gsa::cuda {

constexpr int kStateRows = 64;

// ------------------------------------------------------------------------------------------------------------ gates

struct GatesParams {
  Params base;
  void* y;  // [slots, H, C, MP]  E   s_j exp(G_end - G_j): right factors of the forward sweep
  float* decay;  // [slots, H, MP]         exp(G_end)
  float* tiles;  // [slots, H] GateTile
};

// One thread has a slot in a block of 16 rows (or several of them).
template <class Cfg>
constexpr int gates_threads = Cfg::NB * Cfg::MP < 256 ? Cfg::NB * Cfg::MP : 256;

template <class Cfg>
__global__ __launch_bounds__(gates_threads<Cfg>) void chunk_gates(const __grid_constant__ GatesParams a) {
  using E = typename Cfg::E;
  using T = GateTile<Cfg>;
  constexpr int C = Cfg::C, MP = Cfg::MP, NB = Cfg::NB, threads = gates_threads<Cfg>, items = NB * MP / threads;
  static_assert(NB * MP % threads == 0);
  const Params& p = a.base;
  const int64_t head = blockIdx.x % p.H;
  Chunk c;
  if (!find_chunk(p, blockIdx.x / p.H, C, c)) return;
  __shared__ float lambda[NB * MP];
  __shared__ int slow[NB];
  if (threadIdx.x < NB) slow[threadIdx.x] = 0;
  const GateReader gates(p, c, head);
  Gather<16> raw_g[items], raw_s[items];
#pragma unroll
  for (int k = 0; k < items; ++k) {
    const int b = (threadIdx.x + k * threads) / MP, m = (threadIdx.x + k * threads) % MP;
    gates.load_gates16(b * 16, m, raw_g[k]);
    gates.load_writes16(b * 16, m, raw_s[k]);
  }
  float g[items][16], s[items][16];
  __syncthreads();
#pragma unroll
  for (int k = 0; k < items; ++k) {
    const int e = threadIdx.x + k * threads;
    float w = 1.f;
    gates.gates16(raw_g[k], g[k]);
    gates.writes16(raw_s[k], s[k]);
#pragma unroll
    for (int j = 15; j >= 0; --j) w *= g[k][j];
    lambda[e] = w;
    if (!(w >= Cfg::smallest)) slow[e / MP] = 1;  // NaN too
  }
  __syncthreads();
  const int64_t tile = c.slot * p.H + head;
  float* out = a.tiles + tile * T::floats;
#pragma unroll
  for (int k = 0; k < items; ++k) {
    const int e = threadIdx.x + k * threads, b = e / MP, m = e % MP;
    float after = 1.f, w = 1.f, u = slow[b] ? 1.f : __frcp_rn(lambda[e]);
    for (int i = NB - 1; i > b; --i) after *= lambda[i * MP + m];
    E* y = static_cast<E*>(a.y) + (tile * C + b * 16) * MP + m;
    float* row = out + b * 16 * MP + m;
    if (b == 0) a.decay[tile * MP + m] = after * lambda[m];
    out[T::lambda + e] = lambda[e], out[T::after + e] = after;
#pragma unroll
    for (int j = 0; j < 16; ++j) u *= g[k][j], row[T::R + j * MP] = u;
#pragma unroll
    for (int j = 15; j >= 0; --j) {
      const float x = s[k][j] * w;
      row[T::S + j * MP] = Cfg::exact ? x : to_tf32(x);
      y[j * MP] = from_float<E>(x * after);
      w *= g[k][j];
      if constexpr (Cfg::exact) row[T::a + j * MP] = g[k][j], row[T::s + j * MP] = s[k][j];
    }
  }
  if (threadIdx.x < 4) out[T::slow + threadIdx.x] = __int_as_float(threadIdx.x < NB ? slow[threadIdx.x] : 0);
}

// ------------------------------------------------------------------------------------------------------------ the sweep

struct ScanParams {
  Params base;
  void* out;  // [slots, H, K + V, M]
  // forward: hk0, hv0 of base in; hkT, hvT out. backward: cotangents of the final states in, of the initial states out.
  const void *hk_in, *hv_in;
  bool in_broadcast;
  void *hk_out, *hv_out;
  View x_k, x_v;  // k, v or q, d_o
  const void *y_k, *y_v;  // [slots, H or HQ, C, MP] E
  const float* decay;  // [slots, H, MP]
};

template <class Cfg>
struct ScanShared {
  static constexpr int stages = Cfg::MP == 64 ? 3 : 2, blocks_per_sm = Cfg::MP == 64 ? 4 : Cfg::MP == 128 ? 3 : 2;
  static constexpr int rows = Cfg::fp32 && Cfg::C > 32 ? 32 : Cfg::C, pieces = Cfg::C / rows;  // tokens of a step
  static constexpr int ldx = kStateRows + Cfg::pad, ldy = Cfg::MP + Cfg::pad;
  static constexpr int64_t stage = arena(rows * ldx, sizeof(typename Cfg::E)) + arena(rows * ldy, sizeof(typename Cfg::E)) + arena(Cfg::MP, 4);
  static constexpr int64_t bytes = stages * stage;
  static_assert(bytes <= 101376, "99 KB is what every GPU from sm_80 on has");
};

template <class Cfg, bool gradient>
__global__ __launch_bounds__(128, ScanShared<Cfg>::blocks_per_sm) void state_scan(const __grid_constant__ ScanParams a) {
  using E = typename Cfg::E;
  using A = typename Cfg::A;
  using Shared = ScanShared<Cfg>;
  constexpr int C = Cfg::C, MP = Cfg::MP, MT = Cfg::MT, ldx = Shared::ldx, ldy = Shared::ldy, stages = Shared::stages, rows = Shared::rows,
                pieces = Shared::pieces;
  const Params& p = a.base;
  const int k_slices = (p.K + kStateRows - 1) / kStateRows, slices = k_slices + (p.V + kStateRows - 1) / kStateRows;
  const int slice = blockIdx.x % slices;
  const int64_t head = blockIdx.x / slices % p.H, n = blockIdx.x / slices / p.H;
  const bool values = slice >= k_slices;
  const int D = values ? p.V : p.K, d0 = (values ? slice - k_slices : slice) * kStateRows;
  const View& xv = values ? a.x_v : a.x_k;
  const int r = p.HQ / p.H, heads = gradient ? r : 1;

  extern __shared__ __align__(16) char shared[];
  struct Stage {
    E *x, *y;
    float* decay;
  };
  auto stage = [&](int64_t step) {
    Arena mem{shared + step % stages * Shared::stage};
    Stage s;
    s.x = mem.take<E>(rows * ldx), s.y = mem.take<E>(rows * ldy), s.decay = mem.take<float>(MP);
    return s;
  };

  Chunk c;
  c.seq = sequence(p, n, C);
  const int each = heads * pieces;  // steps of a chunk
  const int64_t steps = c.seq.chunks * each;
  const int warp = threadIdx.x / 32;
  const int row = d0 + warp * 16 + frag_row();  // and row + 8
  float acc[MT][4];
  zero(acc);
  auto decay = [](float (&x)[MT][4], const float* l) {
#pragma unroll
    for (int t = 0; t < MT; ++t) {
      const float2 f = *reinterpret_cast<const float2*>(l + t * 8 + frag_col());
      x[t][0] *= f.x, x[t][1] *= f.y, x[t][2] *= f.x, x[t][3] *= f.y;
    }
  };

  // One element of a state tensor: Hk [K][M] or Hv [M][V] of this sequence and head.
  const int64_t state_n = state_row(p, n), state = (state_n * p.H + head) * int64_t(D) * p.M;
  if (state_n < 0) return;
  auto at = [&](int d, int m) { return values ? int64_t(m) * D + d : int64_t(d) * p.M + m; };
  auto each_element = [&](auto&& f) {
#pragma unroll
    for (int t = 0; t < MT; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int d = row + (i >> 1) * 8, m = t * 8 + frag_col() + (i & 1);
        if (d < D && m < p.M) f(acc[t][i], at(d, m));
      }
  };
  const DType type = gradient ? DType::f32 : p.state_dtype;
  with_states(values ? a.hv_in : a.hk_in, type, [&](const auto* in) {
    in += a.in_broadcast ? head * int64_t(D) * p.M : state;
    each_element([&](float& x, int64_t i) { x = to_float(in[i]); });
  });
  auto keep = [&](int64_t slot) {
    using Out = std::conditional_t<gradient, float, E>;
    auto value = [](float x) { return gradient && !Cfg::exact ? to_tf32(x) : x; };
    Out* out = static_cast<Out*>(a.out) + ((slot * p.H + head) * (p.K + p.V) + (values ? p.K : 0)) * p.M;
    Out* q = out + int64_t(row) * p.M + frag_col();
    if constexpr (sizeof(Out) == 2) {
      if (p.M % 4 == 0) return store_paired<Out, MT>(out + int64_t(d0 + warp * 16) * p.M, p.M, acc, D - d0 - warp * 16, p.M);
    }
    if (p.M % 2 == 0) {
#pragma unroll
      for (int h = 0; h < 2; ++h, q += 8 * p.M)
#pragma unroll
        for (int t = 0; t < MT; ++t)
          if (row + h * 8 < D && t * 8 + frag_col() < p.M) store2<Out>(q + t * 8, value(acc[t][2 * h]), value(acc[t][2 * h + 1]));
    } else {
#pragma unroll
      for (int h = 0; h < 2; ++h, q += 8 * p.M)
#pragma unroll
        for (int t = 0; t < MT; ++t)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            if (row + h * 8 < D && t * 8 + frag_col() + e < p.M) q[t * 8 + e] = from_float<Out>(value(acc[t][2 * h + e]));
    }
  };

  auto issue = [&](int64_t step) {
    if (step < steps) {
      const Stage s = stage(step);
      const int64_t chunk = step / each, hq = step % each / pieces;
      const int first = static_cast<int>(step % pieces) * rows;
      c.select(p, gradient ? c.seq.chunks - 1 - chunk : chunk, C);
      Rows x = rows_of(xv, c, gradient ? head * r + hq : head);
      x.base += first * x.step;
      load_tile<128, E, rows, kStateRows>(s.x, ldx, x, c.length - first, d0, D);
      const int64_t tile = gradient ? c.slot * p.HQ + head * r + hq : c.slot * p.H + head;
      load_matrix<128, MP>(s.y, ldy, static_cast<const E*>(values ? a.y_v : a.y_k) + (tile * C + first) * MP, rows);
      if (threadIdx.x < MP / 4) cp_async16(s.decay + threadIdx.x * 4, a.decay + (c.slot * p.H + head) * MP + threadIdx.x * 4, true);
    }
    cp_async_commit();
  };

#pragma unroll
  for (int i = 0; i < stages - 1; ++i) issue(i);
#pragma unroll 1
  for (int64_t step = 0; step < steps; ++step) {
    cp_async_wait_for<stages - 2>();
    __syncthreads();
    issue(step + stages - 1);
    const Stage s = stage(step);
    if (step % each == 0) {
      const int64_t chunk = step / each;
      keep(c.seq.slot + (gradient ? c.seq.chunks - 1 - chunk : chunk));
      decay(acc, s.decay);
    }
    typename A::template Op<rows> op;
    A::template from_tile_t<rows>(op, s.x + warp * 16, ldx);
    A::template mma_nn<MT, rows>(acc, op, s.y, ldy);
  }
  with_states(values ? a.hv_out : a.hk_out, type, [&](auto* out) { each_element([&](float x, int64_t i) { store_rounded(out[state + i], x); }); });
}

}  // namespace gsa::cuda
