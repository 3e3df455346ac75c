#pragma once

#include "gqa_kernels.h"

namespace gqa {

// Everything the launcher and the CPU twin rely on; the torch layer says the same in sentences.
// Row r of the CPU twin is token r % seqlen of sequence r / seqlen, all heads; a shorter sequence has no such token.
gqa_status check_params(const gqa_kv_cache_append_params *p);

}  // namespace gqa
