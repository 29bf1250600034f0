// Chunked forward and backward for Hopper (sm_90a): what of a chunk depends on its gates alone (GateImage, core/hopper.cuh), made once for all kernels that need
// it. One block for each chunk and key/value head, 256 threads for each of its banks. Of a chunk that has to be cut into several windows, what the scans over chunks need, relative to its end:
//     S_j = s_j exp(G_end - G_j)       in = exp(G_end) of the whole chunk       out = 1
#include "core/hopper.cuh"
#include "core/select.cuh"
#include "hopper.h"

namespace gsa::cuda {
namespace {

using namespace hopper;

constexpr int kThreads = 256;  // of a bank

template <class E>
struct GatesShared {  // of a bank
  E S[2][kTile];
  float R[kTile];
  typename GateMaker<E, 8>::Scratch scratch;
};

// plain: for hopper_walk.cu.
template <class E, int BANKS, bool plain>
__global__ __launch_bounds__(kThreads* BANKS, 4 / BANKS) void gates_kernel(const __grid_constant__ Params p, GateImage<E>* images, const int* only,
                                                                           const int* some) {
#if GSA_HOPPER
  after_the_last_kernel();
  if (some && !*some) return;
  extern __shared__ __align__(1024) char memory[];
  const int head = blockIdx.x % p.H, bank = __shfl_sync(0xffffffffu, threadIdx.x / kThreads, 0), own = threadIdx.x % kThreads;
  auto& m = reinterpret_cast<GatesShared<E>*>(memory)[bank];
  Chunk c;
  GateImage<E>& image = images[blockIdx.x * BANKS + bank];
  if (!find_chunk(p, blockIdx.x / p.H, kChunk, c)) {
    for (int i = own; i < static_cast<int>(sizeof(image) / 16); i += kThreads) reinterpret_cast<int4*>(&image)[i] = int4{};
    return;
  }
  if (only && !only[c.seq.n * p.H + head]) return;
  GateMaker<E, 8> gates(m.scratch, own, 1 + bank, bank);
  gates.load(p, c, head);
  float before[2], total[2];
  gates.sums(0, c.length, before, total);
  bool cut = !gates.safe(total) && gates.cut(c.length) != 1;
  if constexpr (BANKS > 1) cut = __syncthreads_or(cut);
  if (own < 32) reinterpret_cast<int*>(&image.cut)[own] = own == 0 && cut;  // and what follows: images may be kept, and are written whole
  if (cut) {
    const float2 decay = gates.to_end(c.length, [&](int i, float x, float y) { gates.s[i][0] *= x, gates.s[i][1] *= y; });
    if (gates.warp == 0) {
      *reinterpret_cast<float2*>(image.in + 2 * gates.lane) = decay;
      *reinterpret_cast<float2*>(image.out + 2 * gates.lane) = make_float2(1.f, 1.f);
      *reinterpret_cast<float2*>(image.start + 2 * gates.lane) = float2{};
    }
    const uint32_t to = gates.first_S(m.S[0]), piece = gates.piece_S();
#pragma unroll
    for (int i = 0; i < 8; ++i) gates.store_S(to, piece, i);
    for (int i = own; i < kTile / 4; i += kThreads) reinterpret_cast<float4*>(image.R)[i] = float4{};  // pairs_kernel reads it before it knows
  } else {
    if (gates.warp == 0) gates.store_edges(image.start, image.in, image.out, total);
    gates.make(0, c.length, before, total);
    gates.store_tiles(m.S[0], m.R);
  }
  publish();
  sync(1 + bank, kThreads);
  if (own == 0) {
    bulk_store<sizeof(image.S)>(image.S, m.S);
    bulk_commit();
  }
  if (cut) {
    if (own == 0) bulk_wait();
    return;
  }
  if constexpr (plain) {
    if (own == 0) {
      bulk_store<sizeof(m.R)>(image.R, m.R);
      bulk_commit();
      bulk_wait();
    }
    return;
  }
  const int tid = own % 128, row = tid / 32 * 16 + frag_row(), half = own / 128;
#pragma unroll
  for (int t = half * 4; t < half * 4 + 4; ++t) {
    const int column = t * 8 + frag_col();
    const float2 top = *reinterpret_cast<const float2*>(m.R + R_at(row, column)), bottom = *reinterpret_cast<const float2*>(m.R + R_at(row + 8, column));
    reinterpret_cast<float4*>(image.R)[t * 128 + tid] = make_float4(top.x, top.y, bottom.x, bottom.y);
  }
  if (own == 0) bulk_wait();
#endif
}

}  // namespace

void hopper_gates(const Params& p, void* images, bool plain, const int* only, const int* some) {
  const int64_t slots = boundary_slots(p.B, p.T, p.N, p.cu_seqlens != nullptr, kChunk);
  auto run = [&]<class E, int BANKS, bool plain>() {
    launch_early("hopper_gates", gates_kernel<E, BANKS, plain>, slots * p.H, kThreads * BANKS, sizeof(GatesShared<E>) * BANKS, p.stream, p,
                 static_cast<GateImage<E>*>(images), only, some);
  };
  auto with = [&]<class E>() {
    if (banks_of(p) == 2) run.template operator()<E, 2, false>();
    else plain ? run.template operator()<E, 1, true>() : run.template operator()<E, 1, false>();
  };
  p.q.dtype == DType::bf16 ? with.template operator()<bf16>() : with.template operator()<half>();
}

int64_t hopper_gates_bytes(const Params& p) {
  return boundary_slots(p.B, p.T, p.N, p.cu_seqlens != nullptr, kChunk) * p.H * banks_of(p) * static_cast<int64_t>(sizeof(GateImage<half>));
}

}  // namespace gsa::cuda
