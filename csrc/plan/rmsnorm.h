#pragma once

#include "gqa_kernels.h"

namespace gqa {

// Everything the launchers and the CPU twins rely on; the torch layer says the same in sentences.
gqa_status check_params(const gqa_rmsnorm_params *p);
gqa_status check_params(const gqa_add_rmsnorm_params *p);

}  // namespace gqa
