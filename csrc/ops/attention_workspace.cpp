#include "ops/attention_params.h"
#include "ops/run.h"

namespace gqa::ops {

void prepare_workspace(const char *op, const AttentionArguments &args,
                       int64_t (*size)(const gqa_attention_params *, const gqa_device *), gqa_attention_params *p,
                       Kept *kept) {
  int64_t needed = 0;
  if (args.q.is_cuda() && !explaining()) {
    const torch::stable::accelerator::DeviceGuard guard(args.q.get_device_index());
    gqa_device device{};
    if (const auto status = gqa_current_device(&device); status != GQA_STATUS_OK) fail_status(op, status);
    needed = size(p, &device);
  }
  if (args.workspace) {
    const Tensor &given = *args.workspace;
    check_same_device(op, "workspace", given, "q", args.q);
    check_value(op, given.scalar_type() == ScalarType::Byte, "workspace", "uint8", dtype_string(given));
    check_value(op, given.is_contiguous(), "workspace", "contiguous", "strided memory");
    check_value(op, given.numel() >= needed, "workspace", "at least " + std::to_string(needed) + " bytes",
                std::to_string(given.numel()));
    check_value(op, reinterpret_cast<uintptr_t>(given.data_ptr()) % 16 == 0, "workspace", "aligned to 16 bytes",
                "a misaligned address");
    kept->push_back(given);
  } else if (needed > 0) {
    kept->push_back(new_tensor(args.q, {needed}, ScalarType::Byte));
  } else {
    return;
  }
  p->workspace = kept->back().data_ptr();
  p->workspace_size = kept->back().numel();
}

}  // namespace gqa::ops
