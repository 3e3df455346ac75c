// Tensor maps of [batch, token, head, column] tensors of 16-bit elements, and copies of their tiles to shared memory.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/launch.cuh"

namespace gqa::cuda {

using EncodeTensorMap = decltype(&cuTensorMapEncodeTiled);

// The driver's function, so that nothing links against libcuda; nullptr where it has none. Looked up once.
inline EncodeTensorMap find_encode_tensor_map() {
  static const EncodeTensorMap encode = [] {
    void *function = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
    const bool found = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return found ? reinterpret_cast<EncodeTensorMap>(function) : nullptr;
  }();
  return encode;
}

// Strides are in elements; of dimensions with one element they are ignored.
struct TokenTensor {
  const void *data;
  int32_t dtype;
  int64_t batch, tokens, heads, columns;
  const int64_t *stride;  // batch, token, head
};

// A panel is `rows` tokens by `columns` columns of one head; its rows, 64 or 128 bytes, are swizzled. What lies past
// the last token or column reads as zeros, or as NaN where asked for.
struct PanelCopy {
  uint32_t rows, columns;
  bool outside_is_nan = false;
};

inline gqa_status encode_panels(const TokenTensor &t, const PanelCopy &copy, CUtensorMap *map) {
  const EncodeTensorMap encode = find_encode_tensor_map();
  if (encode == nullptr) {
    set_cuda_error("the driver has no cuTensorMapEncodeTiled");
    return GQA_STATUS_CUDA_ERROR;
  }
  const auto bytes = [](int64_t size, int64_t stride) { return static_cast<cuuint64_t>(size > 1 ? 2 * stride : 16); };
  const cuuint64_t size[4] = {static_cast<cuuint64_t>(t.columns), static_cast<cuuint64_t>(t.tokens),
                              static_cast<cuuint64_t>(t.heads), static_cast<cuuint64_t>(t.batch)};
  const cuuint64_t stride[3] = {bytes(t.tokens, t.stride[1]), bytes(t.heads, t.stride[2]), bytes(t.batch, t.stride[0])};
  const cuuint32_t box[4] = {copy.columns, copy.rows, 1, 1}, step[4] = {1, 1, 1, 1};
  const CUtensorMapDataType type =
      t.dtype == GQA_DTYPE_FLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult result = encode(
      map, type, 4, const_cast<void *>(t.data), size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
      copy.columns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      copy.outside_is_nan ? CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA : CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return GQA_STATUS_OK;
  set_cuda_error("cuTensorMapEncodeTiled refused a tensor");
  return GQA_STATUS_CUDA_ERROR;
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap &map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Makes this thread's own writes to shared memory visible to wgmma and to copies.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Starts the copy of the panel at (column, token, head, batch); its bytes are counted at `barrier`.
__device__ __forceinline__ void copy_panel(uint32_t to, const CUtensorMap &map, uint32_t barrier, int column, int token,
                                           int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(column), "r"(token), "r"(head), "r"(batch)
      : "memory");
}

}  // namespace gqa::cuda
