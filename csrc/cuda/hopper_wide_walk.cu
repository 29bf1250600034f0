// Chunked backward for Hopper (sm_90a), heads of 256 and 512 dimensions, last part where there are sequences and key/value heads enough for the GPU: the cotangents of the
// states (hopper_scan.cu) and all that is as wide as a head (hopper_wide_keys.cu) in one walk over the chunks, from the last to the first, and then the gradients of s and g.
// A block of the walk has a sequence and key/value head, and 128 dimensions of its keys or of its values, two slices of 64; the cotangents E never go to memory. S and the
// factors are those of hopper_gates.cu, Y, A1, A2, Yk exp(ref), T, U those of hopper_wide_queries.cu. For each slice there are two warpgroups. Of a chunk:
//
//                                  keys                                  values
//     a, b                         q, k                                  d_o, v
//     the state's, dH [64 slots x 64 dimensions] in registers
//                                  E = exp(G_end - ref) dH, rounded      the same in two parts
//                                  edge = exp(G_end) <H, dH> of every slot
//                                  dH <- exp(ref) (E + sum over the query heads of Y^T a)
//                                  dq = A1 k + (Yk exp(ref)) Hk^T
//     the tokens'                  dk = A1^T q + S E                     dv = A2^T d_o + S E
//                                  outer += k E^T                        outer += v E^T
//
// outer [64 tokens x 64 slots] and edge are sums over all dimensions. Two blocks are a cluster, in which each is sent what there is of half of the slots of outer
// (distributed shared memory); three warps of it add it up, and leave it for the second kernel, which has a block for each chunk and key/value head, and adds up what the
// clusters have left:
//     ds_j = U_j + outer_j / R_j
//     dg_t = sum_{u >= t} T_u + sum_{j < t} S_j outer_j + edge
// (hopper_wide_keys.cu, also for chunks of several windows), in fp32. Of the tokens' warpgroups each has half of the slots of outer, of both slices. The last warp brings
// all tiles.
//
//     shared memory      written by            read until
//     operands           copies, 2 stages      Y, A (keys: A1, Yk exp(ref)), S, in two parts each: all products of a chunk, or of a query head of it
//     tokens             copies, 2 stages      a, b, H: all its products; in the place of Hv the values' E, after edge
//     cotangents         the state's           outer, dk, dv: the keys' E, or what rounding drops of the values'
//     outer              the cluster           the sums; then both blocks are told that they may send again
#include "core/wide.cuh"
#include "hopper_wide.h"

namespace gsa::cuda {
namespace {

using namespace hopper;

constexpr int kThreads = 640, kHalf = 256, kAdders = 96;  // kHalf: the states' warpgroups, or the tokens'

template <class E>
struct WideWalkShared {
  alignas(1024) E operands[2][3][2][kTile];
  E tokens[2][3][2][kTile], cotangents[2][kTile];
  float outer[2][kTile / 2];  // of each block of the cluster
  uint64_t full[2], free[2], cotangents_full, cotangents_free, received, may_send;
  Sequence sequence;
};
static_assert(sizeof(WideWalkShared<bf16>) <= 227 * 1024);

// ------------------------------------------------------------------------------------------------------------ clusters

__device__ inline void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}
// Where another block of the cluster has what this one has at p.
__device__ inline uint32_t there(const void* p, int rank) {
  uint32_t x;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(x) : "r"(address(p)), "r"(rank));
  return x;
}
// Four numbers, counted by a barrier of the same block.
__device__ inline void send(uint32_t to, const float (&x)[4], uint32_t barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to), "f"(x[0]), "f"(x[1]), "f"(x[2]),
               "f"(x[3]), "r"(barrier)
               : "memory");
}
// Without an order: what this thread has read it has used.
__device__ inline void arrive_there(uint32_t barrier) {
  asm volatile("mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ inline void wait_for_cluster(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(address(barrier)),
      "r"(parity)
      : "memory");
}

constexpr int kCluster = 2;

// What a block has: a part of 128 dimensions, of the keys or of the values.
template <int D>
struct Share {
  static constexpr int parts = D / 64, clusters = parts / kCluster;
  int part, head;
  int64_t n;
  __device__ Share(const Params& p) : part(blockIdx.x % parts), head(blockIdx.x / parts % p.H), n(blockIdx.x / parts / p.H) {}
  __device__ int rank() const { return part % kCluster; }
  __device__ bool values() const { return part >= parts / 2; }
  __device__ int first_dimension() const { return part % (parts / 2) * 128; }
};
// What a walk leaves of each chunk and key/value head.
template <int D>
struct WalkSums {
  float outer[Share<D>::clusters][kTile], edges[2 * Share<D>::parts][kSlots];  // outer: as accumulators lie; edges: of each slice
};
template <int D, class E>
__device__ WalkSums<D>& sums_of(const Backward<E>& w, int64_t at) {
  return reinterpret_cast<WalkSums<D>*>(w.E0)[at];
}

// A warpgroup of a slice.
template <int D>
struct Slice : Share<D> {
  int group, tid, warp, row, first_d;
  __device__ Slice(const Params& p)
      : Share<D>(p),
        group(__shfl_sync(0xffffffffu, threadIdx.x / 128 % 2, 0)),
        tid(threadIdx.x % 128),
        warp(__shfl_sync(0xffffffffu, tid / 32, 0)),
        row(warp * 16 + frag_row()),
        first_d(Share<D>::first_dimension() + group * 64) {}
};

template <class E, int D, bool values>
__device__ __forceinline__ void states_half(const BackwardParams& p, const Backward<E>& w, WideWalkShared<E>& m) {
  const Slice<D> own(p);
  const int r = p.HQ / p.H, group = own.group, warp = own.warp, row = own.row, chunks = static_cast<int>(m.sequence.chunks);
  float h[8][4];
  auto each_element = [&](auto&& f) {
#pragma unroll
    for (int t = 0; t < 8; ++t)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int slot = row + (e >> 1) * 8, d = own.first_d + t * 8 + frag_col() + (e & 1);
        if (slot < p.M) f(h[t][e], (own.n * p.H + own.head) * D * p.M + (values ? slot * D + d : d * p.M + slot));
      }
  };
  zero(h);
  if (const float* in = static_cast<const float*>(values ? p.dhvT : p.dhkT)) each_element([&](float& x, int64_t i) { x = in[i]; });

  // What a chunk is multiplied with; of the next one on its way before it is needed.
  struct Factors {
    float in[2], out[2];
    int cut;
  };
  auto factors_of = [&](int chunk) {
    const GateImage<E>& image = w.gates[(m.sequence.slot + chunk) * p.H + own.head];
    return Factors{{image.in[row], image.in[row + 8]}, {image.out[row], image.out[row + 8]}, image.cut};
  };
  Factors next{};
  if (chunks > 0) next = factors_of(chunks - 1);
  int step = 0;  // a chunk and query head
#pragma unroll 1
  for (int chunk = chunks - 1; chunk >= 0; --chunk) {
    const Factors f = next;
    if (chunk > 0) next = factors_of(chunk - 1);
    float dq[8][4];
#pragma unroll 1
    for (int q = 0; q < r; ++q, ++step) {
      const int stage = step & 1;
      E(*const t)[2][kTile] = m.tokens[stage];  // a, b, H
      E(*const x)[2][kTile] = m.operands[stage];  // Y, A, S
      const E *const a = t[0][group], *const H = t[2][group];
      wait(m.full + stage, step >> 1 & 1);
      if (q == 0) {
        scale_rows(h, f.out[0], f.out[1]);
        float edge[2];
        state_products(edge, H, h, warp);
        float* const edges = sums_of<D>(w, (m.sequence.slot + chunk) * p.H + own.head).edges[own.part * 2 + group];
        if ((lane_id() & 3) == 0) edges[row] = edge[0] * f.in[0], edges[row + 8] = edge[1] * f.in[1];
        const auto X = split<E>(h);
        wait(&m.cotangents_free, ((chunks - 1 - chunk) & 1) ^ 1);
        if (values) {
          sync(1 + group, 128);  // H has been read
          store_operand<E>(t[2][group], X.hi, warp);
          store_operand<E>(m.cotangents[group], X.lo, warp);
        } else {
          store_operand<E>(m.cotangents[group], X.hi, warp);
        }
        publish();
        arrive(&m.cotangents_full);
        if (f.cut) scale_rows(h, f.in[0], f.in[1]);
      }
      hand_over(h);
      if (!values) hand_over(dq);
      products_begin();
      product<E, 4, 1, 1>(h, mnmajor(x[0][0]), mnmajor(a), true);
      product<E, 4, 1, 1>(h, mnmajor(x[0][1]), mnmajor(a), true);
      products_commit();
      if (!values) {
        product<E, 4, 0, 1>(dq, kmajor(x[1][0]), mnmajor(t[1][group]), false);
        product<E, 4, 0, 0>(dq, kmajor(x[1][1]), kmajor(H), true);
        products_commit();
        products_wait<1>();
      } else {
        products_wait<0>();
      }
      hand_over(h);
      if (q == r - 1 && !f.cut) scale_rows(h, f.in[0], f.in[1]);
      if (!values) {
        products_wait<0>();
        hand_over(dq);
      }
      arrive(m.free + stage);
      if (!values) {
        const Chunk c = chunk_of(p, m.sequence, chunk, kChunk);
        store_window<E>(rows_of(p.dq, c, own.head * r + q), dq, warp, 0, c.length, own.first_d);
      }
    }
  }
  if (float* out = static_cast<float*>(values ? p.dhv0 : p.dhk0)) each_element([&](float& x, int64_t i) { out[i] = x; });
}

template <class E, int D, bool values>
__device__ __forceinline__ void tokens_half(const BackwardParams& p, WideWalkShared<E>& m) {
  const Slice<D> own(p);
  const int r = p.HQ / p.H, group = own.group, chunks = static_cast<int>(m.sequence.chunks);
  const uint32_t to = there(m.outer[own.rank()] + own.tid * 4, group), received = there(&m.received, group);  // slots from 32 `group` on
  int step = 0;
#pragma unroll 1
  for (int chunk = chunks - 1; chunk >= 0; --chunk) {
    const int turn = (chunks - 1 - chunk) & 1;
    float outer[4][4], dx[8][4];
#pragma unroll 1
    for (int q = 0; q < r; ++q, ++step) {
      const int stage = step & 1;
      E(*const t)[2][kTile] = m.tokens[stage];  // a, b, H
      E(*const x)[2][kTile] = m.operands[stage];  // Y, A, S
      const E* const rounded = values ? t[2][0] : m.cotangents[0];
      wait(m.full + stage, step >> 1 & 1);
      if (q == 0) wait(&m.cotangents_full, turn);
      hand_over(outer);
      hand_over(dx);
      products_begin();
      if (q == 0) {
        product<E, 8, 0, 0>(outer, kmajor(t[1][0]), kmajor(rounded + group * 32 * 64), false);
        if (values) product<E, 8, 0, 0>(outer, kmajor(t[1][0]), kmajor(m.cotangents[0] + group * 32 * 64), true);
      }
      products_commit();
      if (q == 0) {
        product<E, 4, 0, 1>(dx, kmajor(x[2][0]), mnmajor(rounded + group * kTile), false);
        product<E, 4, 0, 1>(dx, kmajor(x[2][1]), mnmajor(rounded + group * kTile), true);
        if (values) product<E, 4, 0, 1>(dx, kmajor(x[2][0]), mnmajor(m.cotangents[group]), true);
      }
      product<E, 4, 1, 1>(dx, mnmajor(x[1][0]), mnmajor(t[0][group]), true);
      if (values) product<E, 4, 1, 1>(dx, mnmajor(x[1][1]), mnmajor(t[0][group]), true);
      products_commit();
      products_wait<1>();
      hand_over(outer);
      if (q == 0) {
        wait_for_cluster(&m.may_send, turn ^ 1);
#pragma unroll
        for (int i = 0; i < 4; ++i) send(to + i * 2048, outer[i], received);
      }
      products_wait<0>();
      hand_over(dx);
      if (q == 0) arrive(&m.cotangents_free);
      arrive(m.free + stage);
      if (q == r - 1) {
        const Chunk c = chunk_of(p, m.sequence, chunk, kChunk);
        store_window<E>(rows_of(values ? p.dv : p.dk, c, own.head), dx, own.warp, 0, c.length, own.first_d);
      }
    }
  }
}

// By one thread: all tiles, in the walkers' order.
template <class E, int D>
__device__ __forceinline__ void bring(const BackwardParams& p, const Backward<E>& w, WideWalkShared<E>& m, const InputMaps& maps, const CUtensorMap& states) {
  const Share<D> own(p);
  const int r = p.HQ / p.H, d = own.first_dimension();
  const bool values = own.values();
  int step = 0;
#pragma unroll 1
  for (int chunk = static_cast<int>(m.sequence.chunks) - 1; chunk >= 0; --chunk) {
    const Chunk c = chunk_of(p, m.sequence, chunk, kChunk);
    const int64_t at = c.slot * p.H + own.head;
#pragma unroll 1
    for (int q = 0; q < r; ++q, ++step) {
      const int stage = step & 1, q_head = own.head * r + q;
      E(*const t)[2][kTile] = m.tokens[stage];
      E(*const x)[2][kTile] = m.operands[stage];
      uint64_t* const full = m.full + stage;
      const WideSaved<E>& saved = reinterpret_cast<const WideSaved<E>*>(w.saved)[c.slot * p.HQ + q_head];
      const bool all = q == 0 || !values;  // of the values' v and H the first head makes what there is to make
      wait(m.free + stage, (step >> 1 & 1) ^ 1);
      arrive_expecting(full, ((all ? 3 : 1) + (q == 0 ? 3 : 2)) * sizeof(t[0]));
      bring_tokens<128>(t[0][0], values ? maps.d_o : maps.q, p, c, q_head, full, d);
      if (all) {
        bring_tokens<128>(t[1][0], values ? maps.v : maps.k, p, c, own.head, full, d);
        bring_state<128>(t[2][0], states, (at * 2 + values) * D + d, full);
      }
      bulk_load(x[0], saved.Y[values], sizeof(x[0]), full);
      bulk_load(x[1], saved.A[values ? 0 : 2], sizeof(x[1]), full);
      if (q == 0) bulk_load(x[2], w.gates[at].S, sizeof(x[2]), full);
    }
  }
}

// What the cluster's blocks have of this block's half of the slots. By kAdders threads.
template <class E, int D>
__device__ __forceinline__ void add_up(const BackwardParams& p, const Backward<E>& w, WideWalkShared<E>& m, int tid) {
  const Share<D> own(p);
  const int chunks = static_cast<int>(m.sequence.chunks);
#pragma unroll 1
  for (int chunk = chunks - 1, turn = 0; chunk >= 0; --chunk, turn ^= 1) {
    float4* const to = reinterpret_cast<float4*>(sums_of<D>(w, (m.sequence.slot + chunk) * p.H + own.head).outer[own.part / kCluster]) + own.rank() * 512;
    wait_for_cluster(&m.received, turn);
#pragma unroll 3
    for (int i = tid; i < 512; i += kAdders) {
      const float4 x = reinterpret_cast<const float4*>(m.outer[0])[i], y = reinterpret_cast<const float4*>(m.outer[1])[i];
      to[i] = make_float4(x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w);
    }
    sync(3, kAdders);
    if (chunk > 0) {
      if (tid == 0) arrive_expecting(&m.received, kTile * 4);
      if (tid < kCluster) arrive_there(there(&m.may_send, tid));
    }
  }
}

// Sums over the tokens of a chunk, by a warpgroup, of columns frag_col() and the next, rows as accumulators have them: in the place of `back` those from each token on, of
// `before` those of the tokens before it. What the other warps have is put into `totals` by begin, and added by end, after a barrier.
struct TokenSums {
  static __device__ float from(float x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
  static __device__ void begin(float (&back)[4], float (&before)[4], float (&totals)[2][4][32], int column, int warp) {
    const int lane = lane_id();
    float all[2][2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float top = back[e], bottom = back[2 + e];
#pragma unroll
      for (int x = 4; x < 32; x *= 2) {
        const float a = from(top, lane + x), b = from(bottom, lane + x);
        if (lane + x < 32) top += a, bottom += b;
      }
      const float below = from(bottom, lane & 3);
      back[e] = top + below, back[2 + e] = bottom;
      all[0][e] = from(top, lane & 3) + below;
      top = before[e], bottom = before[2 + e];
#pragma unroll
      for (int x = 4; x < 32; x *= 2) {
        const float a = from(top, lane - x), b = from(bottom, lane - x);
        if (lane >= x) top += a, bottom += b;
      }
      const float above = from(top, lane | 28);
      all[1][e] = above + from(bottom, lane | 28);
      const float a = from(top, lane - 4), b = from(bottom, lane - 4);
      before[e] = lane < 4 ? 0.f : a, before[2 + e] = lane < 4 ? above : above + b;
    }
    if (lane < 4)
#pragma unroll
      for (int i = 0; i < 2; ++i) *reinterpret_cast<float2*>(&totals[i][warp][column]) = make_float2(all[i][0], all[i][1]);
  }
  static __device__ void end(float (&back)[4], float (&before)[4], const float (&totals)[2][4][32], int column, int warp) {
#pragma unroll
    for (int other = 0; other < 4; ++other) {
      const float2 x = *reinterpret_cast<const float2*>(&totals[0][other][column]), y = *reinterpret_cast<const float2*>(&totals[1][other][column]);
      if (other > warp) back[0] += x.x, back[1] += x.y, back[2] += x.x, back[3] += x.y;
      if (other < warp) before[0] += y.x, before[1] += y.y, before[2] += y.x, before[3] += y.y;
    }
  }
};

// ds and dg of a chunk and key/value head: a warpgroup for each half of the slots.
template <class E, int D>
__global__ __launch_bounds__(256, 2) void wide_gates_kernel(const __grid_constant__ BackwardParams p, const __grid_constant__ Backward<E> w) {
#if GSA_HOPPER
  __shared__ alignas(1024) E S_tile[2][kTile];
  __shared__ float totals[2][2][4][32];
  __shared__ float edge[kSlots];
  __shared__ uint64_t S_full;
  const int r = p.HQ / p.H, head = blockIdx.x % p.H;
  Chunk c;
  if (!find_chunk(p, slot_by_time(p, blockIdx.x / p.H, false), kChunk, c)) return;
  const int64_t at = c.slot * p.H + head;
  const int half = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0), tid = threadIdx.x % 128, warp = __shfl_sync(0xffffffffu, tid / 32, 0);
  const int row = warp * 16 + frag_row(), col = half * 32 + frag_col();
  const GateImage<E>& image = w.gates[at];
  const WideSaved<E>* const saved = reinterpret_cast<const WideSaved<E>*>(w.saved) + c.slot * p.HQ + head * r;
  const WalkSums<D>& sums = sums_of<D>(w, at);
  const bool cut = image.cut, coupled = p.s.ptr == nullptr;
  float T[4][4], U[4][4], F[4][4], S[4][4], outer[4][4];  // F: R, or exp(G_end - G); then write strengths, of several windows exp(g)
  if (threadIdx.x == 0) {
    init(&S_full, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    arrive_expecting(&S_full, sizeof(S_tile));
    bulk_load(S_tile, image.S, sizeof(S_tile), &S_full);
  }
  if (threadIdx.x < kSlots) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < 2 * Share<D>::parts; ++i) sum += sums.edges[i][threadIdx.x];
    edge[threadIdx.x] = sum;
  }
  auto plus = [&](float (&sum)[4][4], const float* from) {
    float x[4][4];
    get(x, from + half * 2048, tid);
    add(sum, x);
  };
  get(F, image.R + half * 2048, tid);
  get(T, saved->T + half * 2048, tid);
  get(U, saved->U + half * 2048, tid);
  get(outer, sums.outer[0] + half * 2048, tid);
#pragma unroll
  for (int i = 1; i < Share<D>::clusters; ++i) plus(outer, sums.outer[i]);
#pragma unroll 1
  for (int q = 1; q < r; ++q) plus(T, saved[q].T), plus(U, saved[q].U);
  __syncthreads();  // S_full is there
  wait(&S_full, 0);
  get_both(S, S_tile[0], half * 32, warp);
#pragma unroll
  for (int t = 0; t < 4; ++t) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float inverse = __fdividef(1.f, F[t][k]);
      U[t][k] += outer[t][k] * (cut ? F[t][k] : inverse);  // after the sequence: not stored
      outer[t][k] *= S[t][k];
      F[t][k] *= S[t][k];
    }
    TokenSums::begin(T[t], outer[t], totals[half], t * 8 + frag_col(), warp);
  }
  if (cut) {  // exp(g)
    const Rows g = rows_of(p.g, c, head);
#pragma unroll
    for (int t = 0; t < 4; ++t)
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int j = row + (k >> 1) * 8, slot = col + t * 8 + (k & 1);
        F[t][k] = j < c.length && slot < p.M ? expf(load_as_float(g.ptr, g.at(j) + slot, g.dtype)) : 1.f;
      }
  }
  __syncthreads();
  const Rows ds_rows = rows_of(p.ds, c, head), dg_rows = rows_of(p.dg, c, head);
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    TokenSums::end(T[t], outer[t], totals[half], t * 8 + frag_col(), warp);
    const int slot = col + t * 8;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int j = row + 8 * i;
      float x[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int k = 2 * i + e;
        x[e] = T[t][k] + outer[t][k] + edge[slot + e];
        const bool reset = cut ? F[t][k] == 0.f : j == 0 && image.start[slot + e] == 0.f;
        if (reset) x[e] = 0.f;  // it forgets whatever the gate would have changed
        if (coupled) x[e] -= (cut ? F[t][k] : 1.f - F[t][k]) * U[t][k];  // s = 1 - exp(g)
      }
      if (j < c.length && slot < p.M) {
        store_pair<E>(p.dg, dg_rows.at(j) + slot, x[0], x[1]);
        if (!coupled) store_pair<E>(p.ds, ds_rows.at(j) + slot, U[t][2 * i], U[t][2 * i + 1]);
      }
    }
  }
#endif
}

template <class E, int D>
__global__ __launch_bounds__(kThreads, 1) void wide_walk_kernel(const __grid_constant__ BackwardParams p, const __grid_constant__ InputMaps maps,
                                                                const __grid_constant__ CUtensorMap states, const __grid_constant__ Backward<E> w) {
#if GSA_HOPPER
  after_the_last_kernel();
  extern __shared__ __align__(1024) char memory[];
  auto& m = *reinterpret_cast<WideWalkShared<E>*>(memory);
  const int role = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  if (threadIdx.x == 0) {
    m.sequence = sequence<false>(p, Share<D>(p).n, kChunk);
    for (int i = 0; i < 2; ++i) init(m.full + i, 1), init(m.free + i, 2 * kHalf);
    init(&m.cotangents_full, kHalf), init(&m.cotangents_free, kHalf);
    init(&m.received, 1), init(&m.may_send, kCluster);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    if (m.sequence.chunks > 0) arrive_expecting(&m.received, kTile * 4);
  }
  cluster_sync();
  const bool values = Share<D>(p).values();
  if (role == 4) {  // 480 registers in all: what the launch has, 96 for each of five warpgroups
    give_registers<48>();
    const int tid = threadIdx.x - 512;
    if (tid < kAdders) add_up<E, D>(p, w, m, tid);
    else if (tid == kAdders) bring<E, D>(p, w, m, maps, states);
  } else if (role >= 2) {
    take_registers<112>();
    values ? tokens_half<E, D, true>(p, m) : tokens_half<E, D, false>(p, m);
  } else {
    take_registers<104>();
    values ? states_half<E, D, true>(p, w, m) : states_half<E, D, false>(p, w, m);
  }
  cluster_sync();  // nobody ends while something is sent to him
#endif
}

}  // namespace

// Blocks for seven tenths of the GPU, and no lengths that nobody here knows.
bool hopper_wide_walks(const Params& p) {
  const Kernels wanted = wanted_kernels();
  if (!hopper_takes(p) || !hopper_wide(p) || wanted == Kernels::parts || wanted == Kernels::few) return false;
  return wanted == Kernels::hopper || (!p.cu_seqlens && p.N * p.H * (p.K / 64) * 10 >= hopper_multiprocessors() * 7);
}

int64_t hopper_wide_walk_bytes(const Params& p) {
  return boundary_slots(p.B, p.T, p.N, p.cu_seqlens != nullptr, kChunk) * p.H *
         static_cast<int64_t>(p.K == 512 ? sizeof(WalkSums<512>) : sizeof(WalkSums<256>));
}

void hopper_wide_walk(const BackwardParams& p, const void* boundary, const BackwardWorkspace& w) {
  constexpr const char* name = "hopper_wide_walk";
  select_wide(p, [&]<class E, int D>() {
    const auto kernel = wide_walk_kernel<E, D>;
    const int64_t blocks = p.N * p.H * Share<D>::parts;
    if (blocks <= 0) return;
    if (blocks > 2147483647LL) throw std::runtime_error("gsa_ext: hopper_wide_walk: more than 2^31 - 1 blocks of work; split the batch");
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(sizeof(WideWalkShared<E>))), name);
    cudaLaunchAttribute attributes[2]{};
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {kCluster, 1, 1};
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;  // as launch_early
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = sizeof(WideWalkShared<E>);
    config.stream = static_cast<cudaStream_t>(p.stream);
    config.attrs = attributes;
    config.numAttrs = 2;
    check_launch(cudaLaunchKernelEx(&config, kernel, p, input_maps(p), boundary_map(p, boundary), Backward<E>(w)), name);
    launch("hopper_wide_gates", wide_gates_kernel<E, D>, boundary_slots(p.B, p.T, p.N, p.cu_seqlens != nullptr, kChunk) * p.H, 256, 0, p.stream, p,
           Backward<E>(w));
  });
}

}  // namespace gsa::cuda
