// The recurrence token by token, in fp32, in two passes (forward only; its backward is chunk_backward in fp32):
//
//     recurrent_keys     Hk_t[k, m] = Hk_{t-1}[k, m] a_t[m] + k_t[k] s_t[m]      o1_t[m] = scale sum_k Hk_t[k, m] q_t[k]
//     recurrent_values   Hv_t[m, v] = Hv_{t-1}[m, v] a_t[m] + s_t[m] v_t[v]      o_t[v]  = sum_m softmax(o1_t)[m] Hv_t[m, v]
//
// Both keep a slice of 32 columns (slots m; values v) of the state in registers: 8 lanes share a column and split its rows. o1 goes through a
// workspace [B T, HQ, M]. A NaN therefore reaches no position before its own.
#include "core/chunk.cuh"

namespace gsa::cuda {
namespace {

constexpr int kColumns = 32, kLanes = 8, kThreads = kColumns * kLanes;

__device__ float sum8(float x) {
  for (int i = 1; i < kLanes; i *= 2) x += __shfl_xor_sync(0xffffffffu, x, i);
  return x;
}
__device__ float max8(float x) {
  for (int i = 1; i < kLanes; i *= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, i));
  return x;
}

// The whole sequence as one chunk.
__device__ Chunk whole_sequence(const Params& p, int64_t n) {
  Chunk c;
  c.seq = sequence(p, n, 1);
  c.index = 0, c.slot = 0;
  c.length = static_cast<int>(c.seq.length());
  c.first = p.reverse ? c.seq.end - 1 : c.seq.begin;
  c.step = p.reverse ? -1 : 1;
  c.batch = p.cu_seqlens ? 0 : n;
  return c;
}

template <int R>                                          // rows of a lane: K <= 8 R
__global__ __launch_bounds__(kThreads) void recurrent_keys(const __grid_constant__ ForwardParams p, float* o1) {
  const int tiles = (p.M + kColumns - 1) / kColumns;
  const int64_t n = blockIdx.x / tiles / p.H, head = blockIdx.x / tiles % p.H;
  const int m = blockIdx.x % tiles * kColumns + threadIdx.x / kLanes, lane = threadIdx.x % kLanes, r = p.HQ / p.H;
  const Chunk c = whole_sequence(p, n);
  const GateReader gates(p, c, head);
  const Rows k_rows = rows_of(p.k, c, head);
  const int64_t state_n = state_row(p, n), state = (state_n * p.H + head) * p.K;
  if (state_n < 0) return;
  float h[R];
#pragma unroll
  for (int i = 0; i < R; ++i) {
    const int k = i * kLanes + lane;
    const int64_t at = ((p.h0_broadcast ? head * p.K : state) + k) * p.M + m;
    h[i] = p.hk0 && k < p.K && m < p.M ? load_as_float(p.hk0, at, p.state_dtype) : 0.f;
  }
  for (int t = 0; t < c.length; ++t) {
    const float a = gates.gate(t, m), s = gates.write(t, m);
#pragma unroll
    for (int i = 0; i < R; ++i) {
      const int k = i * kLanes + lane;
      const float x = k < p.K ? load_as_float(p.k.ptr, k_rows.at(t) + k, p.k.dtype) : 0.f;
      h[i] = h[i] * a + x * s;
    }
    for (int q_head = head * r; q_head < (head + 1) * r; ++q_head) {
      const int64_t q_at = c.batch * p.q.batch + c.token(t) * p.q.token + q_head * p.q.head;
      float sum = 0.f;
#pragma unroll
      for (int i = 0; i < R; ++i) {
        const int k = i * kLanes + lane;
        if (k < p.K) sum = fmaf(load_as_float(p.q.ptr, q_at + k, p.q.dtype), h[i], sum);
      }
      sum = sum8(sum);
      if (lane == 0 && m < p.M) o1[((c.batch * p.T + c.token(t)) * p.HQ + q_head) * p.M + m] = sum * static_cast<float>(p.scale);
    }
  }
  if (p.hkT)
#pragma unroll
    for (int i = 0; i < R; ++i) {
      const int k = i * kLanes + lane;
      if (k < p.K && m < p.M) store_as(p.hkT, (state + k) * p.M + m, p.state_dtype, h[i]);
    }
}

template <int R>                                          // M <= 8 R
__global__ __launch_bounds__(kThreads) void recurrent_values(const __grid_constant__ ForwardParams p, const float* o1) {
  const int tiles = (p.V + kColumns - 1) / kColumns;
  const int64_t n = blockIdx.x / tiles / p.H, head = blockIdx.x / tiles % p.H;
  const int v = blockIdx.x % tiles * kColumns + threadIdx.x / kLanes, lane = threadIdx.x % kLanes, r = p.HQ / p.H;
  const Chunk c = whole_sequence(p, n);
  const GateReader gates(p, c, head);
  const Rows v_rows = rows_of(p.v, c, head);
  const int64_t state_n = state_row(p, n), state = (state_n * p.H + head) * p.M;
  if (state_n < 0) {
    for (int q_head = head * r; q_head < (head + 1) * r && blockIdx.x % tiles == 0; ++q_head) zero_padding(p, n, q_head);
    return;
  }
  float h[R];
#pragma unroll
  for (int i = 0; i < R; ++i) {
    const int m = i * kLanes + lane;
    const int64_t at = ((p.h0_broadcast ? head * p.M : state) + m) * p.V + v;
    h[i] = p.hv0 && m < p.M && v < p.V ? load_as_float(p.hv0, at, p.state_dtype) : 0.f;
  }
  for (int t = 0; t < c.length; ++t) {
    const float x = v < p.V ? load_as_float(p.v.ptr, v_rows.at(t) + v, p.v.dtype) : 0.f;
#pragma unroll
    for (int i = 0; i < R; ++i) {
      const int m = i * kLanes + lane;
      h[i] = h[i] * gates.gate(t, m) + gates.write(t, m) * x;
    }
    for (int q_head = head * r; q_head < (head + 1) * r; ++q_head) {
      const float* row = o1 + ((c.batch * p.T + c.token(t)) * p.HQ + q_head) * p.M;
      float w[R], top = -INFINITY, sum = 0.f, out = 0.f;
#pragma unroll
      for (int i = 0; i < R; ++i) {
        const int m = i * kLanes + lane;
        w[i] = m < p.M ? row[m] : -INFINITY;
        top = fmaxf(top, w[i]);
      }
      top = max8(top);
#pragma unroll
      for (int i = 0; i < R; ++i) {
        w[i] = expf(w[i] - top);
        sum += w[i];
        if (i * kLanes + lane < p.M) out = fmaf(w[i], h[i], out);
      }
      sum = sum8(sum), out = sum8(out);
      if (lane == 0 && v < p.V) {
        const int64_t at = c.batch * p.o.batch + c.token(t) * p.o.token + q_head * p.o.head + v;
        store_as(p.o.ptr, at, p.o.dtype, out / sum);
      }
    }
  }
  if (p.hvT)
#pragma unroll
    for (int i = 0; i < R; ++i) {
      const int m = i * kLanes + lane;
      if (m < p.M && v < p.V) store_as(p.hvT, (state + m) * p.V + v, p.state_dtype, h[i]);
    }
}

}  // namespace

int64_t recurrent_workspace(const Params& p) { return p.B * p.T * p.HQ * p.M * 4; }

void recurrent_forward(const ForwardParams& p) {
  require_device();
  float* o1 = static_cast<float*>(p.workspace);
  auto keys = [&](auto kernel) { launch("recurrent_keys", kernel, p.N * p.H * ceil_div(p.M, kColumns), kThreads, 0, p.stream, p, o1); };
  auto values = [&](auto kernel) {
    launch("recurrent_values", kernel, p.N * p.H * ceil_div(p.V, kColumns), kThreads, 0, p.stream, p, static_cast<const float*>(o1));
  };
  if (p.K <= 64) keys(recurrent_keys<8>);
  else if (p.K <= 128) keys(recurrent_keys<16>);
  else if (p.K <= 256) keys(recurrent_keys<32>);
  else keys(recurrent_keys<64>);
  if (p.M <= 64) values(recurrent_values<8>);
  else if (p.M <= 128) values(recurrent_values<16>);
  else values(recurrent_values<32>);
}

}  // namespace gsa::cuda
