// The append kernel, for the op of its own and as the first step of attention.
#pragma once

#include "cuda/common/launch.cuh"

namespace gqa::cuda {

// With v_cache == NULL nothing is appended: k, rotated, is written to k_cache at its own place, [B, S, Hkv, D] or
// [tokens, Hkv, D] like k, as for tokens without a cache.
gqa_status launch_append(const gqa_kv_cache_append_params &p, const gqa_launch &plan, cudaStream_t stream);

}  // namespace gqa::cuda
