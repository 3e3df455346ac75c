// Checks, work division and tile choice of attention: pure host functions, shared by the CPU twin and the CUDA kernels.
#pragma once

#include "gqa_kernels.h"

namespace gqa {

// Everything the launchers and the CPU twins rely on; the torch layer says the same in sentences.
gqa_status check_attention_prefill(const gqa_attention_params *p);
gqa_status check_attention_decode(const gqa_attention_params *p);

// True where the op has nothing to do: no query rows, and no rows to append to the cache.
bool is_empty(const gqa_attention_params *p);

// Query tokens in one row of the CPU twin. Row r is block r % blocks of KV head r / blocks % Hkv of sequence
// r / blocks / Hkv, where blocks = cpu_query_blocks(p). A ragged batch has one more sequence, number `batch`: the rows
// of q past the last offset. The last block of a sequence also takes the tokens beyond seqlen_q, which only an
// invalid sequence and the tail can have.
constexpr int64_t kCpuQueryBlock = 32;
int64_t cpu_query_blocks(const gqa_attention_params *p);

}  // namespace gqa
