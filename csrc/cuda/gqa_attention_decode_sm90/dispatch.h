// The launchers of decode_ring, one file per dtype and width.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/gqa_attention_decode_sm90/args.h"
#include "plan/gqa_attention_decode_sm90.h"

namespace gqa::cuda::decode_sm90 {

using Launcher = gqa_status(const DecodePlan &decode, const Args &args, const gqa_launch &plan, cudaStream_t stream);
Launcher bf16_64, bf16_96, bf16_128, bf16_256, f16_64, f16_96, f16_128, f16_256;
Launcher bf16_64_quantized, bf16_96_quantized, bf16_128_quantized, bf16_256_quantized;
Launcher f16_64_quantized, f16_96_quantized, f16_128_quantized, f16_256_quantized;

inline Launcher *find_launcher(bool bf16, bool quantized, int32_t head_dim) {
  switch (head_dim) {
    case 64: return quantized ? (bf16 ? bf16_64_quantized : f16_64_quantized) : (bf16 ? bf16_64 : f16_64);
    case 96: return quantized ? (bf16 ? bf16_96_quantized : f16_96_quantized) : (bf16 ? bf16_96 : f16_96);
    case 128: return quantized ? (bf16 ? bf16_128_quantized : f16_128_quantized) : (bf16 ? bf16_128 : f16_128);
    case 256: return quantized ? (bf16 ? bf16_256_quantized : f16_256_quantized) : (bf16 ? bf16_256 : f16_256);
    default: return nullptr;
  }
}

inline gqa_status launch_decode(const gqa_attention_params &p, const DecodePlan &decode, const gqa_launch &plan,
                                cudaStream_t stream) {
  Launcher *launcher = find_launcher(p.dtype == GQA_DTYPE_BFLOAT16, p.quantization.dtype != 0, p.head_dim);
  return launcher != nullptr ? launcher(decode, make_args(p, decode), plan, stream) : GQA_STATUS_UNSUPPORTED;
}

}  // namespace gqa::cuda::decode_sm90
