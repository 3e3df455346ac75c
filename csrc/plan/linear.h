// linear's checks and sizes, for the plan, the CPU twin and the launcher.
#pragma once

#include "plan/plan.h"

namespace gqa {

gqa_status check_params(const gqa_linear_params *p);

inline int64_t total_features(const gqa_linear_params &p) {
  return p.out_features[0] + p.out_features[1] + p.out_features[2];
}

}  // namespace gqa
