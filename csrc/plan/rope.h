#pragma once

#include "gqa_kernels.h"

namespace gqa {

// One or two tokens an SM.
constexpr int64_t kFewTokens = 264;

// Which instance of the kernels, as gqa_launch.variant holds it.
struct RopeVariant {
  bool vectors;     // heads and tables are made of whole, aligned 16-byte vectors
  bool few_tokens;  // latency counts: fetch the angles into L2 before the kernel's inputs are ready
  bool past_cache;  // the call moves more than L2 holds: outputs are written as not to be read again soon
  bool dense;       // rope_dense
  bool usual;       // of it with a norm: row t of the tables is token t's, weights are applied as Llama's are

  int32_t encode() const { return vectors | few_tokens << 1 | past_cache << 2 | dense << 3 | usual << 4; }
  static RopeVariant decode(int32_t v) {
    return {(v & 1) != 0, (v >> 1 & 1) != 0, (v >> 2 & 1) != 0, (v >> 3 & 1) != 0, (v >> 4 & 1) != 0};
  }
};

// Everything the launcher and the CPU twin rely on; the torch layer says the same in sentences.
gqa_status check_params(const gqa_rope_params *p);

}  // namespace gqa
