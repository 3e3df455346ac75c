#pragma once

#include "gqa_kernels.h"

namespace gqa {

// Variants of norm_row: whole 16-byte vectors, four or one of them a thread; or one, element by element.
constexpr int kManyRows = 0;
constexpr int kFewRows = 1;
constexpr int kUnalignedRows = 2;

// Everything the launchers and the CPU twins rely on; the torch layer says the same in sentences.
gqa_status check_params(const gqa_rmsnorm_params *p);
gqa_status check_params(const gqa_add_rmsnorm_params *p);

}  // namespace gqa
