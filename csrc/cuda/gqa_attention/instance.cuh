// Defines the kernels of one dtype and width, for few rows and for many. Included by one small file each.
#pragma once

#include "cuda/gqa_attention/attend.cuh"

namespace gqa::cuda {

template <typename T, int kIndex>
AttendKernel attend_kernel() {
  return attend<T, kIndex>;
}

}  // namespace gqa::cuda

#define GQA_ATTEND_INSTANCE(T, index) template gqa::cuda::AttendKernel gqa::cuda::attend_kernel<T, index>()
