#include "plan/sample.h"

#include <algorithm>
#include <initializer_list>

#include "common/sampling_logits.h"
#include "plan/plan.h"
#include "plan/tensors.h"

namespace gqa {
namespace {

// Bytes of a row's logits that one of `blocks` holds, in whole vectors of the aligned row around them.
int64_t part_bytes(const gqa_sample_params *p, int64_t blocks) {
  return sample_stretch(p, blocks) * kSampleClusterColumns * 16;
}

// Threads that hold logits: more where a block's part is large or it has an SM for itself.
int64_t workers_per_block(const gqa_sample_params *p, const gqa_device *device, int64_t blocks) {
  if (sampling::is_adjusted(*p)) return kSampleClusterAdjusted;
  const int64_t part = part_bytes(p, blocks);
  const bool alone = p->rows * blocks <= device->num_sms && part >= 20 * 1024;
  return alone || part > 56 * 1024 ? kSampleClusterMany : kSampleClusterFew;
}

int64_t room(const gqa_device *device) { return device->max_shared_memory - kSampleClusterStatic; }

// For logits that penalties make, where the others are held as they are: a word of eight bytes each. Few are enough,
// as more are looked for again.
int64_t extra_memory(const gqa_sample_params *p, const gqa_device *device, int64_t blocks) {
  if (!sampling::has_penalties(*p) || sampling::is_widened(*p)) return 0;
  const int64_t left = (room(device) - sample_cluster_memory(p, blocks)) / 16 * 16;
  return std::clamp<int64_t>(left, kSampleExtras / 8 * 8, kSampleExtras * 8);
}

// Two blocks for a row, or one where rows are many and short.
int64_t fewest_blocks(const gqa_sample_params *p, const gqa_device *device) {
  return p->rows * 2 <= device->num_sms || part_bytes(p, 1) >= 32 * 1024 ? 2 : 1;
}

// As many blocks for a row as find an SM each, of 8 KB of logits at least; or as many as it takes to hold the row.
int64_t blocks_per_row(const gqa_sample_params *p, const gqa_device *device) {
  int64_t blocks = fewest_blocks(p, device);
  for (const int64_t more : {2, 4, 6, 8, 16}) {
    // A cluster lies in one group of SMs. On 132 there is room for 7 clusters of 16, 15 of 8, 20 of 6, 30 of 4, 66
    // of 2.
    const int64_t sure = more == 2 ? device->num_sms : device->num_sms * 10 / 11;
    if (more == 16 && device->num_sms < 112) break;
    if (part_bytes(p, more) >= 8 * 1024 && p->rows * more <= sure) blocks = more;
  }
  while (blocks < 8 && sample_cluster_memory(p, blocks) + extra_memory(p, device, blocks) > room(device)) {
    blocks = std::min<int64_t>(8, blocks * 2);
  }
  return blocks;
}

int64_t greedy_blocks_per_row(const gqa_sample_params *p, const gqa_device *device) {
  const int64_t largest = device->num_sms >= 112 && p->rows <= 7 ? 16 : 8;
  int64_t blocks = fewest_blocks(p, device);
  while (blocks < largest && part_bytes(p, blocks) >= 16 * 1024 && p->rows * blocks <= device->num_sms) blocks *= 2;
  return blocks;
}

}  // namespace

int64_t sample_stretch(const gqa_sample_params *p, int64_t blocks) {
  const int64_t vector = 16 / (sampling::is_widened(*p) ? 4 : dtype_size(p->dtype));
  return std::max<int64_t>(ceil_div(ceil_div(p->vocab + vector - 1, vector), blocks * kSampleClusterColumns), 2);
}

int64_t sample_cluster_memory(const gqa_sample_params *p, int64_t blocks) {
  const int64_t pitch = sample_stretch(p, blocks) | 1;
  return kSampleClusterCells * int64_t{4} + kSampleClusterTold * blocks + pitch * kSampleClusterColumns * 16;
}

gqa_status check_params(const gqa_sample_params *p) {
  GQA_RETURN_IF_ERROR(check_struct(p));
  if (!is_float_dtype(p->dtype)) return GQA_STATUS_UNSUPPORTED;
  if (!is_index(p->top_ks) || !is_index(p->seeds) || !is_index(p->offsets)) return GQA_STATUS_UNSUPPORTED;
  if (p->logit_bias != nullptr && p->logit_bias_dtype != GQA_DTYPE_FLOAT32 && p->logit_bias_dtype != p->dtype) {
    return GQA_STATUS_UNSUPPORTED;
  }
  if (p->rows < 0 || p->vocab < 1) return GQA_STATUS_INVALID_ARGUMENT;
  if (p->vocab > sampling::kMaxVocab) return GQA_STATUS_UNSUPPORTED;
  if (p->rows == 0) return GQA_STATUS_OK;
  if (p->token_counts == nullptr && sampling::has_penalties(*p)) return GQA_STATUS_NULL_POINTER;
  return p->logits != nullptr && p->ids != nullptr ? GQA_STATUS_OK : GQA_STATUS_NULL_POINTER;
}

}  // namespace gqa

extern "C" {

int64_t gqa_sample_rows(const gqa_sample_params *p) { return p->rows; }

gqa_status gqa_sample_plan(const gqa_sample_params *p, const gqa_device *device, gqa_plan *plan) {
  GQA_RETURN_IF_ERROR(gqa::check_params(p));
  *plan = {};
  if (p->rows > INT32_MAX) return GQA_STATUS_UNSUPPORTED;
  if (p->rows == 0) return GQA_STATUS_OK;
  const bool adjusted = gqa::sampling::is_adjusted(*p);
  const bool hopper = device != nullptr && device->compute_capability == 90 && gqa::has_sm90_code();
  if (hopper && !gqa::is_portable_asked_for()) {
    if (!adjusted && p->temperatures == nullptr && !(p->temperature > 0.0f)) {
      const int64_t blocks = gqa::greedy_blocks_per_row(p, device);
      if (p->rows * blocks > INT32_MAX) return GQA_STATUS_UNSUPPORTED;
      gqa::add_launch(plan, gqa::make_launch("sample", "sample_greedy", p->dtype, {p->rows * blocks},
                                             {gqa::kSampleGreedyThreads}, 0, static_cast<int32_t>(blocks)));
      plan->reason = "temperature 0: a cluster of blocks per row looks for its largest logit";
      return GQA_STATUS_OK;
    }
    const int64_t blocks = gqa::blocks_per_row(p, device);
    if (p->rows * blocks > INT32_MAX) return GQA_STATUS_UNSUPPORTED;
    const int64_t shared_memory = gqa::sample_cluster_memory(p, blocks) + gqa::extra_memory(p, device, blocks);
    const int64_t threads = gqa::workers_per_block(p, device, blocks) + 32;
    gqa::add_launch(plan, gqa::make_launch("sample", "sample_cluster", p->dtype, {p->rows * blocks}, {threads},
                                           shared_memory, static_cast<int32_t>(blocks)));
    plan->reason = adjusted ? "a cluster of blocks per row holds the row, adjusted, in shared memory"
                            : "a cluster of blocks per row holds the row in shared memory";
    return GQA_STATUS_OK;
  }
  const int64_t shared_memory = (gqa::sampling::kBins + 1) * gqa::kSampleColumns * sizeof(uint32_t);
  gqa::add_launch(plan,
                  gqa::make_launch("sample", "sample_row", p->dtype, {p->rows}, {gqa::kSampleThreads}, shared_memory));
  plan->reason = "one block per row serves every vocabulary and setting";
  return GQA_STATUS_OK;
}

}  // extern "C"
