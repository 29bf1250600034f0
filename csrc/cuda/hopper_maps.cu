// Tensor maps: what Hopper's copy engine is told of the tensors that it reads tiles from and writes them to, in the layout that products want (core/hopper.cuh, Tiles).
#include "core/hopper.cuh"
#include "hopper.h"

namespace gsa::cuda {
namespace {

// Of the driver, which is not linked against.
using Encode = decltype(&cuTensorMapEncodeTiled);
Encode encode() {
  static const auto found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result), "cuTensorMapEncodeTiled");
    if (result != cudaDriverEntryPointSuccess) throw std::runtime_error("gsa_ext: this driver has no cuTensorMapEncodeTiled; it is older than CUDA 12");
    return reinterpret_cast<Encode>(function);
  }();
  return found;
}

// strides: in elements, of all dimensions but the first.
template <int RANK>
CUtensorMap map_of(const void* ptr, DType dtype, const int64_t (&size)[RANK], const int64_t (&strides)[RANK - 1], const int (&box)[RANK]) {
  // The driver, unlike what launches kernels, does not make a thread's context (that of autograd's, at its first call) by itself.
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaSetDevice(device), "cudaSetDevice");
  CUtensorMap map;
  cuuint64_t sizes[RANK], bytes[RANK - 1];
  cuuint32_t boxes[RANK], ones[RANK];
  for (int i = 0; i < RANK; ++i) sizes[i] = size[i], boxes[i] = box[i], ones[i] = 1;
  for (int i = 0; i < RANK - 1; ++i) bytes[i] = size[i + 1] > 1 ? strides[i] * 2 : 16;  // of one there is no next
  const CUresult result =
      encode()(&map, dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, RANK, const_cast<void*>(ptr), sizes, bytes,
               boxes, ones, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) throw std::runtime_error("gsa_ext: cuTensorMapEncodeTiled: error " + std::to_string(static_cast<int>(result)));
  return map;
}

TokenMap token_map(const Params& p, const View& x, int heads, int dim) {
  if (p.T == 0) return {};
  auto of = [&](int tokens) { return map_of<4>(x.ptr, x.dtype, {dim, heads, p.T, p.B}, {x.head, x.token, x.batch}, {64, 1, tokens, 1}); };
  // Whole chunks in order are all that there is but in reverse and where sequences are packed.
  return {of(hopper::kChunk), p.cu_seqlens ? of(8) : CUtensorMap{}, p.reverse || p.cu_seqlens ? of(1) : CUtensorMap{}};
}

}  // namespace

InputMaps input_maps(const Params& p) { return {token_map(p, p.q, p.HQ, p.K), token_map(p, p.k, p.H, p.K), token_map(p, p.v, p.H, p.V), {}}; }

InputMaps input_maps(const BackwardParams& p) {
  InputMaps maps = input_maps(static_cast<const Params&>(p));
  maps.d_o = token_map(p, p.d_o, p.HQ, p.V);
  return maps;
}

CUtensorMap boundary_map(const Params& p, const void* boundary) {
  if (!boundary) return {};
  const int64_t rows = boundary_slots(p.B, p.T, p.N, p.cu_seqlens != nullptr, hopper::kChunk) * p.H * (p.K + p.V);
  return map_of<2>(boundary, p.q.dtype, {p.M, rows}, {p.M}, {64, 64});
}

}  // namespace gsa::cuda
