#pragma once

#include "gqa_kernels.h"

namespace gqa {

// Everything the launcher and the CPU twin rely on; the torch layer says the same in sentences.
gqa_status check_params(const gqa_rope_params *p);

}  // namespace gqa
