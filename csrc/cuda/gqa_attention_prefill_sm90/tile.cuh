// Geometry of a prefill tile: its shared memory, its barriers, and what the launch tells the kernel.
#pragma once

#include "cuda/common/mbarrier.cuh"
#include "plan/gqa_attention_prefill_sm90.h"

namespace gqa::cuda::prefill_sm90 {

template <int kDim_, int kKeys_, int kGroups_>
struct PrefillTile {
  static constexpr int kDim = kDim_, kKeys = kKeys_;
  static constexpr int kGroups = kGroups_;      // computing warpgroups
  static constexpr int kStages = 2;             // blocks of keys, and of values, on their way
  static constexpr int kEarly = 2;              // products of values that are left when a warpgroup passes its turn on
  static constexpr bool kQuick = kGroups == 2;  // softmax without maxima; three warpgroups lack the registers
  static constexpr int kRows = 64 * kGroups, kThreads = 128 * (kGroups + 1);
  static constexpr int kLoaderRegisters = kGroups == 2 ? 24 : 32, kRegisters = kGroups == 2 ? 240 : 160;
  static constexpr uint32_t kQueryBytes = 2 * kRows * kDim, kBlockBytes = 2 * kKeys * kDim;
  static constexpr int kPanel = kDim % 64 == 0 ? 64 : 32;  // columns of a panel, whose rows are swizzled
  static constexpr int kPanels = kDim / kPanel, kSwizzle = 2 * kPanel;
  static constexpr uint32_t kQueryPanel = kSwizzle * kRows, kKeyPanel = kSwizzle * kKeys;
  static constexpr uint32_t kKeysAt = kQueryBytes, kValuesAt = kKeysAt + kStages * kBlockBytes;
  static constexpr uint32_t kBarriersAt = kValuesAt + kStages * kBlockBytes;
  static constexpr uint32_t kWorkAt = kBarriersAt + 8 * (2 + 5 * kStages);
  static constexpr int kSharedMemory = kWorkAt + kPrefillWorkBytes;
  static_assert(kQueryBytes % 1024 == 0 && kBlockBytes % 1024 == 0 && kKeyPanel % (8 * kSwizzle) == 0,
                "the swizzle repeats every 8 rows");
};

struct PrefillArgs {
  gqa_attention_params p;
  const void *k, *v;  // what keys and values are read from
  int64_t k_stride[3], v_stride[3];
  int32_t window_left, window_right;  // 2^30 where unlimited; a causal mask is a window_right of 0
  int32_t group;                      // query heads of a KV head
  int32_t row_tiles;                  // of one head
  int32_t tiles;
  int32_t all_heads;              // of all sequences; a ragged batch has one more, for rows that belong to none
  int32_t section;                // heads whose keys and values stay in L2 together
  int32_t page_rows;              // copied at once from a page; 0 where keys are not in pages
  int32_t transforms;             // scores are not just scaled by a positive number
  float multiplier;               // of scores, to log2 units; 1 with `transforms`
  float before_tanh, after_tanh;  // transforms: factors; without a softcap just the first
};

// Warps of the loading warpgroup that look at values.
constexpr int kInspectors = 3;

// Full and empty barriers of q and of both rings. A block of values is loaded first and then inspected.
template <typename Tile>
struct PrefillBarriers {
  uint32_t base;

  __device__ uint32_t query_full() const { return base; }
  __device__ uint32_t query_empty() const { return base + 8; }
  __device__ uint32_t key_full(uint32_t stage) const { return base + 16 + 8 * stage; }
  __device__ uint32_t key_empty(uint32_t stage) const { return key_full(stage) + 8 * Tile::kStages; }
  __device__ uint32_t value_loaded(uint32_t stage) const { return key_full(stage) + 16 * Tile::kStages; }
  __device__ uint32_t value_full(uint32_t stage) const { return key_full(stage) + 24 * Tile::kStages; }
  __device__ uint32_t value_empty(uint32_t stage) const { return key_full(stage) + 32 * Tile::kStages; }

  __device__ void init() const {
    constexpr int kWarps = 4 * Tile::kGroups;
    mbarrier_init(query_full(), 1);
    mbarrier_init(query_empty(), kWarps);
    for (uint32_t stage = 0; stage < Tile::kStages; ++stage) {
      mbarrier_init(key_full(stage), 1);
      mbarrier_init(key_empty(stage), kWarps);
      mbarrier_init(value_loaded(stage), 1);
      mbarrier_init(value_full(stage), kInspectors);
      mbarrier_init(value_empty(stage), kWarps);
    }
    mbarrier_fence_init();
  }
};

}  // namespace gqa::cuda::prefill_sm90
