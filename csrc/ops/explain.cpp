#include "ops/explain.h"

#include <atomic>

namespace gqa::ops {
namespace {

struct State {
  bool active = false;
  ExplainDevice where = ExplainDevice::kOfTensors;
  gqa_device device{};
  std::vector<gqa_plan> plans;
};
thread_local State state;

std::atomic<gqa_launch_log> log_function{nullptr};
std::atomic<void *> log_user{nullptr};

}  // namespace

void explain_begin(ExplainDevice where, const gqa_device &device) { state = {true, where, device, {}}; }

std::vector<gqa_plan> explain_end() {
  state.active = false;
  return std::move(state.plans);
}

bool explaining() { return state.active; }

bool explain_as_cuda(bool tensors_on_cuda) {
  return state.where == ExplainDevice::kCuda || (state.where == ExplainDevice::kOfTensors && tensors_on_cuda);
}

gqa_device explain_device() { return state.device; }

void record_plan(const gqa_plan &plan) { state.plans.push_back(plan); }

void explain_why(const char *reason) {
  if (state.active && !state.plans.empty()) state.plans.back().reason = reason;
}

const char *dtype_name_of(int32_t dtype) {
  switch (dtype) {
    case GQA_DTYPE_FLOAT32: return "float32";
    case GQA_DTYPE_FLOAT16: return "float16";
    case GQA_DTYPE_BFLOAT16: return "bfloat16";
    default: return "unknown";
  }
}

gqa_status cpu_plan(const char *op, int32_t dtype, gqa_plan *plan) {
  *plan = {};
  plan->num_launches = 1;
  plan->launches[0] = {op, "cpu", dtype_name_of(dtype), {1, 1, 1}, {1, 1, 1}, 0, 1, 0};
  plan->reason = "the CPU twin serves every shape";
  return GQA_STATUS_OK;
}

void set_launch_log(gqa_launch_log log, void *user) {
  log_user.store(user, std::memory_order_relaxed);
  log_function.store(log, std::memory_order_release);
  gqa_set_launch_log(log, user);
}

void log_launch(const gqa_launch &launch) {
  if (auto *function = log_function.load(std::memory_order_acquire)) {
    function(log_user.load(std::memory_order_relaxed), &launch);
  }
}

}  // namespace gqa::ops
