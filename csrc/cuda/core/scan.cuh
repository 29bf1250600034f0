// States at the chunk boundaries, in one sweep over the sequence. Forward (gradient = false), over k and v; backward, over q and d_o:
//
//     Hk <- lambda Hk + sum_j k_j (x) s_j W_j              dHk <- lambda dHk + scale sum_i q_i  (x) do1_i U_i      per block of 16 rows,
//     Hv <- lambda Hv + sum_j v_j (x) s_j W_j              dHv <- lambda dHv +       sum_i do_i (x) p_i  U_i       last block first in backward
//
// A block owns 64 rows of [Hk; Hv^T] (of K or of V) times all slots, in fp32 registers; before each chunk it leaves a copy in memory:
// boundary[slot], in E, is the state before the chunk, gradient[slot], in fp32 (TF32), the cotangent of the state after it.
// Warps 0-3 hold the state, 16 rows each; warps 4-7 run one step ahead and make the next x [C][64], Y [C][MP] and decays, double-buffered, so that
// no load is waited for. One barrier per step. A step is a chunk, in backward a chunk of one query head.
#pragma once
#include "chunk.cuh"

namespace gsa::cuda {

constexpr int kStateRows = 64;

__device__ inline void producers_sync() { asm volatile("bar.sync 1, 128;" ::: "memory"); }

struct ScanParams {
  Params base;
  void* out;                        // [slots, H, K + V, M]
  // forward: hk0, hv0 of base in; hkT, hvT out. backward: cotangents of the final states in, of the initial states out.
  const void *hk_in, *hv_in;
  bool in_broadcast;
  void *hk_out, *hv_out;
  View x_k, x_v;                    // k, v or q, d_o
  const float *p, *do1;             // backward: [slots, HQ, C, MP]
};

template <class Cfg, bool gradient>
struct ScanShared {
  static constexpr int ldx = kStateRows + Cfg::pad;
  static constexpr int64_t stage = arena(Cfg::C * ldx, sizeof(typename Cfg::E)) + arena(Cfg::C * Cfg::ldm, sizeof(typename Cfg::E)) + arena((Cfg::NB + 1) * Cfg::MP, 4);
  static constexpr int64_t bytes = 2 * stage + (gradient ? arena(Cfg::C * Cfg::ldu, 4) : 0);
  static_assert(bytes <= 101376, "99 KB is what every GPU from sm_80 on has");
};

template <class Cfg, bool gradient>
__global__ __launch_bounds__(256, Cfg::MP <= 128 ? 2 : 1) void state_scan(const __grid_constant__ ScanParams a) {
  using E = typename Cfg::E;
  using A = Arith<E>;
  using Shared = ScanShared<Cfg, gradient>;
  constexpr int C = Cfg::C, MP = Cfg::MP, MT = Cfg::MT, NB = Cfg::NB, ldx = Shared::ldx, ldm = Cfg::ldm;
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
    float* decay;                                                   // [NB + 1][MP], see produce
  };
  auto stage = [&](int64_t step) {
    Arena mem{shared + (step & 1) * Shared::stage};
    Stage s;
    s.x = mem.take<E>(C * ldx), s.y = mem.take<E>(C * ldm), s.decay = mem.take<float>((NB + 1) * MP);
    return s;
  };
  float* u_s = reinterpret_cast<float*>(shared + 2 * Shared::stage);   // U of the chunk, backward only

  Chunk c;
  c.seq = sequence(p, n, C);
  const int64_t steps = c.seq.chunks * heads;

  const int warp = threadIdx.x / 32;
  const int row = d0 + warp * 16 + frag_row();                     // and row + 8
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
  const int64_t state = (n * p.H + head) * int64_t(D) * p.M;
  auto at = [&](int d, int m) { return values ? int64_t(m) * D + d : int64_t(d) * p.M + m; };
  if (const float* in = static_cast<const float*>(values ? a.hv_in : a.hk_in); in && warp < 4) {
    if (a.in_broadcast) in += head * int64_t(D) * p.M; else in += state;
#pragma unroll
    for (int t = 0; t < MT; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int d = row + (i >> 1) * 8, m = t * 8 + frag_col() + (i & 1);
        if (d < D && m < p.M) acc[t][i] = in[at(d, m)];
      }
  }
  auto keep = [&](int64_t slot) {
    using Out = std::conditional_t<gradient, float, E>;
    auto value = [](float x) { return gradient && !Cfg::fp32 ? round_tf32(x) : x; };
    Out* out = static_cast<Out*>(a.out) + ((slot * p.H + head) * (p.K + p.V) + (values ? p.K : 0)) * p.M;
    const bool even = p.M % 2 == 0;
    Out* q = out + int64_t(row) * p.M + frag_col();
    if (even) {
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

  // Forward: decay[b] is block b's own, Y = s W, and the blocks follow each other (Horner). Backward: the heads of a group share the decays, so they are
  // folded into Y: decay[b] = lambda_0 ... lambda_{b-1}, Y = y U decay, and the whole chunk decays by decay[NB].
  auto produce = [&](int64_t step) {
    const int tid = threadIdx.x - 128;
    const Stage s = stage(step);
    const int64_t chunk = step / heads;
    const int hq = static_cast<int>(step % heads);
    c.select(p, gradient ? c.seq.chunks - 1 - chunk : chunk, C);
    load_tile<128, E, C, kStateRows>(s.x, ldx, rows_of(xv, c, gradient ? head * r + hq : head), c.length, d0, D, tid);
    const GateReader<Cfg::fp32> gates(p, c, head);
    // Everything that this step reads is sent off before the first of it is used.
    constexpr int batch = NB * MP / 128 < 2 ? 1 : 2;                // (block, slot) items of a thread at a time
    constexpr int loads = C * MP / 4 / 128, ahead = loads < 8 ? loads : 8;
    const float* y = (values ? a.p : a.do1) + (c.slot * p.HQ + head * r + hq) * C * MP;
    float4 v[gradient ? ahead : 1];
    if constexpr (gradient)
#pragma unroll
      for (int i = 0; i < ahead; ++i) v[i] = *reinterpret_cast<const float4*>(y + (i * 128 + tid) * 4);
    if (!gradient || hq == 0) {
#pragma unroll 1
      for (int e0 = tid; e0 < NB * MP; e0 += batch * 128) {
        Gather<16> raw_g[batch], raw_s[gradient ? 1 : batch];
#pragma unroll
        for (int i = 0; i < batch; ++i) {
          const int b = (e0 + i * 128) / MP, m = (e0 + i * 128) % MP;
          gates.load_gates16(b * 16, m, raw_g[i]);
          if constexpr (!gradient) gates.load_writes16(b * 16, m, raw_s[i]);
        }
#pragma unroll
        for (int i = 0; i < batch; ++i) {
          const int b = (e0 + i * 128) / MP, m = (e0 + i * 128) % MP;
          float g[16], w = 1.f;
          gates.gates16(raw_g[i], g);
          if constexpr (gradient) {
#pragma unroll
            for (int j = 0; j < 16; ++j) w *= g[j], u_s[(b * 16 + j) * Cfg::ldu + m] = w;
            s.decay[(b + 1) * MP + m] = w;
          } else {
            float x[16];
            gates.writes16(raw_s[i], x);
#pragma unroll
            for (int j = 15; j >= 0; --j) s.y[(b * 16 + j) * ldm + m] = from_float<E>(x[j] * w), w *= g[j];
            s.decay[b * MP + m] = w;
          }
        }
      }
    }
    if constexpr (gradient) {
      const float scale = values ? 1.f : static_cast<float>(p.scale);
      if (hq == 0) {
        producers_sync();
        for (int m = tid; m < MP; m += 128) {
          float w = s.decay[m] = 1.f;
          for (int b = 1; b <= NB; ++b) w = s.decay[b * MP + m] *= w;
        }
      } else {
        const float* before = stage(step - 1).decay;
        for (int m = tid; m < (NB + 1) * MP; m += 128) s.decay[m] = before[m];
      }
      producers_sync();
#pragma unroll 1
      for (int s0 = 0; s0 < loads; s0 += ahead) {
#pragma unroll
        for (int i = 0; i < ahead; ++i) {
          const int e = ((s0 + i) * 128 + tid) * 4, j = e / MP, m = e % MP;
          const float4 u = *reinterpret_cast<const float4*>(u_s + j * Cfg::ldu + m), l = *reinterpret_cast<const float4*>(s.decay + j / 16 * MP + m);
          store2<E>(s.y + j * ldm + m, v[i].x * scale * u.x * l.x, v[i].y * scale * u.y * l.y);
          store2<E>(s.y + j * ldm + m + 2, v[i].z * scale * u.z * l.z, v[i].w * scale * u.w * l.w);
        }
        if (s0 + ahead < loads)
#pragma unroll
          for (int i = 0; i < ahead; ++i) v[i] = *reinterpret_cast<const float4*>(y + ((s0 + ahead + i) * 128 + tid) * 4);
      }
    }
    cp_async_wait();
  };
  auto consume = [&](int64_t step) {
    const Stage s = stage(step);
    const int64_t chunk = step / heads;
    const bool first = step % heads == 0;
    if (first) keep(c.seq.slot + (gradient ? c.seq.chunks - 1 - chunk : chunk));
    typename A::template Op<C> op;
    A::template from_tile_t<C>(op, s.x + warp * 16, ldx);
    if constexpr (gradient) {
      if (first) decay(acc, s.decay + NB * MP);
      A::template mma_nn<MT, C>(acc, op, s.y, ldm);
    } else {
#pragma unroll
      for (int b = 0; b < NB; ++b) {
        decay(acc, s.decay + b * MP);
        A::template mma_nn<MT, 16>(acc, op.block(b), s.y + b * 16 * ldm, ldm);
      }
    }
  };

  if (warp >= 4 && steps > 0) produce(0);
  __syncthreads();
  for (int64_t step = 0; step < steps; ++step) {
    if (warp < 4) consume(step);
    else if (step + 1 < steps) produce(step + 1);
    __syncthreads();
  }
  if (warp >= 4) return;
  if (float* out = static_cast<float*>(values ? a.hv_out : a.hk_out)) {
    out += state;
#pragma unroll
    for (int t = 0; t < MT; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int d = row + (i >> 1) * 8, m = t * 8 + frag_col() + (i & 1);
        if (d < D && m < p.M) out[at(d, m)] = acc[t][i];
      }
  }
}

}  // namespace gsa::cuda
