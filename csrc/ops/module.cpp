// The extension module _C: what an op schema can't say. Compiled without torch's headers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "ops/explain.h"

namespace py = pybind11;

namespace {

py::dict launch_dict(const gqa_launch &launch) {
  py::dict d;
  d["op"] = launch.op;
  d["kernel"] = launch.kernel;
  d["dtype"] = launch.dtype;
  d["grid"] = py::make_tuple(launch.grid[0], launch.grid[1], launch.grid[2]);
  d["block"] = py::make_tuple(launch.block[0], launch.block[1], launch.block[2]);
  d["shared_memory"] = launch.shared_memory;
  d["num_splits"] = launch.num_splits;
  return d;
}

py::dict device_dict(const gqa_device &device) {
  py::dict d;
  d["compute_capability"] = device.compute_capability;
  d["num_sms"] = device.num_sms;
  d["max_shared_memory"] = device.max_shared_memory;
  d["l2_size"] = device.l2_size;
  return d;
}

void call_python_log(void *user, const gqa_launch *launch) {
  const py::gil_scoped_acquire gil;
  try {
    py::reinterpret_borrow<py::object>(static_cast<PyObject *>(user))(launch_dict(*launch));
  } catch (py::error_already_set &error) {
    error.discard_as_unraisable("gqa_kernels launch log");
  }
}

// The callable is kept for the life of the process: a launch on another thread may still be reporting to it.
void set_launch_log(const py::object &callable) {
  if (callable.is_none()) {
    gqa::ops::set_launch_log(nullptr, nullptr);
  } else {
    gqa::ops::set_launch_log(&call_python_log, callable.inc_ref().ptr());
  }
}

py::dict build_info() {
  py::dict d;
  d["version"] = gqa_version();
  d["cuda_archs"] = gqa_cuda_archs();
  return d;
}

void explain_begin(const std::string &where, int compute_capability, int num_sms, int max_shared_memory, int l2_size) {
  const auto device = where == "cuda"  ? gqa::ops::ExplainDevice::kCuda
                      : where == "cpu" ? gqa::ops::ExplainDevice::kCpu
                                       : gqa::ops::ExplainDevice::kOfTensors;
  gqa::ops::explain_begin(device, {compute_capability, num_sms, max_shared_memory, l2_size});
}

py::list explain_end() {
  py::list plans;
  for (const gqa_plan &plan : gqa::ops::explain_end()) {
    py::list launches;
    for (int i = 0; i < plan.num_launches; ++i) launches.append(launch_dict(plan.launches[i]));
    py::dict d;
    d["launches"] = launches;
    d["workspace_size"] = plan.workspace_size;
    d["reason"] = plan.reason == nullptr ? "nothing to launch" : plan.reason;
    plans.append(d);
  }
  return plans;
}

py::object current_device() {
  gqa_device device{};
  if (gqa_current_device(&device) != GQA_STATUS_OK) return py::none();
  return device_dict(device);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build and device information, the launch log and plans of gqa_kernels.";
  m.def("build_info", &build_info);
  m.def("current_device", &current_device);
  m.def("set_launch_log", &set_launch_log);
  m.def("set_kernel_override", &gqa_set_kernel_override);
  m.def("explain_begin", &explain_begin);
  m.def("explain_end", &explain_end);
}
