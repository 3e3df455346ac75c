#pragma once

#include "gqa_kernels.h"

namespace gqa {

// Variants of norm_row: whole 16-byte vectors, or the same vectors element by element.
constexpr int kAlignedRows = 0;
constexpr int kUnalignedRows = 1;

// Everything the launchers and the CPU twins rely on; the torch layer says the same in sentences.
gqa_status check_params(const gqa_rmsnorm_params *p);
gqa_status check_params(const gqa_add_rmsnorm_params *p);

}  // namespace gqa
