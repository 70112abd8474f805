// Attention over pages: how the work of a step is divided among threads.
#pragma once

#include <cstdint>
#include <vector>

#include "context.h"

namespace headrace {

// The planes of one layer. `key_scales` and `value_scales` are empty unless entries are int8.
struct LayerCache {
  LayerCache(uintptr_t pages, int64_t page_bytes, int64_t block_size, int64_t width,
             std::vector<int64_t> keys, std::vector<int64_t> values,
             std::vector<int64_t> key_scales, std::vector<int64_t> value_scales);

  int64_t kv_heads() const { return static_cast<int64_t>(key_offsets.size()); }
  PlaneView keys() const { return view(key_offsets, key_scale_offsets); }
  PlaneView values() const { return view(value_offsets, value_scale_offsets); }

  std::byte* pages;
  int64_t page_bytes, block_size, width;
  std::vector<int64_t> key_offsets, value_offsets, key_scale_offsets, value_scale_offsets;

 private:
  PlaneView view(const std::vector<int64_t>& offsets, const std::vector<int64_t>& scales) const;
};

// The rows of a step; see StepShape in ops/paged.py. The arrays are copied.
struct StepRows {
  StepRows(int64_t rows, int64_t groups, int64_t pages, int64_t kv_heads, int64_t block_size,
           uintptr_t lengths, uintptr_t past, uintptr_t tables, uintptr_t head_group);

  int64_t context(int64_t group, int64_t row) const {
    return past[group * rows + row] + lengths[row];
  }
  const int32_t* table(int64_t group, int64_t row) const {
    return tables.data() + (group * rows + row) * pages;
  }

  int64_t rows, groups, pages, block_size, tokens;
  std::vector<int64_t> lengths, starts;          // [R]: queries, and the place of the first
  std::vector<int64_t> past, score_starts;       // [G, R]
  std::vector<int32_t> tables;                   // [G, R, pages]
  std::vector<int64_t> head_group;               // [kv_heads]
  std::vector<int32_t> token_pages, token_slots; // [G, T]
};

}  // namespace headrace
