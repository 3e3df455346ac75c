// swiglu_ffn's checks, for the plan and the CPU twin.
#pragma once

#include "plan/plan.h"

namespace gqa {

gqa_status check_params(const gqa_swiglu_ffn_params *p);

}  // namespace gqa
