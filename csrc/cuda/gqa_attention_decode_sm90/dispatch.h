// The launchers of decode_ring, one file per dtype and width.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/gqa_attention_decode_sm90/args.h"
#include "plan/gqa_attention_decode_sm90.h"

namespace gqa::cuda::decode_sm90 {

using Launcher = gqa_status(const DecodePlan &decode, const Args &args, const gqa_launch &plan, cudaStream_t stream);
Launcher bf16_64, bf16_96, bf16_128, bf16_256, f16_64, f16_96, f16_128, f16_256;

inline gqa_status launch_decode(const gqa_attention_params &p, const DecodePlan &decode, const gqa_launch &plan,
                                cudaStream_t stream) {
  const bool bf16 = p.dtype == GQA_DTYPE_BFLOAT16;
  const Args args = make_args(p, decode);
  switch (p.head_dim) {
    case 64: return (bf16 ? bf16_64 : f16_64)(decode, args, plan, stream);
    case 96: return (bf16 ? bf16_96 : f16_96)(decode, args, plan, stream);
    case 128: return (bf16 ? bf16_128 : f16_128)(decode, args, plan, stream);
    case 256: return (bf16 ? bf16_256 : f16_256)(decode, args, plan, stream);
    default: return GQA_STATUS_UNSUPPORTED;
  }
}

}  // namespace gqa::cuda::decode_sm90
