// One token of decoding, states updated in place. A block has one row of the batch and one key/value head:
//
//     Hk[k, m] <- Hk[k, m] a[m] + k[k] s[m]        o1[m] = scale sum_k Hk[k, m] q[k]
//     p = softmax(o1)
//     Hv[m, v] <- Hv[m, v] a[m] + s[m] v[v]        o[v]  = sum_m p[m] Hv[m, v]
//
// Each state is read and written once; the r query heads of the group go through together, kHeads at a time. Threads are laid out as TX columns
// of W neighbouring elements by TY rows; partial sums over the rows meet in shared memory.
#include "core/chunk.cuh"

namespace gsa::cuda {
namespace {

constexpr int kThreads = 256, kHeads = 4;

template <class T, int W>
struct alignas(sizeof(T) * W) Pack {
  T x[W];
};

// H [rows][cols] <- H gate + outer product; out[h][col] = sum_row weight[h][row] H[row][col] for `heads` heads (<= kHeads).
// update = false: a later group of heads, the state is read only. by_row: gate and write belong to the rows (Hv), else to the columns (Hk).
template <class T, int W, bool by_row>
__device__ void sweep(T* H, int rows, int cols, const float* gate, const float* write, const float* x, const float* weight, int heads, bool update, float* out,
                      float* partial) {
  const int groups = (cols + W - 1) / W, TX = groups < kThreads ? groups : kThreads, TY = kThreads / TX;
  const int tx = threadIdx.x % TX, ty = threadIdx.x / TX;
  for (int g0 = 0; g0 < groups; g0 += TX) {
    const int g = g0 + tx;
    const bool active = ty < TY && g < groups;
    float acc[kHeads][W] = {};
    if (active) {
      for (int i = ty; i < rows; i += TY) {
        Pack<T, W>* at = reinterpret_cast<Pack<T, W>*>(H + int64_t(i) * cols + g * W);
        Pack<T, W> h = *at;
        float f[W];
#pragma unroll
        for (int w = 0; w < W; ++w) f[w] = to_float(h.x[w]);
        if (update) {
#pragma unroll
          for (int w = 0; w < W; ++w) {
            const int c = g * W + w;
            f[w] = by_row ? f[w] * gate[i] + write[i] * x[c] : f[w] * gate[c] + x[i] * write[c];
            h.x[w] = from_float<T>(f[w]);
          }
          *at = h;
        }
        for (int q = 0; q < heads; ++q) {
          const float y = weight[q * rows + i];
#pragma unroll
          for (int w = 0; w < W; ++w) acc[q][w] = fmaf(y, f[w], acc[q][w]);
        }
      }
#pragma unroll
      for (int q = 0; q < kHeads; ++q)
#pragma unroll
        for (int w = 0; w < W; ++w) partial[(q * kThreads + threadIdx.x) * W + w] = acc[q][w];
    }
    __syncthreads();
    for (int e = threadIdx.x; e < heads * TX * W; e += kThreads) {
      const int q = e / (TX * W), c = g0 * W + e % (TX * W);
      float sum = 0.f;
      for (int y = 0; y < TY; ++y) sum += partial[(q * kThreads + y * TX) * W + e % (TX * W)];
      if (c < cols) out[q * cols + c] = sum;
    }
    __syncthreads();
  }
}

template <class T>
__global__ __launch_bounds__(kThreads) void step_kernel(const __grid_constant__ StepParams p) {
  const int64_t b = blockIdx.x / p.H, head = blockIdx.x % p.H;
  const int r = p.HQ / p.H, K = p.K, V = p.V, M = p.M;
  int64_t row = b;
  if (p.state_indices) row = p.indices_64 ? static_cast<const int64_t*>(p.state_indices)[b] : static_cast<const int32_t*>(p.state_indices)[b];
  if (row < 0 || row >= p.P) {                             // padding: nothing is read
    for (int e = threadIdx.x; e < r * V; e += kThreads) store_as(p.o.ptr, b * p.o.batch + (head * r + e / V) * p.o.head + e % V, p.o.dtype, 0.f);
    return;
  }
  extern __shared__ __align__(16) char shared[];
  Arena mem{shared};
  float* gate = mem.take<float>(M);
  float* write = mem.take<float>(M);
  float* k = mem.take<float>(K);
  float* v = mem.take<float>(V);
  float* q = mem.take<float>(kHeads * K);
  float* prob = mem.take<float>(kHeads * M);
  float* out = mem.take<float>(kHeads * V);
  float* partial = mem.take<float>(kHeads * kThreads * 4);
  T* Hk = static_cast<T*>(p.hk) + (row * p.H + head) * int64_t(K) * M;
  T* Hv = static_cast<T*>(p.hv) + (row * p.H + head) * int64_t(M) * V;

  for (int m = threadIdx.x; m < M; m += kThreads) {
    const int64_t s_at = b * p.s.batch + head * p.s.head + m;
    if (p.g.ptr) {
      const float g = load_as_float(p.g.ptr, b * p.g.batch + head * p.g.head + m, p.g.dtype);
      gate[m] = expf(g);
      write[m] = p.s.ptr ? load_as_float(p.s.ptr, s_at, p.s.dtype) : -expm1f(g);
    } else {                                               // ABC: see abc.cu
      T* zp = static_cast<T*>(p.z) + (row * p.H + head) * M + m;
      const float e = load_as_float(p.s.ptr, s_at, p.s.dtype), z = to_float(*zp);
      float a = 1.f, s = 0.f;
      if (e != -INFINITY) {
        if (z == -INFINITY) {
          a = 0.f, s = 1.f, *zp = from_float<T>(e);
        } else {
          const float d = e - z, x = expf(-fabsf(d)), l = log1pf(x);
          s = d > 0.f ? 1.f / (1.f + x) : x / (1.f + x);
          a = d > 0.f ? x / (1.f + x) : 1.f / (1.f + x);
          *zp = from_float<T>(d > 0.f ? e + l : z + l);
        }
      }
      gate[m] = a, write[m] = s;
    }
  }
  for (int i = threadIdx.x; i < K; i += kThreads) k[i] = load_as_float(p.k.ptr, b * p.k.batch + head * p.k.head + i, p.k.dtype);
  for (int i = threadIdx.x; i < V; i += kThreads) v[i] = load_as_float(p.v.ptr, b * p.v.batch + head * p.v.head + i, p.v.dtype);

  for (int h0 = 0; h0 < r; h0 += kHeads) {
    const int heads = min(kHeads, r - h0);
    for (int i = threadIdx.x; i < heads * K; i += kThreads)
      q[i] = load_as_float(p.q.ptr, b * p.q.batch + (head * r + h0 + i / K) * p.q.head + i % K, p.q.dtype) * static_cast<float>(p.scale);
    __syncthreads();
    if (M % 4 == 0) sweep<T, 4, false>(Hk, K, M, gate, write, k, q, heads, h0 == 0, prob, partial);
    else sweep<T, 1, false>(Hk, K, M, gate, write, k, q, heads, h0 == 0, prob, partial);
    const int warp = threadIdx.x / 32;
    if (warp < heads) {                                    // softmax over the slots, a warp a head
      float* x = prob + warp * M;
      float top = -INFINITY, sum = 0.f;
      for (int m = lane_id(); m < M; m += 32) top = fmaxf(top, x[m]);
      for (int i = 16; i; i /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, i));
      for (int m = lane_id(); m < M; m += 32) sum += x[m] = expf(x[m] - top);
      for (int i = 16; i; i /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, i);
      const float inv = 1.f / sum;
      for (int m = lane_id(); m < M; m += 32) x[m] *= inv;
    }
    __syncthreads();
    if (V % 4 == 0) sweep<T, 4, true>(Hv, M, V, gate, write, v, prob, heads, h0 == 0, out, partial);
    else sweep<T, 1, true>(Hv, M, V, gate, write, v, prob, heads, h0 == 0, out, partial);
    for (int i = threadIdx.x; i < heads * V; i += kThreads) store_as(p.o.ptr, b * p.o.batch + (head * r + h0 + i / V) * p.o.head + i % V, p.o.dtype, out[i]);
    __syncthreads();
  }
}

}  // namespace

void step(const StepParams& p) {
  require_device();
  const int64_t shared = 2 * arena(p.M, 4) + arena(p.K, 4) + arena(p.V, 4) + arena(kHeads * p.K, 4) + arena(kHeads * p.M, 4) + arena(kHeads * p.V, 4) +
                         arena(kHeads * kThreads * 4, 4);
  if (p.state_dtype == DType::bf16) launch("step", step_kernel<bf16>, p.B * p.H, kThreads, shared, p.stream, p);
  else launch("step", step_kernel<float>, p.B * p.H, kThreads, shared, p.stream, p);
}

}  // namespace gsa::cuda
