#include "plan/rmsnorm.h"

#include <algorithm>
#include <type_traits>

#include "plan/plan.h"

namespace gqa {
namespace {

// As many rows as 132 SMs hold blocks of 512 threads.
constexpr int64_t kFewRowsLimit = 528;

template <typename Params>
gqa_status check(const Params *p) {
  GQA_RETURN_IF_ERROR(check_struct(p));
  if (!is_float_dtype(p->dtype)) return GQA_STATUS_UNSUPPORTED;
  if (p->weight_dtype != p->dtype && p->weight_dtype != GQA_DTYPE_FLOAT32) return GQA_STATUS_UNSUPPORTED;
  if (p->rows[0] < 0 || p->rows[1] < 0 || p->hidden < 1) return GQA_STATUS_INVALID_ARGUMENT;
  if (p->rows[0] * p->rows[1] == 0) return GQA_STATUS_OK;
  const bool complete = p->x != nullptr && p->weight != nullptr && p->out != nullptr;
  return complete ? GQA_STATUS_OK : GQA_STATUS_NULL_POINTER;
}

bool is_aligned(const void *base, const int64_t *stride, int64_t vector) {
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride[0] % vector == 0 && stride[1] % vector == 0;
}

template <typename Params>
bool has_aligned_rows(const Params *p, int64_t vector) {
  constexpr int64_t kContiguous[2] = {};
  bool aligned = p->hidden % vector == 0 && is_aligned(p->x, p->x_stride, vector) &&
                 is_aligned(p->out, p->out_stride, vector) && is_aligned(p->weight, kContiguous, vector);
  if constexpr (std::is_same_v<Params, gqa_add_rmsnorm_params>) {
    aligned = aligned && is_aligned(p->residual, p->residual_stride, vector) &&
              is_aligned(p->residual_out, p->residual_out_stride, vector);
  }
  return aligned;
}

template <typename Params>
gqa_status plan_rows(const char *op, const Params *p, gqa_plan *plan) {
  GQA_RETURN_IF_ERROR(check_params(p));
  *plan = {};
  const int64_t rows = p->rows[0] * p->rows[1];
  if (rows > INT32_MAX) return GQA_STATUS_UNSUPPORTED;
  if (rows == 0) return GQA_STATUS_OK;
  // Few rows: one vector a thread, for latency. Many: four, for more bytes in flight. The result is the same.
  const int64_t vector = 16 / dtype_size(p->dtype), vectors = ceil_div(p->hidden, vector);
  const int variant = !has_aligned_rows(p, vector) ? kUnalignedRows : rows <= kFewRowsLimit ? kFewRows : kManyRows;
  const int64_t per_thread = variant == kManyRows ? 4 : 1;
  const int64_t threads = std::min<int64_t>(512, ceil_div(ceil_div(vectors, per_thread), int64_t{32}) * 32);
  const int64_t shared_memory = ceil_div(vectors, int64_t{32}) * 4;
  if (shared_memory > 48 * 1024) return GQA_STATUS_UNSUPPORTED;
  add_launch(plan, make_launch(op, "norm_row", p->dtype, {rows}, {threads}, shared_memory, variant));
  plan->reason = "one block per row serves every width";
  return GQA_STATUS_OK;
}

}  // namespace

gqa_status check_params(const gqa_rmsnorm_params *p) { return check(p); }

gqa_status check_params(const gqa_add_rmsnorm_params *p) {
  GQA_RETURN_IF_ERROR(check(p));
  if (p->rows[0] * p->rows[1] == 0) return GQA_STATUS_OK;
  return p->residual != nullptr && p->residual_out != nullptr ? GQA_STATUS_OK : GQA_STATUS_NULL_POINTER;
}

}  // namespace gqa

extern "C" {

int64_t gqa_rmsnorm_rows(const gqa_rmsnorm_params *p) { return p->rows[0] * p->rows[1]; }
int64_t gqa_add_rmsnorm_rows(const gqa_add_rmsnorm_params *p) { return p->rows[0] * p->rows[1]; }

gqa_status gqa_rmsnorm_plan(const gqa_rmsnorm_params *p, const gqa_device *, gqa_plan *plan) {
  return gqa::plan_rows("rmsnorm", p, plan);
}

gqa_status gqa_add_rmsnorm_plan(const gqa_add_rmsnorm_params *p, const gqa_device *, gqa_plan *plan) {
  return gqa::plan_rows("add_rmsnorm", p, plan);
}

}  // extern "C"
