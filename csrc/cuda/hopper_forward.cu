// Chunked forward for Hopper (sm_90a): everything in one kernel, one block for each sequence and query head, its chunks in order, its states in registers.
//
//     X  = tril(scale q k^T)                          o1 = R (exp(ref) (scale q Hk) + X S)         p = softmax(o1)          the keys' warpgroup
//     P  = p R                                        Hk <- exp(G_end - ref) (exp(ref) Hk + k (x) S)
//     A2 = tril(P S^T)                                o  = A2 v + (P exp(ref)) Hv                                           the values' warpgroup
//                                                     Hv <- exp(G_end - ref) (exp(ref) Hv + S (x) v)
//
// Four warpgroups: two make the windows (R, S, ref; core/hopper.cuh), one has the keys, one the values, a window behind, and both bring their tokens, a chunk ahead.
// X and A2 are operands in two parts (16 + 16 bits), S too: what is rounded to 16 bits is the states as operands, and P in front of them. Query heads of a group have
// a block each and share k, v and g through the cache; the first of them writes the states. Making a window takes longer than using it: for a group the windows are
// made once, by hopper_gates.cu, and one thread brings them and the tokens (`images`); sequences and heads with a chunk of several are left to a second launch. So are
// those that are kept for the backward walk, which reads R in another order (`plain`).
// With few sequences and heads a block has a segment of a sequence, begins with the state that hopper_starts.cu has found for it, and is otherwise none the wiser.
// In a pool the state that blocks start from is where one of them, the last in the order of the grid, leaves the new one: it waits until all have read it (`started`).
//
//     shared memory        written by        read by           barriers (full / empty)
//     tokens[2]: q, k, v   keys; values      the same          the warpgroup's own; with images tokens_full, tokens_free [side]
//     windows[2]           windows           keys, values      window_full / window_free
//     Hk, Hv               keys; values      the same          the warpgroup's own
//     P (hi, lo), P exp(ref)   keys          values            p_full / p_free
#include <algorithm>

#include "core/hopper.cuh"
#include "core/select.cuh"
#include "hopper.h"

namespace gsa::cuda {
namespace {

using namespace hopper;

template <class Image>
struct alignas(1024) ImageWindow : Image {};

template <class E, int D, bool images, bool plain>
struct ForwardShared {
  using Gates = std::conditional_t<images, ImageWindow<std::conditional_t<plain, PlainImage<E>, GateImage<E>>>, Window<E>>;
  E q[2][64 * D], k[2][64 * D], v[2][64 * D];
  Gates windows[2];
  E H[2][64 * D];  // [D][64] of the keys, of the values
  E P[3][kTile];  // hi, lo, times exp(ref)
  typename GateMaker<E, 8, true>::Scratch scratch;
  uint64_t tokens_full[2][2], tokens_free[2][2], window_full[2], window_free[2], p_full, p_free;  // tokens: [side]
  int found;
};

// A position in a ring of two and the parity of its barriers.
struct Turn {
  int i = 0;
  uint32_t parity = 0;
  [[maybe_unused]] __device__ void next() {
    i ^= 1;
    if (i == 0) parity ^= 1;
  }
};

// In memory: one more has arrived; wait until so many have.
[[maybe_unused]] __device__ inline void arrive_there(int* count) { asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(count) : "memory"); }
[[maybe_unused]] __device__ inline void wait_there(const int* count, int all) {
  int now;
  do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(count) : "memory");
  while (now < all);
}

// The keys' warpgroup, or the values'.
template <class E, int D, bool images, bool plain, bool leaves, bool values>
__device__ __forceinline__ void forward_half(const ForwardParams& p, E* boundary, ForwardShared<E, D, images, plain>& m, Chunk c, int64_t n, int64_t head,
                                             int64_t q_head, const float* start, GateImage<E>* gate_images, int* started) {
  const int tid = threadIdx.x % 128, warp = __shfl_sync(0xffffffffu, tid / 32, 0);
  const bool outputs = !leaves && p.o.ptr != nullptr, owner = (q_head + 1) % (p.HQ / p.H) == 0;
  const int64_t chunks = c.seq.chunks;
  constexpr int own = values ? 3 : 2;  // barrier of this warpgroup
  float H[D / 8][4];  // rows: slots
  {
    zero(H);
    if (start) load_registers(H, start + values * D * p.M, values, D, p.M, warp);
    else
      with_states(values ? p.hv0 : p.hk0, leaves ? DType::f32 : p.state_dtype, [&](const auto* in) {
        load_registers(H, in + ((p.h0_broadcast ? 0 : (leaves ? n : state_row(p, n)) * p.H) + head) * D * p.M, values, D, p.M, warp);
      });
  }
  E* tile = m.H[values];
  store_transposed<E>(tile, H, warp);
  publish();
  sync(own, 128);
  if (!leaves && started && !start && tid == 0) arrive_there(started + (n * p.H + head) * 2 + values);
  Turn tokens, window;
  uint32_t p_parity = 0;
  const int row = warp * 16 + frag_row();
  auto bring = [&](int64_t i) {
    if (i < chunks) {
      c.select(p, i, kChunk);
      load_tokens<D, 128>(values ? m.v[i % 2] : m.k[i % 2], rows_of(values ? p.v : p.k, c, head), c.length, tid);
      if (!values && outputs) load_tokens<D, 128>(m.q[i % 2], rows_of(p.q, c, q_head), c.length, tid);
    }
    cp_async_commit();
  };
  if (!images) bring(0);

  for (int64_t i = 0; i < chunks; ++i) {
    if (!images) bring(i + 1);
    c.select(p, i, kChunk);
    if (boundary && owner) store_state<D>(boundary + ((c.slot * p.H + head) * 2 + values) * int64_t(D) * p.M, tile, p.M, tid);
    if (images) {
      wait(m.tokens_full[values] + tokens.i, tokens.parity);
    } else {
      cp_async_wait_for<1>();
      publish();
      sync(own, 128);
    }
    const E* x = values ? m.v[tokens.i] : m.k[tokens.i];
    for (bool last = false; !last; window.next()) {
      wait(m.window_full + window.i, window.parity);
      const auto& w = m.windows[window.i];
      if constexpr (images) last = true;
      else last = w.last;
      const bool stores_S = leaves && !values && tid == 0;
      if constexpr (leaves)
        if (stores_S && w.begin == 0 && last) {
          bulk_store<sizeof(w.S)>(gate_images[c.slot * p.H + head].S, w.S);
          bulk_commit();
        }
      // With images, where there are registers for it, while o1 becomes p, or while p is waited for; the tile stays what it was.
      auto move_on = [&] {
        scale_rows(H, w.in[row], w.in[row + 8]);
        hand_over(H);
        products_begin();
        product<E, 4, 1, 1>(H, mnmajor(w.S[0]), mnmajor(x), true);
        product<E, 4, 1, 1>(H, mnmajor(w.S[1]), mnmajor(x), true);
        products_commit();
      };
      if (!values && outputs) {
        float o[8][4], d[2];
        scores<E, D, true>(o, d, m.q[tokens.i], x, tile, w.S[0], w.in, warp);
        if (images) move_on();
        scale_by_R(o, w, warp);
        softmax(o, static_cast<float>(p.scale) * 1.4426950408889634f, p.M);
        scale_by_R(o, w, warp);
        const auto P = split<E>(o);
        scale_columns(o, w.in);
        wait(&m.p_free, p_parity ^ 1);
        store_operand<E>(m.P[0], P.hi, warp);
        store_operand<E>(m.P[1], P.lo, warp);
        store_operand<E>(m.P[2], operand<E>(o), warp);
        publish();
        arrive_warp(&m.p_full);
        p_parity ^= 1;
      } else if (outputs) {
        if (images) move_on();
        wait(&m.p_full, p_parity);
        p_parity ^= 1;
        float a[8][4];
        hand_over(a);
        products_begin();
        product<E, 4, 0, 0>(a, kmajor(m.P[0]), kmajor(w.S[0]), false);
        product<E, 4, 0, 0>(a, kmajor(m.P[1]), kmajor(w.S[0]), true);
        product<E, 4, 0, 0>(a, kmajor(m.P[0]), kmajor(w.S[1]), true);
        products_commit();
        products_wait<0>();
        hand_over(a);
        keep<true, 0>(a, warp);
        const auto A2 = split<E>(a);
        float o[D / 8][4];
        hand_over(o);
        products_begin();
        product<E, 4, 0, 0>(o, kmajor(m.P[2]), kmajor(tile, D), false);
        product<E, 1>(o, A2.hi, mnmajor(x));
        product<E, 1>(o, A2.lo, mnmajor(x));
        products_commit();
        products_wait<0>();
        hand_over(o);
        arrive_warp(&m.p_free);
        if constexpr (images) store_window<E>(rows_of(p.o, c, q_head), o, warp, 0, c.length);
        else store_window<E>(rows_of(p.o, c, q_head), o, warp, w.begin, w.end);
      }
      if (!images || !outputs) move_on();
      products_wait<0>();
      hand_over(H);
      scale_rows(H, w.out[row], w.out[row + 8]);
      if (stores_S) bulk_wait();
      if constexpr (images) publish();
      sync(own, 128);  // every warp is done with the tile
      if (kept(tid) >= 0) arrive(m.window_free + window.i);  // always; without a branch in this place the compiler spills three times as much
      store_transposed<E>(tile, H, warp);
      publish();
      sync(own, 128);
    }
    if (images) arrive_warp(m.tokens_free[values] + tokens.i);
    tokens.next();
  }
  if (leaves || !owner || !(p.cu_seqlens || c.seq.end == p.T)) return;
  if (started) {
    if (tid == 0) wait_there(started + (n * p.H + head) * 2 + values, p.HQ / p.H);
    sync(own, 128);
  }
  with_states(values ? p.hvT : p.hkT, p.state_dtype,
              [&](auto* out) { store_registers(out + (state_row(p, n) * p.H + head) * D * p.M, H, values, D, p.M, warp); });
}

// images: nullptr, or those of hopper_gates.cu, and `cut` is written; else what is not cut is left out, if there is a `cut`. leaves: the windows that are whole chunks
// are left in gate_images.
template <bool images>
constexpr int kThreads = images ? 384 : 512;

template <class E, int D, bool images, bool leaves, bool plain>
__global__ __launch_bounds__(kThreads<images>, 1) void forward_kernel(const __grid_constant__ ForwardParams p, const __grid_constant__ InputMaps maps,
                                                                      E* boundary, GateImage<E>* gate_images, int* cut,
                                                                      const __grid_constant__ Segments segments, const float* starts, int* started) {
#if GSA_HOPPER
  after_the_last_kernel();
  extern __shared__ __align__(1024) char memory[];
  auto& m = *reinterpret_cast<ForwardShared<E, D, images, plain>*>(memory);
  const int64_t q_head = blockIdx.x % p.HQ, item = longest_first(p, blockIdx.x / p.HQ, m.found), head = q_head / (p.HQ / p.H);
  if (!images && cut && !cut[item * p.H + head]) return;
  const int segment = static_cast<uint32_t>(item) % static_cast<uint32_t>(segments.count);
  const int64_t n = static_cast<uint32_t>(item) / static_cast<uint32_t>(segments.count);
  if constexpr (!leaves)
    if (state_row(p, n) < 0) {
      if (images && threadIdx.x == 0) cut[item * p.H + head] = 0;
      return zero_padding(p, n, q_head, segment * segments.length() * kChunk, segments.length() * kChunk);
    }
  const int role = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0), tid = threadIdx.x % 128;
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      for (int side = 0; side < 2; ++side) init(m.tokens_full[side] + i, 1), init(m.tokens_free[side] + i, 4);
      init(m.window_full + i, images ? 1 : 256), init(m.window_free + i, 256);
    }
    init(&m.p_full, 4), init(&m.p_free, 4);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  Chunk c;
  c.seq = sequence<false>(p, n, kChunk);
  const float* start = nullptr;
  if (segments.count > 1) {
    c.seq = part(c.seq, segment, segments.length(), kChunk);
    if (segment) start = starts + ((n * segments.before() + segment * segments.scans - 1) * p.H + head) * start_floats(p);
  }
  const int64_t chunks = c.seq.chunks;
  if constexpr (images) {
    const GateImage<E>* image = gate_images + c.seq.slot * p.H + head;
    bool several = false;
    {  // segments that wait for each other are left out together
      const Sequence looked_at = started ? sequence<false>(p, n, kChunk) : c.seq;
      const GateImage<E>* const first = gate_images + looked_at.slot * p.H + head;
      for (int64_t i = threadIdx.x; i < looked_at.chunks; i += kThreads<images>) several |= first[i * p.H].cut != 0;
    }
    several = __syncthreads_or(several);
    if (threadIdx.x == 0 && q_head % (p.HQ / p.H) == 0) cut[item * p.H + head] = several;
    if (several) return;
    if (role == 0) {  // tokens and windows
      give_registers<40>();
      if (tid) return;
      Turn turn;
      for (int64_t i = 0; i < chunks; ++i, turn.next()) {
        constexpr uint32_t token_bytes = 64 * D * 2, window_bytes = offsetof(GateImage<E>, cut);
        uint64_t *const keys_full = m.tokens_full[0] + turn.i, *const values_full = m.tokens_full[1] + turn.i, *const window_full = m.window_full + turn.i;
        c.select(p, i, kChunk);
        wait(m.tokens_free[0] + turn.i, turn.parity ^ 1);
        arrive_expecting(keys_full, 2 * token_bytes);
        bring_tokens<D>(m.q[turn.i], maps.q, p, c, q_head, keys_full);
        bring_tokens<D>(m.k[turn.i], maps.k, p, c, head, keys_full);
        wait(m.window_free + turn.i, turn.parity ^ 1);
        arrive_expecting(window_full, window_bytes);
        bulk_load(m.windows + turn.i, image + i * p.H, window_bytes, window_full);
        wait(m.tokens_free[1] + turn.i, turn.parity ^ 1);
        arrive_expecting(values_full, token_bytes);
        bring_tokens<D>(m.v[turn.i], maps.v, p, c, head, values_full);
      }
      return;
    }
  } else if (role == 0 || role == 3) {  // windows
    give_registers<leaves ? 120 : 88>();
    GateMaker<E, 8, true> gates(m.scratch, role ? 128 + tid : tid, 1);
    Turn turn;
    typename GateMaker<E, 8, true>::Ahead ahead;  // where there are registers for it
    auto later = [&](int64_t i, auto&& f) {
      if (i >= chunks) return;
      c.select(p, i, kChunk);
      f();
    };
    if (leaves) later(0, [&] { gates.fetch(ahead, p, c, head); });
    for (int64_t i = 0; i < chunks; ++i) {
      if (!leaves || p.g.dtype == DType::f32 || p.s.dtype == DType::f32) later(i + 1, [&] { gates.prefetch(p, c, head); });
      c.select(p, i, kChunk);
      uint64_t starts = 0;
      for (int begin = 0; begin < c.length;) {
        if (leaves && !starts) {
          gates.load(p, c, head, &ahead);
          later(i + 1, [&] { gates.fetch(ahead, p, c, head); });
          c.select(p, i, kChunk);
        } else {
          gates.load(p, c, head);
        }
        const uint64_t later = begin == 63 ? 0 : starts & ~((2ull << begin) - 1);
        const int end = later ? __ffsll(later) - 1 : c.length;
        float before[2], total[2];
        gates.sums(begin, end, before, total);
        if (!starts) {
          starts = gates.safe(total) ? 1 : gates.cut(c.length);
          if (starts != 1) continue;
        }
        gates.make(begin, end, before, total);
        Window<E>& w = m.windows[turn.i];
        wait(m.window_free + turn.i, turn.parity ^ 1);
        if (threadIdx.x == 0) w.begin = begin, w.end = end, w.last = end == c.length;
        gates.store(w, total);
        publish();
        arrive(m.window_full + turn.i);
        if constexpr (leaves) {
          GateImage<E>& image = gate_images[c.slot * p.H + head];
          if (threadIdx.x == 0) image.cut = starts != 1;
          if (starts == 1) gates.store_image(image, total);
        }
        turn.next();
        begin = end;
      }
    }
    return;
  }
  take_registers<images ? 232 : leaves ? 136 : 168>();
  if (role == 1) forward_half<E, D, images, plain, leaves, false>(p, boundary, m, c, n, head, q_head, start, gate_images, started);
  else forward_half<E, D, images, plain, leaves, true>(p, boundary, m, c, n, head, q_head, start, gate_images, started);
#endif
}

constexpr int64_t kPartsAtMost = 32;  // of a sequence, that join_kernel goes through one after the other

// What tensor maps can tell of: no dimension is expanded.
bool mappable(const Params& p, const View& x, int heads) {
  const bool expanded = (p.B > 1 && !x.batch) || (p.T > 1 && !x.token) || (heads > 1 && !x.head);
  return !expanded && ((reinterpret_cast<uintptr_t>(x.ptr) | x.batch * 2 | x.token * 2 | x.head * 2) & 15) == 0;
}

// Two neighbouring gates are one load.
bool pairs(const Params& p, const View& x) {
  const int64_t size = x.dtype == DType::f32 ? 4 : 2;
  const bool whole = ((reinterpret_cast<uintptr_t>(x.ptr) | x.batch * size | x.token * size | x.head * size) & (2 * size - 1)) == 0;
  return !x.ptr || (whole && (x.dtype == DType::f32 || x.dtype == p.q.dtype));
}

}  // namespace

bool hopper_takes(const Params& p) {
  if (!hopper_multiprocessors() || wanted_kernels() == Kernels::portable || p.math == Math::exact) return false;
  const bool narrow = p.K == 64 || p.K == 128, wide = p.K == 256 || p.K == 512;
  if (!(p.q.dtype == DType::bf16 || p.q.dtype == DType::f16) || p.K != p.V || !(narrow || wide) || p.M > (narrow ? 2 : 1) * kSlots || p.M % 8) return false;
  return mappable(p, p.q, p.HQ) && mappable(p, p.k, p.H) && mappable(p, p.v, p.H) && pairs(p, p.g) && pairs(p, p.s);
}

// A walk needs a block for most multiprocessors: sequences times query heads, or segments of them. The parts, which cut a sequence into chunks, use more of the GPU where
// there are neither enough heads nor chunks; and with lengths that nobody here knows, a few of which may be long. Where a query head has its own keys and values that is
// less than what they read and write more.
Segments hopper_segments(const Params& p) {
  const Kernels wanted = wanted_kernels();
  if (!hopper_takes(p) || hopper_wide(p) || p.M > kSlots || wanted == Kernels::parts || wanted == Kernels::few) return {};
  const int64_t blocks = p.N * p.HQ, at_once = hopper_multiprocessors(), chunks = ceil_div(p.T, kChunk);
  const bool enough = blocks * 10 >= ceil_div(blocks, at_once) * at_once * 7 && !(p.cu_seqlens && p.HQ > p.H);
  if (wanted == Kernels::hopper || (enough && wanted != Kernels::segments)) return {1, 1, static_cast<int>(chunks)};
  // As many segments as there is room for beside each other, and for what is before them as many scans, two blocks to a multiprocessor.
  int64_t count = wanted == Kernels::segments ? 3 : at_once / max(blocks, int64_t(1)), scans = 2;
  if (p.cu_seqlens || p.reverse || count < 2) return {};
  if (wanted != Kernels::segments) {
    if (chunks < count * max(int64_t(5), count / 3)) return {};  // over before what comes before the walk pays; measured
    scans = std::min({2 * at_once / ((count - 1) * p.N * p.H), kPartsAtMost / (count - 1), chunks / (count * 4)});
    scans = max(scans, int64_t(1));
  }
  const int64_t each = ceil_div(chunks, count * scans);
  return {static_cast<int>(ceil_div(chunks, each * scans)), static_cast<int>(scans), static_cast<int>(each)};
}

void hopper_forward(const ForwardParams& p, void* boundary, const void* images, int* cut, const float* starts, int* started, bool plain) {
  const Segments segments = hopper_segments(p);
  select_hopper(p, [&]<class E, int D>() {
    auto run = [&]<bool brought, bool plain>() {
      launch("hopper_forward", forward_kernel<E, D, brought, false, plain>, p.N * segments.count * p.HQ, kThreads<brought>,
             sizeof(ForwardShared<E, D, brought, plain>), p.stream, p, brought ? input_maps(static_cast<const Params&>(p)) : InputMaps{},
             static_cast<E*>(boundary), static_cast<GateImage<E>*>(const_cast<void*>(images)), cut, segments, starts, started);
    };
    if (images) plain ? run.template operator()<true, true>() : run.template operator()<true, false>();
    run.template operator()<false, false>();
  });
}

void hopper_forward_states(const ForwardParams& p, void* boundary, void* images, const float* starts) {
  const Segments segments = hopper_segments(p);
  select_hopper(p, [&]<class E, int D>() {
    launch("hopper_forward", forward_kernel<E, D, false, true, false>, p.N * segments.count * p.HQ, kThreads<false>, sizeof(ForwardShared<E, D, false, false>),
           p.stream, p, InputMaps{}, static_cast<E*>(boundary), static_cast<GateImage<E>*>(images), static_cast<int*>(nullptr), segments, starts,
           static_cast<int*>(nullptr));
  });
}

}  // namespace gsa::cuda
