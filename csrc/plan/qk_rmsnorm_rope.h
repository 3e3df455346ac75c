#pragma once

#include "plan/rope.h"

namespace gqa {

// The rotation within the op, of what the norms wrote.
gqa_rope_params rope_of(const gqa_qk_rmsnorm_rope_params &p);

// Everything the launcher and the CPU twin rely on; the torch layer says the same in sentences.
gqa_status check_params(const gqa_qk_rmsnorm_rope_params *p);

}  // namespace gqa
