// The launchers of prefill_wgmma, one file per dtype and shape.
#pragma once

#include <cuda_runtime_api.h>

#include "plan/gqa_attention_prefill_sm90.h"

namespace gqa::cuda::prefill_sm90 {

using Launcher = gqa_status(const gqa_attention_params &p, const PrefillPlan &prefill, const gqa_launch &plan,
                            cudaStream_t stream);
Launcher bf16_64x128, bf16_64x128_tall, bf16_96x96, bf16_128x128, bf16_128x160, bf16_256x80, f16_64x128,
    f16_64x128_tall, f16_96x96, f16_128x128, f16_128x160, f16_256x80;

inline gqa_status launch_prefill(const gqa_attention_params &p, const PrefillPlan &prefill, const gqa_launch &plan,
                                 cudaStream_t stream) {
  const bool bf16 = p.dtype == GQA_DTYPE_BFLOAT16;
  switch (prefill.shape) {
    case 0: return (bf16 ? bf16_64x128 : f16_64x128)(p, prefill, plan, stream);
    case 1: return (bf16 ? bf16_64x128_tall : f16_64x128_tall)(p, prefill, plan, stream);
    case 2: return (bf16 ? bf16_96x96 : f16_96x96)(p, prefill, plan, stream);
    case 3: return (bf16 ? bf16_128x128 : f16_128x128)(p, prefill, plan, stream);
    case 4: return (bf16 ? bf16_128x160 : f16_128x160)(p, prefill, plan, stream);
    case 5: return (bf16 ? bf16_256x80 : f16_256x80)(p, prefill, plan, stream);
    default: return GQA_STATUS_UNSUPPORTED;
  }
}

}  // namespace gqa::cuda::prefill_sm90
