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

constexpr int64_t kMaxCodedRank = 64;

// Where a part of a coded unit is: page of the unit's, or -1 if there is no such part, and bytes
// from its beginning.
struct CodedPart {
  int64_t page, offset;
};

// Keys or values of a coded unit, of each head as lines of evenly spaced levels; see
// KVCodec.level_bits.
struct CodedLines {
  int64_t bits;                        // of a level: 1, 2, 4 or 8
  int64_t lines, length;               // [heads, lines, length]
  int64_t groups;                      // of a line: entries that share a step and a lowest value
  int64_t rank;                        // of the matrix that is added; 0: none
  int64_t kept;                        // entries of a line that are stored as they are
  CodedPart levels;                    // [heads, lines, length * bits / 8], lowest bits first
  CodedPart steps;                     // fp16 [heads, lines, groups, 2]: step and lowest value
  CodedPart left, right;               // fp16 [heads, lines, rank] and [heads, rank, length]
  CodedPart places, outliers;          // int16 and fp16 [heads, lines, kept]
};

// Queries of one row that share a KV head, and the coded units that all of them see. A line of the
// keys is a channel, and of the values a slot.
struct CodedTask {
  const uint16_t* q;  // bf16, not rotated: of the first query and head
  int64_t q_stride, q_head_stride;
  const uint16_t *cos, *sin;  // [queries, width / 2]
  int64_t queries, ratio, width;
  float scale, softcap;
  const CodedLines *keys, *values;
  int64_t slots;  // of a unit
  int64_t head;
  const std::byte* pages;
  int64_t page_bytes;
  const int32_t* table;  // [units, unit_pages]
  int64_t units, unit_pages;
  float* partial;  // receives normalized fp32 [queries * ratio, width]
  float* lse;      // [queries * ratio]
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
  bool onto;  // what `out` and `lse` hold is a part as well
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
  size_t (*coded_scratch)(const CodedTask& task);
  void (*attend_coded)(const CodedTask& task, std::byte* scratch);
};

}  // namespace headrace
