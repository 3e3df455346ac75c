#pragma once

#include <type_traits>

#include "gqa_kernels.h"

namespace gqa {

// Vectors of a row that a thread keeps in registers: in wide rows this many, else one, or two where there is no
// residual to load beside it.
constexpr int kMostHeld = 4;

template <typename Params>
constexpr int light_held() {
  return std::is_same_v<Params, gqa_add_rmsnorm_params> ? 1 : 2;
}

// `light`: whole vectors and no residual, which leaves registers for more threads.
constexpr int most_threads(int held, bool light) { return held == 1 ? 512 : held == 2 ? 256 : light ? 1024 : 512; }

// Which instance of the kernels, as gqa_launch.variant holds it.
struct NormVariant {
  int held;         // 0: narrow rows, a warp or less to each
  int chunk;        // elements moved at once: a vector of 16 bytes, half of one, or 1
  bool few_rows;    // latency counts: fetch the weights into L2 before the kernel's inputs are ready
  bool past_cache;  // the call moves more than L2 holds: outputs are written as not to be read again soon
  bool keeps;       // what registers do not hold of a row is kept in shared memory
  bool dense;       // rows without gaps, weights of their dtype: dense_rows.cuh
  int cluster;      // blocks that share a row
  bool late;        // of a cluster: weights are asked for only once the sum is there
  bool usual;       // of blocks and clusters: past_cache, not few_rows, and weights are applied as Llama's are
  int ahead;        // of a usual cluster: DenseNorm::ahead

  int32_t encode() const {
    return held | chunk << 4 | few_rows << 8 | past_cache << 9 | keeps << 10 | dense << 11 | cluster << 12 |
           late << 16 | usual << 17 | ahead << 18;
  }
  static NormVariant decode(int32_t v) {
    const auto bit = [v](int at) { return (v >> at & 1) != 0; };
    return {v & 15, v >> 4 & 15, bit(8), bit(9), bit(10), bit(11), v >> 12 & 15, bit(16), bit(17), v >> 18 & 255};
  }
};

// Everything the launchers and the CPU twins rely on; the torch layer says the same in sentences.
gqa_status check_params(const gqa_rmsnorm_params *p);
gqa_status check_params(const gqa_add_rmsnorm_params *p);

}  // namespace gqa
