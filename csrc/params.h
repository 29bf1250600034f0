// What a kernel is told. Torch-free: pointers, strides, sizes. The op layer (ops.cpp) has checked everything before.
//
// Letters: B batch, T tokens, H key/value heads, HQ = r * H query heads, K / V key / value head dimension, M slots, N sequences
// (N = B, or the number of packed sequences when cu_seqlens is given and B = 1), D = K + V.
#pragma once
#include <cstdint>

namespace gsa {

enum class DType : int32_t { f64 = 0, f32 = 1, f16 = 2, bf16 = 3, none = -1 };

// How the matrix products of the chunked form are computed. `native`: 16-bit operands with fp32 accumulation, fp32 for fp32, fp64 for fp64.
// `tf32`: fp32 operands may be rounded to TF32. `exact`: 16-bit inputs are widened to fp32 first (backward of the recurrent form).
enum class Math : int32_t { native = 0, tf32 = 1, exact = 2 };

// A [B, T, heads, dim] tensor whose last dimension is contiguous. Strides count elements. ptr == nullptr: not given.
struct View {
  void* ptr = nullptr;
  int64_t batch = 0, token = 0, head = 0;
  DType dtype = DType::none;
};

// Shapes and inputs every kernel shares.
struct Params {
  int64_t B = 0, T = 0, N = 0;
  int32_t HQ = 0, H = 0, K = 0, V = 0, M = 0;
  double scale = 1.0;
  bool reverse = false;               // tokens of each sequence are visited from last to first
  Math math = Math::native;
  const void* cu_seqlens = nullptr;   // [N + 1] int32 or int64 on the tensors' device; contents are not trusted
  bool cu_seqlens_64 = false;

  View q;                             // [B, T, HQ, K]
  View k, v;                          // [B, T, H, K], [B, T, H, V]   dtype of q
  View s;                             // [B, T, H, M] write strength; ptr == nullptr: coupled, s = -expm1(g)
  View g;                             // [B, T, H, M] log gate, in [-inf, 0]

  // States are contiguous, of state_dtype. nullptr: zero.
  const void* hk0 = nullptr;          // [N or 1, H, K, M]
  const void* hv0 = nullptr;          // [N or 1, H, M, V]
  bool h0_broadcast = false;          // the leading dimension of hk0 and hv0 is 1: every sequence starts from the same state

  // A pool: hk0 = hkT and hv0 = hvT have P rows, and sequence n has row state_indices[n]. -1 (and anything out of range): padding, a sequence that
  // the kernels take for empty and that has no state; its o is 0. nullptr: row n.
  const void* state_indices = nullptr;  // [N]
  bool indices_64 = false;
  int64_t P = 0;
  DType state_dtype = DType::f32;     // of hk0, hv0, hkT, hvT: f32; bf16 in a pool whose states are; f64 when q is f64

  // Boundary states: the states before each chunk of chunk_length() tokens of each sequence, [slots, H, K + V, M]: rows 0..K-1 are Hk,
  // rows K..K+V-1 are Hv transposed. Type: q's dtype, or fp32 under Math::exact. nullptr: not kept (forward) / to be recomputed (backward).
  void* boundary = nullptr;
  // What depends on the gates alone, of every chunk, where kernels keep that (kept_gates): made forward, read backward. nullptr: not kept / to be made again.
  void* gates = nullptr;

  void* stream = nullptr;             // cudaStream_t
  void* workspace = nullptr;          // workspace_bytes() bytes on the tensors' device
};

struct ForwardParams : Params {
  View o;                             // [B, T, HQ, V]      written
  void* hkT = nullptr;                // [N, H, K, M]       written when not nullptr
  void* hvT = nullptr;                // [N, H, M, V]       written when not nullptr
};

struct BackwardParams : Params {
  View d_o;                           // [B, T, HQ, V]      cotangent of o
  const void* dhkT = nullptr;         // [N, H, K, M]       cotangents of the final states; nullptr: zero
  const void* dhvT = nullptr;         // [N, H, M, V]
  View dq, dk, dv, ds, dg;            // written; shapes and dtypes of q, k, v, s, g; ds.ptr == nullptr: coupled, its gradient goes into dg
  void* dhk0 = nullptr;               // [N, H, K, M]       written when not nullptr (the op layer sums over N for a broadcast state)
  void* dhv0 = nullptr;               // [N, H, M, V]
};

// One token for each of B rows; states are updated in place.
struct StepParams {
  int64_t B = 0, P = 0;               // rows, rows of the state pool
  int32_t HQ = 0, H = 0, K = 0, V = 0, M = 0;
  double scale = 1.0;
  View q, k, v, s, g;                 // as above without the token axis (View::token unused). s nullptr: coupled. g nullptr: ABC, s holds raw slot logits
  void* hk = nullptr;                 // [P, H, K, M] contiguous
  void* hv = nullptr;                 // [P, H, M, V]
  void* z = nullptr;                  // [P, H, M] of ABC, state dtype
  DType state_dtype = DType::f32;     // f32, bf16; f64 when q is f64
  const void* state_indices = nullptr;  // [B]: the row of the pool; -1 (and anything out of range): o = 0, no state changes. nullptr: row b
  bool indices_64 = false;
  // What a layer does to its projections before anything else; each result is rounded to q's dtype, as its own kernel would leave it.
  const bool* mask = nullptr;         // [B]: where false, as state_indices -1
  double gate_normalizer = 0;         // not 0: g holds logits, and the log gate is logsigmoid(g) / gate_normalizer, in fp32
  View cos, sin;                      // [B or 1, rotary], strides batch alone: the first `rotary` components of q and k are rotated, halves together
  int32_t rotary = 0;
  bool silu_qk = false, silu_v = false;  // then, q and k (v) are silu of what is given
  View o;                             // [B, HQ, V]
  void* stream = nullptr;
};

// ABC: gates and write strengths from raw slot logits e, z_t = logaddexp(z_{t-1}, e_t), g_t = z_{t-1} - z_t, s_t = exp(e_t - z_t).
struct AbcParams {
  int64_t B = 0, T = 0, N = 0;
  int32_t H = 0, M = 0;
  bool reverse = false;
  const void* cu_seqlens = nullptr;
  bool cu_seqlens_64 = false;
  View e;                             // [B, T, H, M]
  DType state_dtype = DType::f32;     // of z0, zT, as in Params
  const void* z0 = nullptr;           // [N, H, M]; nullptr: -inf, and the first write of a slot has g = 0
  const void* state_indices = nullptr;  // [N], a pool of P rows z0 = zT, as in Params
  bool indices_64 = false;
  int64_t P = 0;
  View s, g;                          // forward: written, fp32 (fp64); backward: read
  void* zT = nullptr;                 // [N, H, M] written
  // backward
  View ds, dg;                        // cotangents, fp32 (fp64)
  const void* dzT = nullptr;          // nullptr: zero
  View de;                            // written, dtype of e
  void* dz0 = nullptr;                // [N, H, M] written when not nullptr
  void* stream = nullptr;
};

// One token of a short convolution: o = silu(sum_j weight[d, j] x_{t - W + 1 + j}[d] + bias[d]), in fp32; history moves on by one.
struct ConvParams {
  int64_t B = 0, D = 0;
  int32_t W = 0;
  View x;                             // [B, D], strides batch alone
  void* history = nullptr;            // [B, W - 1, D] contiguous, oldest first; dtype of x, as all here
  const void* weight = nullptr;       // [D, W]
  const void* bias = nullptr;         // [D] or nullptr
  const bool* mask = nullptr;         // [B]: where false, the history stays
  void* o = nullptr;                  // [B, D] contiguous
  void* stream = nullptr;
};

// One token of softmax attention to itself and the last `back` tokens, which move on by one.
struct WindowParams {
  int64_t B = 0;
  int32_t HQ = 0, H = 0, K = 0, V = 0, back = 0, rotary = 0;
  double scale = 1.0;
  View q, k, v;                       // [B, heads, dim]; strides batch and head
  View cos, sin;                      // as in StepParams: q and k are rotated first
  void* keys = nullptr;               // [B, back, H, K] contiguous, newest last; dtype of q
  void* values = nullptr;             // [B, back, H, V]
  int64_t* filled = nullptr;          // [B]: so many of them are tokens, the last ones
  const bool* mask = nullptr;         // [B]: where false, o = 0 and nothing moves
  View o;                             // [B, HQ, V]
  void* stream = nullptr;
};

// q and k with their first n components turned: x cos + (-x2, x1) sin, x1 and x2 being their halves; transposed: the other way round.
struct RotateParams {
  int64_t B = 0, T = 0;
  int32_t q_heads = 0, k_heads = 0, D = 0, n = 0;
  bool transposed = false;
  View q, k, q_out, k_out;            // [B, T, q_heads or k_heads, D]
  View cos, sin;                      // [B or 1, T, n], strides batch and token
  void* stream = nullptr;
};

// o = logsigmoid(max(logits, lowest)) / normalizer in fp32, 0 where the mask is false; with a cotangent d_o of that, of the logits.
struct LogGateParams {
  int64_t count = 0, per_token = 1;   // of elements
  double normalizer = 1, lowest = 0;
  bool has_lowest = false;
  const bool* mask = nullptr;         // one for each token, or null
  DType dtype = DType::none;          // of the logits, and of o where there is a d_o
  const void* logits = nullptr;       // contiguous, as all here
  const float* d_o = nullptr;
  void* o = nullptr;
  void* stream = nullptr;
};

// o = a + share (b - a), a share for each head; or, with a cotangent d_o of that, those of a and b, and what each slab of tokens adds to the shares'.
struct MixParams {
  int64_t rows = 0, slabs = 0;        // rows: tokens
  int32_t heads = 0, D = 0, V = 1;    // V: of a head's components are read at a time
  DType dtype = DType::none;          // of all but d_share
  const void *a = nullptr, *b = nullptr, *d_o = nullptr;   // [rows, heads, D] contiguous, as all here
  const void* share = nullptr;        // [heads]
  void *o = nullptr, *d_a = nullptr, *d_b = nullptr;
  float* d_share = nullptr;           // [slabs, heads, D / V]
  void* stream = nullptr;
};
constexpr int64_t kMixSlab = 16;      // tokens

// y = s / rms(s) * weight with s = silu(o), rms over a row; or, with a cotangent d_y of that, those of o and of the weight.
struct SiluNormParams {
  int64_t rows = 0, width = 0, parts = 0;  // parts: blocks of the backward, silu_norm_parts() of them
  float eps = 0, share = 0;           // share: 1 / width
  DType dtype = DType::none;          // of o, weight, y and their cotangents
  const void *o = nullptr, *weight = nullptr, *d_y = nullptr;  // [rows, width] contiguous, [width] or nullptr
  void *y = nullptr, *d_o = nullptr;
  float* inverse = nullptr;           // [rows] 1 / rms; forward: written when not nullptr
  float* sums = nullptr;              // [parts, width] what each block adds to d_weight; nullptr: that is not wanted
  void* d_weight = nullptr;           // [width]
  void* stream = nullptr;
};

// Tokens per chunk, the spacing of the boundary states. Depends on nothing but this, so that shapes are known without a device.
constexpr int64_t chunk_length(DType dtype, Math math, int64_t M) {
  const bool wide = dtype == DType::f32 || math == Math::exact;   // fp32 tiles
  return dtype == DType::f64 ? 64 : wide ? (M <= 64 ? 32 : 16) : (M <= 128 ? 64 : 32);
}

// Sequence n with tokens [begin, end) owns boundary slots begin / C + 2 n ... : one for each chunk and one for the final state.
// Needs no prefix sum over the sequences' lengths, so kernels find their slots without a host read.
constexpr int64_t first_slot(int64_t begin, int64_t n, int64_t C) { return begin / C + 2 * n; }
constexpr int64_t boundary_slots(int64_t, int64_t T, int64_t N, bool packed, int64_t C) { return packed ? T / C + 2 * N : N * (T / C + 2); }
constexpr int64_t boundary_slot(bool packed, int64_t begin, int64_t T, int64_t n, int64_t C) {   // first slot of sequence n
  return packed ? first_slot(begin, n, C) : n * (T / C + 2);
}

// Bytes of Params::gates for each boundary slot and key/value head; 0: not kept. By shapes alone, too, and so taken up also where the kernels for Hopper, which keep it,
// do not run.
constexpr int64_t kGateImage = 33664;  // GateImage, core/hopper.cuh
constexpr int64_t kept_gates(DType dtype, int64_t K, int64_t V, int64_t M) {
  const bool kept = (dtype == DType::bf16 || dtype == DType::f16) && K == V && (K == 64 || K == 128) && M <= 128 && M % 8 == 0;
  return kept ? kGateImage * (M <= 64 ? 1 : 2) : 0;
}

#define GSA_BACKEND                             \
  bool keeps_gates(const Params&);              \
  int64_t forward_workspace(const Params&);     \
  int64_t backward_workspace(const Params&);    \
  void chunk_forward(const ForwardParams&);     \
  void chunk_backward(const BackwardParams&);   \
  void recurrent_forward(const ForwardParams&); \
  int64_t recurrent_workspace(const Params&);   \
  void step(const StepParams&);                 \
  void abc_gates(const AbcParams&);             \
  void abc_gates_backward(const AbcParams&);

namespace cpu {
GSA_BACKEND
}
namespace cuda {
GSA_BACKEND
void conv_step(const ConvParams&);    // beside.cu; elsewhere these two are put together from torch's own operations (beside.cpp)
int64_t window_step_shared(const WindowParams&);   // bytes of shared memory that a block of the following takes
void window_step(const WindowParams&);
void rotate(const RotateParams&);     // inputs.cu; elsewhere from torch's own operations (inputs.cpp), too
void log_gate(const LogGateParams&);
void mix(const MixParams&);
void silu_norm(const SiluNormParams&);
int64_t silu_norm_parts(const SiluNormParams&);
void silu_norm_backward(const SiluNormParams&);
}
#undef GSA_BACKEND

}  // namespace gsa
