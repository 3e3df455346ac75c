// Geometry of a prefill tile: its shared memory, its barriers, and what the launch tells the kernel.
#pragma once

#include "cuda/common/mbarrier.cuh"
#include "plan/gqa_attention_prefill_sm90.h"

namespace gqa::cuda::prefill_sm90 {

template <int kDim_, int kKeys_, int kGroups_>
struct PrefillTile {
  static constexpr int kDim = kDim_, kKeys = kKeys_;
  static constexpr int kGroups = kGroups_;  // computing warpgroups
  static constexpr int kStages = 2;         // blocks of keys, and of values, on their way
  static constexpr int kQueries = PrefillShape{kDim, kKeys, kGroups}.queries();  // tiles of queries
  static constexpr int kEarly = 2;  // products of values that are left when a warpgroup passes its turn on
  static constexpr int kRows = 64 * kGroups, kThreads = 128 * (kGroups + 1);
  static constexpr int kLoaderRegisters = kGroups == 2 ? 56 : 32, kRegisters = kGroups == 2 ? 224 : 160;
  // A tile's first scores run beside the last values before it; three warpgroups of 64 columns lack the registers.
  static constexpr bool kOverlaps = kQueries > 1 && (kGroups == 2 || kDim == 96);
  static constexpr bool kCounts = kGroups == 2;  // ragged tiles are counted ahead; else registers are short
  static constexpr uint32_t kQueryBytes = 2 * kRows * kDim, kBlockBytes = 2 * kKeys * kDim;
  static constexpr int kPanel = kDim % 64 == 0 ? 64 : 32;  // columns of a panel, whose rows are swizzled
  static constexpr int kPanels = kDim / kPanel, kSwizzle = 2 * kPanel;
  static constexpr uint32_t kQueryPanel = kSwizzle * kRows, kKeyPanel = kSwizzle * kKeys;
  static constexpr uint32_t kKeysAt = kQueries * kQueryBytes, kValuesAt = kKeysAt + kStages * kBlockBytes;
  static constexpr uint32_t kBarriersAt = kValuesAt + kStages * kBlockBytes;
  static constexpr uint32_t kWorkAt = kBarriersAt + kPrefillBarrierBytes;
  static constexpr int kSharedMemory = kWorkAt + kPrefillWorkBytes;
  static_assert(kQueryBytes % 1024 == 0 && kBlockBytes % 1024 == 0 && kKeyPanel % (8 * kSwizzle) == 0,
                "the swizzle repeats every 8 rows");
};

// Division of numbers below 2^31 by a known one.
struct Divisor {
  uint32_t by, factor, shift;

  __host__ __device__ void set(uint32_t by_) {
    by = by_;
    shift = 0;
    while ((uint64_t{1} << shift) < by) ++shift;
    factor = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - by)) / by + 1);
  }
  __device__ __forceinline__ int divide(int x) const {
    const uint32_t y = static_cast<uint32_t>(x);
    return static_cast<int>((__umulhi(y, factor) + y) >> shift);
  }
};

struct PrefillArgs {
  gqa_attention_params p;
  const void *k, *v;  // what keys and values are read from
  int64_t k_stride[3], v_stride[3];
  int32_t window_left, window_right;  // 2^30 where unlimited; a causal mask is a window_right of 0
  int32_t group;                      // query heads of a KV head
  int32_t row_tiles;                  // of one head
  int32_t tiles;
  int32_t all_heads;  // of all sequences; a ragged batch has one more, for rows that belong to none
  int32_t section;    // heads whose keys and values stay in L2 together
  int32_t page_rows;  // copied at once from a page; 0 where keys are not in pages
  int32_t counts;     // a ragged batch whose tiles are counted ahead
  int32_t plain;      // not ragged, no cache, no left padding
  int32_t last_section;
  Divisor per_section, heads_of_section, heads_of_last, q_heads;
  int32_t transforms;             // scores are not just scaled by a positive number
  float multiplier;               // of scores, to log2 units; 1 with `transforms`
  float before_tanh, after_tanh;  // transforms: factors; without a softcap just the first

  __host__ void divide() {
    per_section.set(section * row_tiles);
    heads_of_section.set(section);
    heads_of_last.set(all_heads - (all_heads - 1) / section * section);
    q_heads.set(p.num_q_heads);
    last_section = (all_heads - 1) / section;
  }
};

// Warps of the loading warpgroup that look at values.
constexpr int kInspectors = 2;

// Tiles that are known ahead.
constexpr int kWorkPlaces = 4;

// How many places of a ring were passed; as one number it takes one register.
template <int kPlaces>
struct RingCount {
  static_assert((kPlaces & (kPlaces - 1)) == 0);
  uint32_t count = 0;

  __device__ __forceinline__ uint32_t stage() const { return count % kPlaces; }
  __device__ __forceinline__ uint32_t parity() const { return count / kPlaces % 2; }
  __device__ __forceinline__ void advance() { ++count; }
  __device__ __forceinline__ RingCount before() const { return {count - 1}; }
};

// Full and empty barriers of work, of q and of both rings. A block of values is loaded first and then inspected.
template <typename Tile>
struct PrefillBarriers {
  uint32_t base;

  __device__ uint32_t work_full(uint32_t stage) const { return base + 16 * stage; }
  __device__ uint32_t work_empty(uint32_t stage) const { return base + 16 * stage + 8; }
  __device__ uint32_t query_full(uint32_t stage) const { return work_full(kWorkPlaces + stage); }
  __device__ uint32_t query_empty(uint32_t stage) const { return work_empty(kWorkPlaces + stage); }
  __device__ uint32_t key_full(uint32_t stage) const { return query_full(Tile::kQueries) + 8 * stage; }
  __device__ uint32_t key_empty(uint32_t stage) const { return key_full(stage) + 8 * Tile::kStages; }
  __device__ uint32_t value_loaded(uint32_t stage) const { return key_full(stage) + 16 * Tile::kStages; }
  __device__ uint32_t value_full(uint32_t stage) const { return key_full(stage) + 24 * Tile::kStages; }
  __device__ uint32_t value_empty(uint32_t stage) const { return key_full(stage) + 32 * Tile::kStages; }

  __device__ void init() const {
    constexpr int kWarps = 4 * Tile::kGroups;
    for (uint32_t stage = 0; stage < Tile::kQueries; ++stage) {
      mbarrier_init(query_full(stage), 1);
      mbarrier_init(query_empty(stage), kWarps);
    }
    for (uint32_t stage = 0; stage < kWorkPlaces; ++stage) {
      mbarrier_init(work_full(stage), 1);
      mbarrier_init(work_empty(stage), kWarps + kInspectors + 1);
    }
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
