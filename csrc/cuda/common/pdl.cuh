// Programmatic dependent launch. A kernel that may be launched with it lets its successors start at once and waits for
// its predecessors, in every block, before it touches what another kernel wrote or may still read. No-ops otherwise.
#pragma once

namespace gqa::cuda {

__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;"); }
__device__ __forceinline__ void wait_for_predecessors() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

}  // namespace gqa::cuda
