// sample: one token per row, by the definition of common/sampling.h; the same token as the CPU twin's.
// One block per row. Threads stride over the row's 16-byte vectors; a warp owns a stretch of it where order matters.
// Memory order: the row, and penalties, bias and bitmask with it, once for the largest logit, once for the bins, 3 or 4
// times each for top-k and top-p, once for min-p, once for the token, all but the first from L2. Bins: 64 columns.
// Limits: vocab <= 2^18; any alignment and row stride. Sorts nothing. 95 KB of shared memory.
// Determinism: integer sums, so any order gives the same bytes; rows do not see each other.
#include "plan/sample.h"

#include <type_traits>

#include "common/sampling_draw.h"
#include "cuda/common/launch.cuh"
#include "cuda/common/sample_sm90.cuh"
#include "cuda/common/vec.cuh"

namespace gqa::cuda {
namespace {

using namespace gqa::sampling;
using u64 = unsigned long long;

constexpr int kThreads = kSampleThreads;
constexpr int kWarps = kThreads / 32;
constexpr int kColumns = kSampleColumns;
constexpr int kDigits = 2 * kThreads;  // digits of the key told apart in one round of select
constexpr int kDigitBits = 11;
constexpr int kLimbBits = 10;  // sums of m in two words: 2^18 tokens of 10 bits each fit 32 bits
static_assert(kWarps == 32);
static_assert(kDigits == 1 << kDigitBits && 2 * kDigits <= static_cast<int>(kBins + 1) * kColumns);

// Upper bits of the key that can differ: below them, logits widened from 16 bits agree.
template <typename T, bool kAdjusted>
constexpr int kKeyBits = kAdjusted || sizeof(T) == 4 ? 32 : (std::is_same_v<T, __half> ? 19 : 16);

__device__ __forceinline__ u64 warp_sum(u64 value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

struct Crossing {
  int thread;
  u64 before;
};

struct Shared {
  u64 sums[kBins];
  uint32_t counts[kBins];
  u64 of_warp[kWarps];
  Crossing crossing;
  Picked picked;
};

// kAdjusted: with penalties, a bias or a bitmask.
template <typename T, bool kAdjusted>
class Row : public Filters<Row<T, kAdjusted>> {
 public:
  __device__ Row(const T *z, int vocab, const Adjustments<T> *by, Shared *shared, uint32_t *cells)
      : z_(z), vocab_(vocab), by_(*by), shared_(*shared), cells_(cells) {}

  __device__ Top top() {
    uint32_t largest = 0;
    bool nan = false;
    for_each(0, vocab_, threadIdx.x, kThreads, [&](int, float z) {
      const uint32_t of = key(z);
      nan = nan || of == 0;
      largest = max(largest, of);
    });
    largest = __reduce_max_sync(0xffffffffu, largest);
    if (lane() == 0) shared_.of_warp[warp()] = largest;
    const bool has_nan = __syncthreads_or(nan);
    largest = __reduce_max_sync(0xffffffffu, static_cast<uint32_t>(shared_.of_warp[lane()]));
    __syncthreads();
    return {largest, has_nan};
  }

  __device__ int64_t first(uint32_t of) {
    int index = vocab_;
    for_each(0, vocab_, threadIdx.x, kThreads, [&](int i, float z) { index = key(z) == of ? min(index, i) : index; });
    index = __reduce_min_sync(0xffffffffu, index);
    if (lane() == 0) shared_.of_warp[warp()] = index;
    __syncthreads();
    return __reduce_min_sync(0xffffffffu, static_cast<uint32_t>(shared_.of_warp[lane()]));
  }

  __device__ void weigh(float max, float scale, bool counts) {
    max_ = max;
    scale_ = scale;
    for (int i = threadIdx.x; i < static_cast<int>(kBins) * kColumns; i += kThreads) cells_[i] = 0;
    for (int i = threadIdx.x; i < static_cast<int>(kBins); i += kThreads) shared_.counts[i] = 0;
    __syncthreads();
    uint32_t *column = cells_ + threadIdx.x % kColumns;
    for_each(0, vocab_, threadIdx.x, kThreads, [&](int, float z) {
      const Weight weight = sampling::weigh(exponent_of(z, max_, scale_));
      if (weight.bin == kExcluded) return;
      atomicAdd(column + weight.bin * kColumns, weight.m);
      if (counts) atomicAdd(shared_.counts + weight.bin, 1u);
    });
    __syncthreads();
    for (int bin = warp(); bin < static_cast<int>(kBins); bin += kWarps) {
      const uint32_t *cell = cells_ + bin * kColumns + lane();
      const u64 sum = warp_sum(u64{cell[0]} + cell[32]);
      if (lane() == 0) shared_.sums[bin] = sum;
    }
    __syncthreads();
  }

  __device__ uint64_t sum(uint32_t bin) const { return shared_.sums[bin]; }
  __device__ uint64_t count(uint32_t bin) const { return shared_.counts[bin]; }

  template <typename F>
  __device__ uint64_t total(F &&weight) {
    return block_total(threadIdx.x < kBins ? weight(threadIdx.x) : 0);
  }

  template <typename F>
  __device__ Found find(F &&weight, uint64_t need) {
    const Crossing at = cross(threadIdx.x < kBins ? weight(threadIdx.x) : 0, need);
    return {static_cast<uint32_t>(at.thread), at.before};
  }

  // Eleven bits of the key at a time, from the top: a histogram of the digit, walked down from its largest value.
  __device__ uint32_t select(uint32_t bin, bool by_count, uint64_t need) {
    constexpr int kConstantBits = 32 - kKeyBits<T, kAdjusted>;
    uint32_t prefix = 0;
    for (int left = kKeyBits<T, kAdjusted>; left > 0;) {
      const int take = left < kDigitBits ? left : kDigitBits;
      const int shift = left - take;
      for (int i = threadIdx.x; i < 2 * kDigits; i += kThreads) cells_[i] = 0;
      __syncthreads();
      for_each(0, vocab_, threadIdx.x, kThreads, [&](int, float z) {
        const Weight weight = sampling::weigh(exponent_of(z, max_, scale_));
        const u64 digits = key(z) >> kConstantBits >> shift;
        if (weight.bin != bin || digits >> take != prefix) return;
        const uint32_t digit = digits & ((1u << take) - 1);
        const uint32_t w = by_count ? 1 : weight.m;
        atomicAdd(cells_ + digit, w & ((1u << kLimbBits) - 1));
        if (!by_count) atomicAdd(cells_ + kDigits + digit, w >> kLimbBits);
      });
      __syncthreads();
      const int last = kDigits - 1;
      const Crossing at = cross(digit_sum(last - 2 * threadIdx.x) + digit_sum(last - 2 * threadIdx.x - 1), need);
      int digit = last - 2 * at.thread;
      need -= at.before;
      if (digit_sum(digit) < need) need -= digit_sum(digit--);
      prefix = prefix << take | digit;
      left = shift;
      __syncthreads();
    }
    return prefix << kConstantBits;
  }

  __device__ uint64_t kept_sum(const Kept &kept) {
    u64 sum = 0;
    for_each(0, vocab_, threadIdx.x, kThreads, [&](int, float z) { sum += weight_in(kept, kept.bin, z); });
    return block_total(sum);
  }

  __device__ Picked pick(const Kept &kept, uint32_t bin, uint64_t need) {
    const int stretch = (vocab_ + kWarps - 1) / kWarps;
    u64 sum = 0;
    for_each(min(warp() * stretch, vocab_), min((warp() + 1) * stretch, vocab_), lane(), 32,
             [&](int, float z) { sum += weight_in(kept, bin, z); });
    sum = warp_sum(sum);
    const Crossing in_row = cross(lane() == 0 ? sum : 0, need);
    need -= in_row.before;

    const int start = in_row.thread / 32 * stretch, end = min(start + stretch, vocab_);
    const int share = (stretch + kThreads - 1) / kThreads;
    const int first = min(start + static_cast<int>(threadIdx.x) * share, end), last = min(first + share, end);
    sum = 0;
    for (int i = first; i < last; ++i) sum += weight_in(kept, bin, logit(i));
    const Crossing in_stretch = cross(sum, need);
    need -= in_stretch.before;
    if (static_cast<int>(threadIdx.x) == in_stretch.thread) {
      uint32_t m = 0;
      int i = first - 1;
      for (sum = 0; sum < need; sum += m) {
        ++i;
        m = weight_in(kept, bin, logit(i));
      }
      shared_.picked = {i, m};
    }
    __syncthreads();
    return shared_.picked;
  }

 private:
  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ static int warp() { return threadIdx.x / 32; }

  __device__ __forceinline__ float logit(int i) const {
    const float z = to_float(z_[i]);
    if constexpr (!kAdjusted) return z;
    const int32_t count = by_.counts == nullptr ? 0 : by_.counts[i];
    const float bias = by_.bias == nullptr ? 0.0f : by_.with_bias([&](auto *of) { return to_float(of[i]); });
    return adjust(z, count, by_.penalties, bias, by_.is_allowed(i));
  }

  // f(index, logit) over [begin, end), divided among `threads` of which this is number `thread`.
  template <typename F>
  __device__ __forceinline__ void for_each(int begin, int end, int thread, int threads, F &&f) const {
    if constexpr (kAdjusted) {  // neighbours to neighbouring threads, whatever the alignment of each tensor
#pragma unroll 4
      for (int i = begin + thread; i < end; i += threads) f(i, logit(i));
      return;
    }
    constexpr int kSize = Vec<T>::kSize;
    const int misaligned = reinterpret_cast<uintptr_t>(z_ + begin) % 16 / sizeof(T);
    const int body = min(begin + (kSize - misaligned) % kSize, end);
    const int vectors = (end - body) / kSize;
    const int tail = body + vectors * kSize;
    for (int i = begin + thread; i < body; i += threads) f(i, logit(i));
    Vec<T> next;
    if (thread < vectors) next = load_vec(z_ + body + thread * kSize);
    for (int v = thread; v < vectors; v += threads) {
      const Vec<T> vec = next;
      if (v + threads < vectors) next = load_vec(z_ + body + (v + threads) * kSize);
#pragma unroll
      for (int i = 0; i < kSize; ++i) f(body + v * kSize + i, to_float(vec.value[i]));
    }
    for (int i = tail + thread; i < end; i += threads) f(i, logit(i));
  }

  // m of a token that belongs to `bin` and is kept, else 0.
  __device__ uint32_t weight_in(const Kept &kept, uint32_t bin, float z) const {
    const float exponent = exponent_of(z, max_, scale_);
    const Weight weight = sampling::weigh(exponent);
    return weight.bin == bin && kept.holds(bin, key(z), exponent) ? weight.m : 0;
  }

  __device__ u64 digit_sum(int digit) const { return cells_[digit] + (u64{cells_[kDigits + digit]} << kLimbBits); }

  __device__ u64 block_total(u64 value) {
    value = warp_sum(value);
    if (lane() == 0) shared_.of_warp[warp()] = value;
    __syncthreads();
    u64 sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += shared_.of_warp[w];
    __syncthreads();
    return sum;
  }

  // The thread at which the running total of `weight`, by thread index, reaches need (from 1 to the total).
  __device__ Crossing cross(u64 weight, u64 need) {
    u64 running = weight;
#pragma unroll
    for (int offset = 1; offset < 32; offset <<= 1) {
      const u64 below = __shfl_up_sync(0xffffffffu, running, offset);
      if (lane() >= offset) running += below;
    }
    if (lane() == 31) shared_.of_warp[warp()] = running;
    __syncthreads();
    u64 before = running - weight;
    for (int w = 0; w < warp(); ++w) before += shared_.of_warp[w];
    if (before < need && need - before <= weight) shared_.crossing = {static_cast<int>(threadIdx.x), before};
    __syncthreads();
    return shared_.crossing;
  }

  const T *z_;
  int vocab_;
  const Adjustments<T> &by_;  // in shared memory: registers are for the passes
  float max_ = 0, scale_ = 0;
  Shared &shared_;
  uint32_t *cells_;  // [kBins][kColumns] or, in select, [2][kDigits]
};

template <typename T, bool kAdjusted>
__global__ void __launch_bounds__(kThreads, 1) sample_row(const gqa_sample_params p, const Settings of_call) {
  extern __shared__ uint32_t cells[];
  __shared__ Shared shared;
  __shared__ Adjustments<T> by;
  const int64_t at = blockIdx.x;
  if constexpr (kAdjusted) {
    if (threadIdx.x == 0) by = load_adjustments<T>(p, at);
    __syncthreads();
  }
  const T *z = static_cast<const T *>(p.logits) + at * p.logits_stride;
  Row<T, kAdjusted> row(z, static_cast<int>(p.vocab), &by, &shared, cells);
  const Drawn drawn = draw(row, load_settings(p, of_call, at), load_random(p, at), p.vocab);
  if (threadIdx.x != 0) return;
  p.ids[at] = drawn.id;
  if (p.valid != nullptr) p.valid[at] = drawn.valid;
  if (p.logprob != nullptr) p.logprob[at] = drawn.logprob();
}

}  // namespace
}  // namespace gqa::cuda

extern "C" gqa_status gqa_sample_cuda(const gqa_sample_params *p, CUstream_st *stream) {
  GQA_RETURN_IF_ERROR(gqa::check_params(p));
  if (p->rows == 0) return GQA_STATUS_OK;
  gqa_plan plan;
  gqa_device device;
  GQA_RETURN_IF_ERROR(gqa::cuda::current_device(&device));
  GQA_RETURN_IF_ERROR(gqa_sample_plan(p, &device, &plan));
  if (plan.launches[0].variant != 0) {
    const bool greedy = plan.launches[0].shared_memory == 0;
    return greedy ? gqa::cuda::launch_sample_greedy(*p, plan.launches[0], stream)
                  : gqa::cuda::launch_sample_cluster(*p, plan.launches[0], stream);
  }
  return gqa::cuda::dispatch_float(p->dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto kernel =
        gqa::sampling::is_adjusted(*p) ? gqa::cuda::sample_row<T, true> : gqa::cuda::sample_row<T, false>;
    return gqa::cuda::launch(kernel, plan.launches[0], stream, *p, gqa::sampling::settings_of(*p));
  });
}
