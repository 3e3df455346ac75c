#pragma once

#include "gqa_kernels.h"

namespace gqa {

// Everything the launcher and the CPU twin rely on; the torch layer says the same in sentences.
// Row r of the CPU twin is head r % Hq of query r / Hq % Sq of sequence r / Hq / Sq.
gqa_status check_params(const gqa_merge_attention_states_params *p);

}  // namespace gqa
