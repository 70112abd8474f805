// The attention kernels of an instruction set: each function is the part of an operation that one
// thread does.
#pragma once

#include <cstddef>
#include <cstdint>

namespace headrace {

constexpr int64_t kKeyBlock = 64;       // slots that are attended to at once
constexpr int64_t kMaxHeadWidth = 512;  // widest entry of a head

// One plane of a layer's cache: entries [width] of bf16 or int8, in a strip [block_size, width] per
// head and page.
struct PlaneView {
  std::byte* pages;
  int64_t page_bytes;
  int64_t block_size;
  const int64_t* offsets;        // bytes from a page's beginning to the strip of each head
  const int64_t* scale_offsets;  // of the fp32 scales [block_size] of int8 entries, or null
};

// Rotation of q and k, and where k and v go. All tensors are bf16, strides in elements.
struct StoreCall {
  int64_t heads, kv_heads, width;
  const uint16_t *q, *k, *v;
  int64_t q_stride, k_stride, v_stride;                 // from token to token
  int64_t q_head_stride, k_head_stride, v_head_stride;  // from head to head
  const uint16_t *cos, *sin;                            // [T, width / 2]
  int64_t tokens;
  uint16_t* rotated;  // receives q, [kv_heads, T, heads / kv_heads, width]
  PlaneView keys, values;
  const int64_t* head_group;  // [kv_heads]
  const int32_t* pages;       // [G, T]: page that each token's entry goes to
  const int32_t* slots;       // [G, T]: slot in it
};

// Queries of one row that share a KV head, and the slots that they attend to.
struct AttentionTask {
  // [rows, width]; `ratio` rows (query heads) per query. Fifteen rows more may be read.
  const uint16_t* q;
  int64_t rows, ratio, width;
  int64_t first_slot;  // slot of the first query; each sees up to its own slot
  int64_t window;      // the last so many slots; 0: all
  bool causal;         // else each sees all slots of the row
  float scale;
  float softcap;  // limit of the scores, which approach it along a hyperbolic tangent; 0: none
  PlaneView keys, values;
  int64_t head;
  const int32_t* table;
  int64_t begin, end;  // slots of this task
  // Result: bf16 if the task is whole, else normalized fp32 [rows, width] that is to be merged.
  uint16_t* out;       // query i and head g at i * out_stride + g * width
  int64_t out_stride;
  float* lse;  // at i * lse_stride + g
  int64_t lse_stride;
  float* partial;
  float* sums;  // [end - begin]: score sums, to which those of the queries are added
};

// Parts of the same queries over different slots.
struct MergeCall {
  int64_t parts, rows, stride, ratio, width;
  const float* partial;      // [parts, stride, width]; `rows` of `stride` are used
  const float* partial_lse;  // [parts, stride]
  uint16_t* out;
  int64_t out_stride;
  float* lse;
  int64_t lse_stride;
};

struct AttentionKernels {
  // Rotate and store tokens [begin, end).
  void (*store)(const StoreCall& call, int64_t begin, int64_t end);
  // Bytes of scratch that one thread needs for `attend` and `sum_scores`.
  size_t (*scratch)(int64_t rows, int64_t width);
  void (*attend)(const AttentionTask& task, std::byte* scratch);
  // Add to `sums` what each slot got, given the log-sum-exp of the queries.
  void (*sum_scores)(const AttentionTask& task, std::byte* scratch);
  void (*merge)(const MergeCall& call);
};

}  // namespace headrace
