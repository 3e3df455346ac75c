// Explaining: inside begin/end, an op validates and plans but computes nothing. Shared with module.cpp, so no torch.
#pragma once

#include <string>
#include <vector>

#include "gqa_kernels.h"

namespace gqa::ops {

enum class ExplainDevice { kOfTensors, kCpu, kCuda };

// Per thread. The device is what a CUDA plan is made for.
void explain_begin(ExplainDevice where, const gqa_device &device);
std::vector<gqa_plan> explain_end();

bool explaining();
bool explain_as_cuda(bool tensors_on_cuda);
gqa_device explain_device();
void record_plan(const gqa_plan &plan);
// Gives the plan recorded last another reason; `reason` lives as long as the program.
void explain_why(const char *reason);

const char *dtype_name_of(int32_t dtype);
gqa_status cpu_plan(const char *op, int32_t dtype, gqa_plan *plan);
// The launch log of libgqa_kernels.so is set through its C interface; the CPU side logs through the same function.
void set_launch_log(gqa_launch_log log, void *user);
void log_launch(const gqa_launch &launch);

}  // namespace gqa::ops
