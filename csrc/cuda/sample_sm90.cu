// sample on Hopper: one token per row, by the definition of common/sampling.h; the same token as the CPU twin's.
// One cluster of 1 to 16 blocks per row; a block holds a stretch of the row's aligned 16-byte vectors, warps stride.
// Memory order: the row once, into shared memory; every pass after that reads there. Blocks push sums to each other.
// Limits: sm_90; vocab <= 2^18; any alignment and row stride. No block waits for another outside its cluster.
// Determinism: integer sums, so any order and any number of blocks gives the same bytes; rows do not see each other.
#include "common/sampling_draw.h"
#include "cuda/common/cluster.cuh"
#include "cuda/common/pair_max.cuh"
#include "cuda/common/sample_sm90.cuh"
#include "cuda/common/vec.cuh"
#include "plan/sample.h"

namespace gqa::cuda {
namespace {

using namespace gqa::sampling;
using u64 = unsigned long long;

// Other architectures compile an empty kernel: the plan gives their calls to the portable one.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define GQA_SAMPLE_SM90
#endif

#ifdef GQA_SAMPLE_SM90
constexpr uint32_t kAll = 0xffffffffu;
constexpr int kBinEntries = kSampleClusterBins;
constexpr int kColumns = kSampleClusterColumns;
constexpr int kDigitBits = 9;  // of the key, told apart in one round of select
constexpr int kDigits = 1 << kDigitBits;
constexpr int kLimbBits = 10;  // sums of m in two words: 2^18 tokens of 10 bits each fit 32 bits
constexpr int kMaxBlocks = 16;
constexpr int kCountShift = 40;  // an exchanged word counts above bit 40 and sums m below it
static_assert(kBinEntries >= static_cast<int>(kBins) && kBinEntries % kMaxBlocks == 0 && kDigits % kMaxBlocks == 0);

// Bits of the key below which logits widened from 16 bits agree.
template <typename T>
constexpr int kConstantBits = std::is_same_v<T, float> ? 0 : (std::is_same_v<T, __half> ? 13 : 16);

struct Crossing {
  int thread;
  u64 before;
};

struct Shared {
  u64 bins[kBinEntries];   // of the row
  u64 slots[kBinEntries];  // [block][entry of those this block sums]
  u64 parts[2][kMaxBlocks];
  u64 of_warp[2][32];
  Crossing crossing;
  Picked picked;
  Settings settings;
};
static_assert(sizeof(Shared) <= kSampleClusterStatic);

// The dynamic shared memory of select and pick, where the histogram was.
struct Scratch {
  uint32_t low[kDigits], high[kDigits], count[kDigits];
  u64 digits[kDigits], slots[kDigits];
  uint32_t chunk_sums[1024];
};
static_assert(sizeof(Scratch) <= kSampleClusterCells * sizeof(uint32_t));

// A part of a word's bits as a number.
struct Field {
  u64 mask = ~u64{0};
  int shift = 0;

  __device__ u64 operator()(u64 word) const { return (word & mask) >> shift; }
};
constexpr u64 kSumMask = (u64{1} << kCountShift) - 1;

__device__ __forceinline__ uint64_t sum_of(u64 entry) { return entry & kSumMask; }
__device__ __forceinline__ uint64_t count_of(u64 entry) { return entry >> kCountShift; }

__device__ __forceinline__ u64 warp_sum(u64 value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) value += __shfl_xor_sync(kAll, value, offset);
  return value;
}

// The block's sum. Called, not inlined: instructions that run once come from a cold cache.
template <int kWarps>
__device__ __noinline__ u64 block_sum(u64 value, u64 *of_warp) {
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  u64 sum = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += of_warp[w];
  return sum;
}

// Leaves the thread at which the running total of field(weight) reaches need, and the total of weights before it.
template <int kWarps>
__device__ __forceinline__ void block_cross(u64 weight, u64 need, Field field, u64 *of_warp, Crossing *crossing) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  u64 running = weight;
#pragma unroll
  for (int offset = 1; offset < 32; offset <<= 1) {
    const u64 below = __shfl_up_sync(kAll, running, offset);
    if (lane >= offset) running += below;
  }
  if (lane == 31) of_warp[warp] = running;
  __syncthreads();
  u64 before = running - weight;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) before += w < warp ? of_warp[w] : 0;
  if (field(before) < need && field(before + weight) >= need) *crossing = {static_cast<int>(threadIdx.x), before};
  __syncthreads();
}

// The largest of the values seen so far, NaN aside, and whether there was a NaN.
template <typename T>
struct Largest {
  static constexpr uint32_t kLowest = std::is_same_v<T, __half> ? 0xfc00fc00u : 0xff80ff80u;
  uint32_t largest = kLowest, with_nan = kLowest;

  __device__ __forceinline__ void add(const Vec<T> &vec) {
    const uint4 words = *reinterpret_cast<const uint4 *>(&vec);
    const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (const uint32_t pair : pairs) {
      largest = pair_max<T>(largest, pair);
      with_nan = pair_max_nan<T>(with_nan, pair);
    }
  }

  // key() of the largest; all ones, which no key is, after a NaN.
  __device__ uint32_t result() const {
    const T *seen = reinterpret_cast<const T *>(&largest), *nans = reinterpret_cast<const T *>(&with_nan);
    const bool nan = key(to_float(nans[0])) == 0 || key(to_float(nans[1])) == 0;
    return nan ? kAll : max(key(to_float(seen[0])), key(to_float(seen[1])));
  }
};

template <>
struct Largest<float> {
  float largest = -INFINITY;
  bool nan = false;

  __device__ __forceinline__ void add(const Vec<float> &vec) {
#pragma unroll
    for (const float z : vec.value) {
      largest = fmaxf(largest, z);
      nan = nan || z != z;
    }
  }

  __device__ uint32_t result() const { return nan ? kAll : key(largest); }
};

template <typename T, int kThreads>
class ClusterRow {
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kSize = Vec<T>::kSize;
  static_assert(kThreads >= kDigits);

 public:
  __device__ ClusterRow(const T *z, int vocab, Shared *shared, uint32_t *cells)
      : vocab_(vocab),
        lead_(reinterpret_cast<uintptr_t>(z) % 16 / sizeof(T)),
        rank_(cluster_rank()),
        blocks_(cluster_size()),
        shared_(*shared),
        cells_(cells),
        counts_(cells + kBinEntries * kColumns),
        scratch_(*reinterpret_cast<Scratch *>(cells)),
        part_(reinterpret_cast<Vec<T> *>(cells + kSampleClusterCells)),
        z_(z - lead_) {
    const int vectors = (lead_ + vocab + kSize - 1) / kSize;
    const int share = (vectors + blocks_ - 1) / blocks_;
    first_ = min(static_cast<int>(rank_) * share, vectors);
    vectors_ = min(share, vectors - first_);
    writes_ = rank_ == 0;
  }

  // Reads the block's part of the row; meanwhile() runs while the first loads are under way. No thread may store to
  // another block before the cluster's barrier, at which the caller has arrived.
  template <typename F>
  __device__ void load(F &&meanwhile) {
    Vec<T> batch[kBatch];
    int v = threadIdx.x;
    fetch(v, batch);
    for (int i = threadIdx.x; i < kSampleClusterCells / 4; i += kThreads) {
      reinterpret_cast<uint4 *>(cells_)[i] = make_uint4(0, 0, 0, 0);
    }
    meanwhile();
#pragma unroll 1
    for (int edge = 0; edge < 2; ++edge) load_edge(edge == 0 ? 0 : (vectors_ > 1 ? vectors_ - 1 : -1));
#pragma unroll 1
    while (v < vectors_) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i, v += kThreads) {
        if (v >= vectors_ || !is_whole(v)) continue;
        store_vec(reinterpret_cast<T *>(part_ + v), batch[i]);
        largest_.add(batch[i]);
      }
      fetch(v, batch);
    }
    cluster_wait_acquire();
  }

  // Whether this block is the one to store the result.
  __device__ bool writes() const { return writes_; }

  __device__ Top top() {
    const uint32_t largest = row_max(largest_.result());
    if (largest != kAll) return {largest, false};
    uint32_t number = 0;
    for_each_token([&](int, float z) { number = max(number, key(z)); });
    return {row_max(number), true};
  }

  __device__ int64_t first(uint32_t of) {
    int index = vocab_;
    for_each_token([&](int i, float z) { index = key(z) == of ? min(index, i) : index; });
    return static_cast<int64_t>(kAll - row_max(kAll - static_cast<uint32_t>(index)));
  }

  __device__ void weigh(float max, float scale, bool counts) {
    max_ = max;
    scale_ = scale;
    add_weights(counts);
    __syncthreads();
    const int bin = threadIdx.x;
    u64 entry = 0;
    if (bin < kBinEntries) {
      // Rotated, so that threads do not meet in one bank.
      const uint4 *sums = reinterpret_cast<const uint4 *>(cells_ + bin * kColumns);
      const uint4 *pairs = reinterpret_cast<const uint4 *>(counts_ + bin / 2 * kColumns);
#pragma unroll
      for (int i = 0; i < kColumns / 4; ++i) {
        const uint4 cell = sums[(i + bin) % (kColumns / 4)];
        entry += u64{cell.x} + cell.y + (u64{cell.z} + cell.w);
      }
      if (counts) {
        uint32_t count = 0;
#pragma unroll
        for (int i = 0; i < kColumns / 4; ++i) {
          const uint4 cell = pairs[(i + bin / 2) % (kColumns / 4)];
          const int shift = bin % 2 * 16;
          count += (cell.x >> shift & 0xffff) + (cell.y >> shift & 0xffff) + (cell.z >> shift & 0xffff) +
                   (cell.w >> shift & 0xffff);
        }
        entry |= u64{count} << kCountShift;
      }
    }
    share<kBinEntries>(entry, shared_.slots, shared_.bins);
  }

  __device__ uint64_t sum(uint32_t bin) const { return sum_of(shared_.bins[bin]); }
  __device__ uint64_t count(uint32_t bin) const { return count_of(shared_.bins[bin]); }

  template <typename F>
  __device__ uint64_t total(F &&weight) {
    return block_total(threadIdx.x < kBins ? weight(threadIdx.x) : 0);
  }

  template <typename F>
  __device__ Found find(F &&weight, uint64_t need) {
    const Crossing at = cross(threadIdx.x < kBins ? weight(threadIdx.x) : 0, need);
    return {static_cast<uint32_t>(at.thread), at.before};
  }

  // The bin's keys lie between bounds a little wider than its exponents. Of the key's distance from the lower one,
  // nine bits at a time, from the top: a histogram of the digit, walked down from its largest value.
  __device__ uint32_t select(uint32_t bin, bool by_count, uint64_t need) {
    const float eighth = div(0.125f, scale_);
    const float lowest = sub(max_, mul(mul(static_cast<float>(bin) + 0.5f, eighth), 1.000002f));
    const float highest = sub(max_, mul(mul(static_cast<float>(bin) - 0.5f, eighth), 0.999998f));
    const uint32_t low = (key(lowest) - 2) >> kConstantBits<T>, high = (key(highest) + 2) >> kConstantBits<T>;
    uint32_t prefix = 0;
    u64 kept = 0, within = shared_.bins[bin];
    for (int left = 32 - __clz(high - low); left > 0;) {
      const int take = min(left, kDigitBits), shift = left - take;
      for (int i = threadIdx.x; i < 3 * kDigits; i += kThreads) cells_[i] = 0;  // low, high and count
      __syncthreads();
      for_each_vector([&](int, const Vec<T> &vec) {
#pragma unroll
        for (const T element : vec.value) {
          const float z = to_float(element);
          const Weight weight = sampling::weigh(exponent_of(z, max_, scale_));
          if (weight.bin != bin) continue;
          const uint32_t digits = ((key(z) >> kConstantBits<T>)-low) >> shift;
          if (digits >> take != prefix) continue;
          const uint32_t digit = digits & ((1u << take) - 1);
          atomicAdd(scratch_.low + digit, weight.m & ((1u << kLimbBits) - 1));
          atomicAdd(scratch_.high + digit, weight.m >> kLimbBits);
          if (by_count) atomicAdd(scratch_.count + digit, 1u);
        }
      });
      __syncthreads();
      const int mine = threadIdx.x;
      u64 entry = 0;
      if (mine < kDigits) {
        entry =
            scratch_.low[mine] + (u64{scratch_.high[mine]} << kLimbBits) + (u64{scratch_.count[mine]} << kCountShift);
      }
      share<kDigits>(entry, scratch_.slots, scratch_.digits);
      const u64 descending = mine < kDigits ? scratch_.digits[kDigits - 1 - mine] : 0;
      const Crossing at = cross(descending, need, by_count ? Field{~kSumMask, kCountShift} : Field{kSumMask, 0});
      const uint32_t digit = kDigits - 1 - at.thread;
      within = scratch_.digits[digit];
      kept += at.before;
      need -= by_count ? count_of(at.before) : sum_of(at.before);
      prefix = prefix << take | digit;
      left = shift;
    }
    selected_ = {bin, (prefix + low) << kConstantBits<T>, sum_of(kept + within)};
    return selected_.key;
  }

  __device__ uint64_t kept_sum(const Kept &kept) {
    if (kept.bin == selected_.bin && kept.key == selected_.key && kept.exponent == -64.0f) return selected_.sum;
    u64 sum = 0;
    for_each_vector([&](int, const Vec<T> &vec) { sum += weight_of(kept, kept.bin, vec); });
    const u64 *parts = gather(block_total(sum));
    sum = 0;
    for (uint32_t i = 0; i < blocks_; ++i) sum += parts[i];
    return sum;
  }

  // In the block that holds the token; the others are not to store what they return.
  __device__ Picked pick(const Kept &kept, uint32_t bin, uint64_t need) {
    const int chunks = (vectors_ + 31) / 32;
    for (int chunk = warp(); chunk < chunks; chunk += kWarps) {
      const int v = chunk * 32 + lane();
      const uint32_t sum = __reduce_add_sync(kAll, v < vectors_ ? weight_of(kept, bin, vector(v)) : 0);
      if (lane() == 0) scratch_.chunk_sums[chunk] = sum;
    }
    __syncthreads();
    const u64 mine = static_cast<int>(threadIdx.x) < chunks ? scratch_.chunk_sums[threadIdx.x] : 0;
    const u64 *parts = gather(block_total(mine));
    u64 before = 0;
    for (uint32_t i = 0; i < rank_; ++i) before += parts[i];
    writes_ = before < need && need - before <= parts[rank_];
    if (!writes_) return {0, 0};

    const Crossing at = cross(mine, need - before);
    if (warp() == 0) {
      const int v = at.thread * 32 + lane();
      uint32_t left = static_cast<uint32_t>(need - before - at.before);
      const uint32_t weight = v < vectors_ ? weight_of(kept, bin, vector(v)) : 0;
      uint32_t running = weight;
#pragma unroll
      for (int offset = 1; offset < 32; offset <<= 1) {
        const uint32_t below = __shfl_up_sync(kAll, running, offset);
        if (lane() >= offset) running += below;
      }
      if (running - weight < left && left <= running) {
        left -= running - weight;
        int i = 0;
        uint32_t m = weight_in(kept, bin, to_float(part_[v].value[0]));
        for (uint32_t sum = m; sum < left; sum += m) m = weight_in(kept, bin, to_float(part_[v].value[++i]));
        shared_.picked = {static_cast<int64_t>(first_ + v) * kSize + i - lead_, m};
      }
    }
    __syncthreads();
    return shared_.picked;
  }

 private:
  static constexpr int kBatch = 4;

  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ static int warp() { return threadIdx.x / 32; }

  // Whether place i of the aligned row is a token's.
  __device__ bool holds(int i) const { return static_cast<uint32_t>(i - lead_) < static_cast<uint32_t>(vocab_); }

  // Whether the part's vector v holds nothing but tokens.
  __device__ bool is_whole(int v) const {
    const int begin = (first_ + v) * kSize;
    return holds(begin) && holds(begin + kSize - 1);
  }

  // The vectors v, v + kThreads, ... of the part, where whole.
  __device__ __forceinline__ void fetch(int v, Vec<T> (&batch)[kBatch]) const {
#pragma unroll
    for (int i = 0; i < kBatch; ++i, v += kThreads) {
      if (v < vectors_ && is_whole(v)) batch[i] = load_vec(z_ + (first_ + v) * kSize);
    }
  }

  // The part's vector v, at an end of the row: what is no token becomes -inf.
  __device__ void load_edge(int v) {
    if (v < 0 || v >= vectors_ || v % kThreads != static_cast<int>(threadIdx.x) || is_whole(v)) return;
    T *to = reinterpret_cast<T *>(part_ + v);
    const int begin = (first_ + v) * kSize;
#pragma unroll 1
    for (int i = 0; i < kSize; ++i) to[i] = holds(begin + i) ? z_[begin + i] : from_float<T>(-INFINITY);
    largest_.add(vector(v));
  }

  __device__ Vec<T> vector(int v) const { return load_vec(reinterpret_cast<const T *>(part_ + v)); }

  // f(v, vector) over the part; a thread sees the vectors that it loaded.
  template <typename F>
  __device__ __forceinline__ void for_each_vector(F &&f) const {
#pragma unroll 1
    for (int v = threadIdx.x; v < vectors_; v += kThreads) f(v, vector(v));
  }

  // f(index, logit) over the part, less what is no token.
  template <typename F>
  __device__ __forceinline__ void for_each_token(F &&f) const {
    for_each_vector([&](int v, const Vec<T> &vec) {
      const int begin = (first_ + v) * kSize;
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        if (holds(begin + j)) f(begin + j - lead_, to_float(vec.value[j]));
      }
    });
  }

  __device__ __forceinline__ void add_weights(bool with_counts) const {
    uint32_t *column = cells_ + lane(), *counts = counts_ + lane();
    for_each_vector([&](int, const Vec<T> &vec) {
#pragma unroll
      for (const T element : vec.value) {
        const Weight weight = sampling::weigh(exponent_of(to_float(element), max_, scale_));
        if (weight.bin == kExcluded) continue;
        atomicAdd(column + weight.bin * kColumns, weight.m);
        if (with_counts) atomicAdd(counts + weight.bin / 2 * kColumns, 1u << weight.bin % 2 * 16);
      }
    });
  }

  // m of a token that belongs to `bin` and is kept, else 0.
  __device__ uint32_t weight_in(const Kept &kept, uint32_t bin, float z) const {
    const float exponent = exponent_of(z, max_, scale_);
    const Weight weight = sampling::weigh(exponent);
    return weight.bin == bin && kept.holds(bin, key(z), exponent) ? weight.m : 0;
  }

  __device__ __forceinline__ uint32_t weight_of(const Kept &kept, uint32_t bin, const Vec<T> &vec) const {
    uint32_t sum = 0;
#pragma unroll
    for (const T element : vec.value) sum += weight_in(kept, bin, to_float(element));
    return sum;
  }

  // Gives every block the row's totals of kEntries entries, of which thread i of each block has the i-th in `mine`.
  // A block sums every blocks_-th entry from what the others push to its slots and pushes the totals to all.
  template <int kEntries>
  __device__ void share(u64 mine, u64 *slots, u64 *totals) {
    const int thread = threadIdx.x, log = __ffs(blocks_) - 1, to = thread & (blocks_ - 1), entry = thread >> log;
    if (thread < kEntries) store_at_rank(slots + rank_ * (kEntries >> log) + entry, to, mine);
    cluster_sync();
    if (thread < kEntries) {
      u64 total = 0;
      for (uint32_t i = 0; i < blocks_; ++i) total += slots[i * (kEntries >> log) + entry];
      store_at_rank(totals + (entry << log) + rank_, to, total);
    }
    cluster_sync();
  }

  // Every block's value, by rank. The next gather but one overwrites them.
  __device__ const u64 *gather(u64 mine) {
    gathers_ ^= 1;
    u64 *parts = shared_.parts[gathers_];
    if (threadIdx.x < blocks_) store_at_rank(parts + rank_, threadIdx.x, mine);
    cluster_sync();
    return parts;
  }

  // Where warps leave values for the block's next barrier. The next use but one overwrites them.
  __device__ u64 *next_of_warp() {
    uses_ ^= 1;
    return shared_.of_warp[uses_];
  }

  __device__ uint32_t row_max(uint32_t value) {
    u64 *of_warp = next_of_warp();
    value = __reduce_max_sync(kAll, value);
    if (lane() == 0) of_warp[warp()] = value;
    __syncthreads();
    value = __reduce_max_sync(kAll, lane() < kWarps ? static_cast<uint32_t>(of_warp[lane()]) : 0);
    const u64 *parts = gather(value);
    return __reduce_max_sync(kAll, lane() < static_cast<int>(blocks_) ? static_cast<uint32_t>(parts[lane()]) : 0);
  }

  __device__ u64 block_total(u64 value) { return block_sum<kWarps>(value, next_of_warp()); }

  // The thread at which the running total of field(weight), by thread index, reaches need (from 1 to the total).
  __device__ Crossing cross(u64 weight, u64 need, Field field = {}) {
    block_cross<kWarps>(weight, need, field, next_of_warp(), &shared_.crossing);
    return shared_.crossing;
  }

  struct Selected {
    uint32_t bin = kBins, key = 0;
    uint64_t sum = 0;
  };

  const int vocab_, lead_;  // lead_: places of the aligned row before its first token
  const uint32_t rank_, blocks_;
  Shared &shared_;
  uint32_t *cells_, *counts_;
  Scratch &scratch_;
  Vec<T> *part_;
  const T *z_;
  int first_, vectors_;  // of the aligned row's vectors
  bool writes_;
  Largest<T> largest_;
  float max_ = 0, scale_ = 0;
  Selected selected_;
  uint32_t gathers_ = 0, uses_ = 0;
};

#endif  // GQA_SAMPLE_SM90

template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads, 1024 / kThreads) sample_cluster(const gqa_sample_params p) {
#ifdef GQA_SAMPLE_SM90
  extern __shared__ __align__(16) uint32_t cluster_cells[];
  __shared__ Shared shared;
  cluster_arrive_release();
  const int64_t at = blockIdx.x / cluster_size();
  const T *z = static_cast<const T *>(p.logits) + at * p.logits_stride;
  ClusterRow<T, kThreads> row(z, static_cast<int>(p.vocab), &shared, cluster_cells);
  row.load([&] {
    if (threadIdx.x == kThreads - 32) shared.settings = load_settings(p, at);
  });
  const Drawn drawn = draw(row, shared.settings, p.vocab);
  if (!row.writes() || threadIdx.x != 0) return;
  p.ids[at] = drawn.id;
  if (p.valid != nullptr) p.valid[at] = drawn.valid;
  if (p.logprob != nullptr) p.logprob[at] = drawn.logprob();
#else
  __trap();
#endif
}

template <typename T, int kThreads>
gqa_status launch_cluster(const gqa_sample_params &p, const gqa_launch &plan, cudaStream_t stream) {
  const auto kernel = sample_cluster<T, kThreads>;
  const void *function = reinterpret_cast<const void *>(kernel);
  log_launch(plan);
  GQA_RETURN_IF_ERROR(
      check_cuda(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_memory)));
  if (plan.variant > 8) {
    GQA_RETURN_IF_ERROR(check_cuda(cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1)));
  }
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = plan.variant;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(plan.grid[0]);
  config.blockDim = dim3(plan.block[0]);
  config.dynamicSmemBytes = plan.shared_memory;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return check_cuda(cudaLaunchKernelEx(&config, kernel, p));
}

}  // namespace

gqa_status launch_sample_cluster(const gqa_sample_params &p, const gqa_launch &plan, cudaStream_t stream) {
  return dispatch_float(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return plan.block[0] == 512 ? launch_cluster<T, 512>(p, plan, stream) : launch_cluster<T, 1024>(p, plan, stream);
  });
}

}  // namespace gqa::cuda
