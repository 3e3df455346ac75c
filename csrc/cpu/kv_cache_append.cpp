// CPU twin of kv_cache_append. A row of work is one new token under all heads.
#include "cpu/kv_cache_append.h"

#include "plan/kv_cache_append.h"

namespace gqa::cpu {
namespace {

template <typename T>
void append_rows(const gqa_kv_cache_append_params *p, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const int64_t b = row / p->seqlen, i = row % p->seqlen;
    const Sequence s = load_sequence(*p, b);
    if (i >= s.k_len) continue;
    for (int64_t head = 0; head < p->num_kv_heads; ++head) {
      append_row<T>(*p, p->cu_seqlens.data != nullptr, s, b, i, head);
    }
  }
}

}  // namespace
}  // namespace gqa::cpu

extern "C" gqa_status gqa_kv_cache_append_cpu(const gqa_kv_cache_append_params *p, int64_t first_row,
                                              int64_t last_row) {
  GQA_RETURN_IF_ERROR(gqa::check_params(p));
  return gqa::cpu::dispatch_float(
      p->dtype, [&](auto tag) { gqa::cpu::append_rows<typename decltype(tag)::type>(p, first_row, last_row); });
}
