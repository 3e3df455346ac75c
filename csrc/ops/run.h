// From filled params to the CPU twin or the CUDA launcher; or, while explaining, to the plan alone.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

#include "ops/checks.h"
#include "ops/explain.h"

namespace gqa::ops {

CUstream_st *current_cuda_stream(int32_t device_index);
[[noreturn]] void fail_status(const char *op, gqa_status status);

template <typename Params>
struct Entry {
  const char *name;
  gqa_status (*cuda)(const Params *, CUstream_st *);
  gqa_status (*cpu)(const Params *, int64_t, int64_t);
  int64_t (*rows)(const Params *);
  gqa_status (*plan)(const Params *, const gqa_device *, gqa_plan *);
};

#define GQA_ENTRY(name, op, params) \
  ::gqa::ops::Entry<params> { name, &gqa_##op##_cuda, &gqa_##op##_cpu, &gqa_##op##_rows, &gqa_##op##_plan }

// Spreads the CPU twin's rows over torch's threads. `row_cost`: elements a row touches, so that small calls stay on
// one thread.
template <typename Params>
void run_cpu(const Entry<Params> &entry, const Params &params, int64_t row_cost) {
  gqa_launch launch{entry.name, "cpu", nullptr, {1, 1, 1}, {1, 1, 1}, 0, 1, 0};
  launch.dtype = dtype_name_of(params.dtype);
  log_launch(launch);
  const int64_t rows = entry.rows(&params);
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, row_cost));
  std::atomic<int> failed{GQA_STATUS_OK};
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    const gqa_status status = entry.cpu(&params, begin, end);
    if (status != GQA_STATUS_OK) failed.store(status);
  });
  if (failed.load() != GQA_STATUS_OK) fail_status(entry.name, static_cast<gqa_status>(failed.load()));
}

// `like` decides the device. The caller has validated everything; a status here names a limit of the kernels.
template <typename Params>
void run(const Entry<Params> &entry, const Params &params, const Tensor &like, int64_t row_cost) {
  if (explaining()) {
    gqa_plan plan{};
    const bool cuda = explain_as_cuda(like.is_cuda());
    const gqa_device device = explain_device();
    const gqa_status status = cuda ? entry.plan(&params, &device, &plan) : cpu_plan(entry.name, params.dtype, &plan);
    if (status != GQA_STATUS_OK) fail_status(entry.name, status);
    record_plan(plan);
    return;
  }
  if (like.is_cpu()) return run_cpu(entry, params, row_cost);
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  const gqa_status status = entry.cuda(&params, current_cuda_stream(like.get_device_index()));
  if (status != GQA_STATUS_OK) fail_status(entry.name, status);
}

}  // namespace gqa::ops
