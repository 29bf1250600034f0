// Chunked forward for Hopper (sm_90a), where it walks in segments (hopper_forward.cu): the states at the beginning of each segment but the first.
//
//     starts_kernel    scans of parts of a sequence beside each other, each as if nothing were before it, one block for each part and key/value head. Of each chunk
//                          S_j = s_j exp(G_end - G_j)          H <- exp(G_end) H + S^T x          decay <- exp(G_end) decay
//                      relative to the chunk's end no factor is above 1: exact for any gates, resets (-inf) too, without windows. Chunks of which the gates leave nothing
//                      at the end of the part (remembered_chunks) are left out.
//     join_kernel      H <- decay H + that of the part, from the initial state on; the states at the beginning of segments. For hopper_ends.cu, in reverse: dH <- decay dH
//                      + that of the segment; the cotangents at the end of segments. Behind `cut`, flags [N, H], whether any is set
//
// Two warpgroups make the gates together, then one has the keys' state in its registers, the other the values'. S is an operand in two parts. Two blocks on a
// multiprocessor: while one makes gates the other multiplies. In memory: of each part Hk, Hv, decay; join_kernel leaves in the last one before a segment what that begins with.
//
//     shared memory        written by       read by          barriers
//     tokens[2]: k, v      copies           its warpgroup    tokens_full [side] / sync of the block
//     S[2], decay[2]       all              all              sync of the block
#include "core/hopper.cuh"
#include "core/select.cuh"
#include "hopper.h"

namespace gsa::cuda {
namespace {

using namespace hopper;

constexpr int kThreads = 256, kJoinThreads = 128;

template <class E, int D>
struct StartsShared {
  alignas(1024) E tokens[2][2][64 * D], S[2][2][kTile];  // tokens: [turn][side]
  float decay[2][kSlots];
  typename GateMaker<E, 8>::Scratch scratch;
  float sums[kThreads / 32][kSlots];
  uint64_t tokens_full[2][2];
  Sequence sequence;
};
static_assert(sizeof(StartsShared<bf16, 128>) <= 113 * 1024);

template <class E, int D>
__global__ __launch_bounds__(kThreads, 2) void starts_kernel(const __grid_constant__ Params p, const __grid_constant__ InputMaps maps,
                                                             const __grid_constant__ Segments segments, float* starts) {
#if GSA_HOPPER
  after_the_last_kernel();
  extern __shared__ __align__(1024) char memory[];
  auto& m = *reinterpret_cast<StartsShared<E, D>*>(memory);
  const int head = blockIdx.x % p.H, side = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  const int64_t item = blockIdx.x / p.H, n = item / segments.before();
  const Sequence own = part(sequence(p, n, kChunk), item % segments.before(), segments.chunks, kChunk);
  const int chunks = static_cast<int>(own.chunks), warp = __shfl_sync(0xffffffffu, threadIdx.x % 128 / 32, 0), row = warp * 16 + frag_row();
  if (threadIdx.x == 0) {
    m.sequence = own;
    for (int i = 0; i < 2; ++i) init(m.tokens_full[i], 1), init(m.tokens_full[i] + 1, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  const int needed = remembered_chunks<E, true>(p, own, head, m.sums), before = chunks - needed;
  auto send = [&](int i) {  // by a thread of each side; i: of those needed
    if (threadIdx.x % 128 || i >= needed) return;
    uint64_t* const full = m.tokens_full[i % 2] + side;
    arrive_expecting(full, 64 * D * 2);
    bring_tokens<D>(m.tokens[i % 2][side], side ? maps.v : maps.k, p, chunk_of(p, m.sequence, before + i, kChunk), head, full);
  };
  send(0);
  GateMaker<E, 8> gates(m.scratch, threadIdx.x, 0);
  typename GateMaker<E, 8>::Ahead ahead;
  auto fetch = [&](int i) {
    if (i < needed) gates.fetch(ahead, p, chunk_of(p, m.sequence, before + i, kChunk), head);
  };
  fetch(0);
  float H[D / 8][4], decay[2];
  decay[0] = decay[1] = before ? 0.f : 1.f;
  zero(H);
#pragma unroll 1
  for (int i = 0; i < needed; ++i) {
    const int turn = i % 2;
    const Chunk c = chunk_of(p, m.sequence, before + i, kChunk);
    gates.load(p, c, head, &ahead);
    E* const S = m.S[turn][0];
    const float2 all = gates.to_end(c.length, [&](int j, float x, float y) { gates.s[j][0] *= x, gates.s[j][1] *= y; });
    {
      const uint32_t to = gates.first_S(S), piece = gates.piece_S();
#pragma unroll
      for (int j = 0; j < 8; ++j) gates.store_S(to, piece, j);
    }
    fetch(i + 1);
    if (gates.warp == 0) *reinterpret_cast<float2*>(m.decay[turn] + 2 * gates.lane) = all;
    publish();
    __syncthreads();  // and the products of the chunk before this one are done
    send(i + 1);
    const float f[2] = {m.decay[turn][row], m.decay[turn][row + 8]};
    decay[0] *= f[0], decay[1] *= f[1];
    scale_rows(H, f[0], f[1]);
    wait(m.tokens_full[turn] + side, i / 2 & 1);
    const E* const x = m.tokens[turn][side];
    hand_over(H);
    products_begin();
    product<E, 4, 1, 1>(H, mnmajor(S), mnmajor(x), true);
    product<E, 4, 1, 1>(H, mnmajor(S + kTile), mnmajor(x), true);
    products_commit();
    products_wait<0>();
    hand_over(H);
  }
  float* const out = starts + (item * p.H + head) * start_floats(p);
  store_registers(out + side * D * p.M, H, side, D, p.M, warp);
  if (side == 0 && (lane_id() & 3) == 0) out[2 * D * p.M + row] = decay[0], out[2 * D * p.M + row + 8] = decay[1];
#endif
}

// Four elements of a state a thread.
template <bool reverse>
__global__ __launch_bounds__(kJoinThreads) void join_kernel(const __grid_constant__ Params p, const __grid_constant__ Segments segments, float* starts,
                                                            int* cut) {
  after_the_last_kernel();
  if (reverse && blockIdx.x == 0) {
    int some = 0;
    for (int64_t i = threadIdx.x; i < p.N * p.H; i += kJoinThreads) some |= cut[i];
    some = __syncthreads_or(some);
    if (threadIdx.x == 0) cut[p.N * p.H] = some;
  }
  const int size = (p.K + p.V) * p.M, blocks = (size / 4 + kJoinThreads - 1) / kJoinThreads, i = (blockIdx.x % blocks * kJoinThreads + threadIdx.x) * 4;
  const int64_t head = blockIdx.x / blocks % p.H, n = blockIdx.x / blocks / p.H, each = start_floats(p);
  if (i >= size) return;
  const bool values = i >= p.K * p.M;
  const int own = values ? i - p.K * p.M : i;
  float4 h = make_float4(0.f, 0.f, 0.f, 0.f);
  if (const int64_t row = p.h0_broadcast ? 0 : state_row(p, n); !reverse && row >= 0)
    with_states(values ? p.hv0 : p.hk0, p.state_dtype, [&](const auto* in) {  // at any address
      in += (row * p.H + head) * p.K * p.M + own;
      h = make_float4(to_float(in[0]), to_float(in[1]), to_float(in[2]), to_float(in[3]));
    });
  const int64_t step = (reverse ? -1 : 1) * p.H * each;  // from one part to the next
  float* const part = starts + ((n * segments.before() + (reverse ? segments.before() - 1 : 0)) * p.H + head) * each;
  constexpr int kAtOnce = 4;
#pragma unroll 1
  for (int first = 0; first < segments.before(); first += kAtOnce) {
    float4 x[kAtOnce], f[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k)
      if (first + k < segments.before()) {
        const float *const from = part + (first + k) * step, *const decay = from + size;
        x[k] = *reinterpret_cast<const float4*>(from + i);
        f[k] =
            values ? make_float4(decay[own / p.V], decay[own / p.V], decay[own / p.V], decay[own / p.V]) : *reinterpret_cast<const float4*>(decay + own % p.M);
      }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k)
      if (first + k < segments.before()) {
        h = make_float4(fmaf(f[k].x, h.x, x[k].x), fmaf(f[k].y, h.y, x[k].y), fmaf(f[k].z, h.z, x[k].z), fmaf(f[k].w, h.w, x[k].w));
        if ((first + k + 1) % segments.scans == 0) *reinterpret_cast<float4*>(part + (first + k) * step + i) = h;
      }
  }
}

template <bool reverse>
void join(const Params& p, const Segments& segments, float* parts, int* cut) {
  const int64_t blocks = ceil_div(int64_t(p.K + p.V) * p.M / 4, int64_t(kJoinThreads)) * p.H * p.N;
  launch_early("hopper_join", join_kernel<reverse>, blocks, kJoinThreads, 0, p.stream, p, segments, parts, cut);
}

}  // namespace

void hopper_join_ends(const Params& p, float* ends, int* cut) { join<true>(p, hopper_segments(p).undivided(), ends, cut); }

void hopper_starts(const Params& p, float* starts) {
  const Segments segments = hopper_segments(p);
  select_hopper(p, [&]<class E, int D>() {
    launch_early("hopper_starts", starts_kernel<E, D>, p.N * segments.before() * p.H, kThreads, sizeof(StartsShared<E, D>), p.stream, p, input_maps(p),
                 segments, starts);
  });
  join<false>(p, segments, starts, nullptr);
}

}  // namespace gsa::cuda
