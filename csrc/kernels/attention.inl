// FlashAttention over pages: blocks of keys are packed for the matrix product, scores are turned
// into probabilities, and values are added up. The queries of all heads that share a KV head are
// the rows of one product.

INLINE int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

#include "attention_store.inl"
#include "attention_pack.inl"

// The working memory of a thread.
struct AttentionScratch {
  std::byte* copies[4];   // of entries that do not lie in one piece: keys and values, two blocks
  uint16_t* keys;         // panels of sixteen keys
  uint16_t* values;       // panels of sixteen columns
  float* scores;          // [rows, kKeyBlock]
  uint16_t* probability;  // [rows, kKeyBlock]
  float* sums;            // [rows, kPanel]: of probabilities, in sixteen parts
  float* highest;         // [rows]: running maxima
  float* result;          // [rows, columns]
};

// The parts of some memory; returns its size.
static size_t carve(int64_t rows, int64_t width, uintptr_t at, AttentionScratch& out) {
  const uintptr_t begin = at;
  const int64_t columns = round_up(width, kChunk);
  const auto take = [&](auto*& pointer, int64_t count) {
    pointer = reinterpret_cast<decltype(pointer + 0)>(at);
    at += (count * sizeof(*pointer) + 63) / 64 * 64;
  };
  for (auto& copies : out.copies) take(copies, kKeyBlock * width * 2);
  take(out.keys, round_up(width, 32) * kKeyBlock);
  take(out.values, columns * kKeyBlock);
  take(out.scores, rows * kKeyBlock);
  take(out.probability, rows * kKeyBlock);
  take(out.sums, rows * kPanel);
  take(out.highest, rows);
  take(out.result, rows * round_up(width, 64));
  return at - begin;
}

// Rows of products: where a tile is quicker than what would be left of it, those behind the last
// are anything, and nobody asks for their results.
INLINE int64_t product_rows(int64_t rows) {
#if HEADRACE_LEVEL >= 4
  return round_up(rows, kTileRows);
#else
  return rows;
#endif
}

static size_t attention_scratch(int64_t rows, int64_t width) {
  AttentionScratch unused;
  return carve(product_rows(rows), width, 0, unused);
}

#include "attention_softmax.inl"
#if HEADRACE_LEVEL >= 2
#include "attention_few.inl"
#endif

// Products of all rows and a block of keys.
static void multiply_keys(const AttentionTask& task, const KeyBlock& block, const KeyBlock* next,
                          const AttentionScratch& scratch) {
  if (task.keys.scale_offsets != nullptr)
    pack_keys<true>(block, next, task.width, scratch.keys);
  else
    pack_keys<false>(block, next, task.width, scratch.keys);
  multiply_bf16(product_rows(task.rows), (block.count + kPanel - 1) / kPanel, task.width / 2, task.q,
                task.width, scratch.keys, task.width * kPanel, scratch.scores, kKeyBlock, false);
}

// The gathered results, divided by the sums; `column` finds each in the order of the products.
template <class Column>
INLINE void write_result(const AttentionTask& task, const AttentionScratch& scratch,
                         int64_t columns, const Column& column) {
  for (int64_t row = 0; row < task.rows; ++row) {
    float sum = 0;
    for (int64_t lane = 0; lane < kPanel; ++lane) sum += scratch.sums[row * kPanel + lane];
    // Without a slot to see there is nothing to weigh; NaN stays.
    const float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
    const float lse = sum == 0.0f ? -kInfinity
                                  : (scratch.highest[row] + binary_logarithm(sum)) * kLn2;
    const float* result = scratch.result + row * columns;
    const int64_t query = row / task.ratio, head = row % task.ratio;
    if (task.partial != nullptr) {
      task.lse[row] = lse;
      float* out = task.partial + row * task.width;
      for (int64_t d = 0; d < task.width; ++d) out[d] = result[column(d)] * factor;
    } else {
      task.lse[query * task.lse_stride + head] = lse;
      uint16_t* out = task.out + query * task.out_stride + head * task.width;
      for (int64_t d = 0; d < task.width; ++d) out[d] = to_bf16(result[column(d)] * factor);
    }
  }
}

// The keys and values of a task, block by block, known one block ahead.
struct KeyWalk {
  const AttentionTask& task;
  const AttentionScratch& scratch;
  int64_t first;
  KeyBlock blocks[2][2];
  int current = 0;
  bool more = false;  // whether the next block is known

  KeyWalk(const AttentionTask& task, const AttentionScratch& scratch)
      : task(task), scratch(scratch), first(task.begin) {
    if (first < task.end) find(0, first);
    look_ahead();
  }
  void find(int which, int64_t slot) {
    const int64_t count = least(kKeyBlock, task.end - slot);
    locate(task.keys, task, slot, count, scratch.copies[2 * which], blocks[which][0]);
    locate(task.values, task, slot, count, scratch.copies[2 * which + 1], blocks[which][1]);
  }
  void look_ahead() {
    more = first + kKeyBlock < task.end;
    if (more) find(1 - current, first + kKeyBlock);
  }
  void step() {
    first += kKeyBlock;
    current = 1 - current;
    look_ahead();
  }
  const KeyBlock& keys() const { return blocks[current][0]; }
  const KeyBlock& values() const { return blocks[current][1]; }
  const KeyBlock* next_keys() const { return more ? &blocks[1 - current][0] : nullptr; }
  const KeyBlock* next_values() const { return more ? &blocks[1 - current][1] : nullptr; }
};

INLINE void load_value_scales(const KeyBlock& values, float* scales) {
  for (int64_t j = 0; j < kKeyBlock; ++j) scales[j] = j < values.count ? values.scales[j] : 0.0f;
}

#if HEADRACE_LEVEL >= 2

template <int Rows>
static void attend_few_bytes(const AttentionTask& task, const AttentionScratch& scratch) {
  const int64_t columns = round_up(task.width, 64);
  ByteQueries queries;
  split_queries(task, queries);
  ByteProbabilities probability;
  for (KeyWalk walk(task, scratch); walk.first < task.end; walk.step()) {
    alignas(64) float factors[kKeyBlock], value_scales[kKeyBlock];
    block_factors(task, walk.keys(), factors);
    load_value_scales(walk.values(), value_scales);
    few_byte_scores<Rows>(task, queries, walk.keys(), walk.next_keys(), scratch.scores);
    for (int64_t row = 0; row < task.rows; ++row) {
      __m512 p[4];
      softmax(task, row, walk.first, walk.keys().count, factors, scratch.scores + row * kKeyBlock,
              row_state(scratch, row, columns), p);
      split_probabilities(p, value_scales, row, probability);
    }
    few_byte_values(task, walk.values(), walk.next_values(), probability, scratch.result, columns);
  }
  write_result(task, scratch, columns, byte_column);
}

template <int Rows>
static void attend_few(const AttentionTask& task, const AttentionScratch& scratch) {
  const int64_t columns = round_up(task.width, kChunk);
  for (KeyWalk walk(task, scratch); walk.first < task.end; walk.step()) {
    alignas(64) float factors[kKeyBlock];
    block_factors(task, walk.keys(), factors);
    few_scores<Rows>(task, walk.keys(), walk.next_keys(), scratch.scores);
    for (int64_t row = 0; row < task.rows; ++row)
      half_softmax(task, row, walk.first, walk.keys().count, factors, nullptr, scratch, columns);
    few_values<Rows>(walk.values(), walk.next_values(), task.width, scratch.probability,
                     scratch.result, columns);
  }
  write_result(task, scratch, columns, packed_column);
}

#endif

static void attend_many(const AttentionTask& task, const AttentionScratch& scratch) {
  const int64_t columns = round_up(task.width, kChunk);
  const bool bytes = task.values.scale_offsets != nullptr;
  for (KeyWalk walk(task, scratch); walk.first < task.end; walk.step()) {
    alignas(64) float factors[kKeyBlock], value_scales[kKeyBlock];
    block_factors(task, walk.keys(), factors);
    if (bytes) load_value_scales(walk.values(), value_scales);
    multiply_keys(task, walk.keys(), walk.next_keys(), scratch);
    for (int64_t row = 0; row < task.rows; ++row)
      half_softmax(task, row, walk.first, walk.keys().count, factors,
                   bytes ? value_scales : nullptr, scratch, columns);
    // A multiple of 32, which tiles need; what is behind the last key is zero.
    const int64_t padded = round_up(walk.values().count, 32);
    if (bytes)
      pack_values<true>(walk.values(), walk.next_values(), task.width, padded, scratch.values);
    else
      pack_values<false>(walk.values(), walk.next_values(), task.width, padded, scratch.values);
    multiply_bf16(product_rows(task.rows), columns / kPanel, padded / 2, scratch.probability, kKeyBlock,
                  scratch.values, padded * kPanel, scratch.result, columns, true);
  }
  write_result(task, scratch, columns, packed_column);
}

static void attend(const AttentionTask& task, std::byte* memory) {
  AttentionScratch scratch;
  carve(product_rows(task.rows), task.width, reinterpret_cast<uintptr_t>(memory), scratch);
  for (int64_t row = 0; row < task.rows; ++row) scratch.highest[row] = kLowest;
  __builtin_memset(scratch.sums, 0, task.rows * kPanel * sizeof(float));
  __builtin_memset(scratch.result, 0, task.rows * round_up(task.width, 64) * sizeof(float));
#if HEADRACE_LEVEL >= 2
  if (task.rows <= kFewRows && task.width <= kMaxByteWidth) {
    const bool bytes = task.keys.scale_offsets != nullptr;
#define HEADRACE_CALL(n)                                                                           \
  case n:                                                                                          \
    return bytes ? attend_few_bytes<n>(task, scratch) : attend_few<n>(task, scratch)
    switch (task.rows) {
      HEADRACE_CALL(1);
      HEADRACE_CALL(2);
      HEADRACE_CALL(3);
      HEADRACE_CALL(4);
      HEADRACE_CALL(5);
      HEADRACE_CALL(6);
      HEADRACE_CALL(7);
      HEADRACE_CALL(8);
    }
#undef HEADRACE_CALL
  }
#endif
  attend_many(task, scratch);
}

static void sum_scores(const AttentionTask& task, std::byte* memory) {
  AttentionScratch scratch;
  carve(product_rows(task.rows), task.width, reinterpret_cast<uintptr_t>(memory), scratch);
  KeyBlock block;
  for (int64_t first = task.begin; first < task.end; first += kKeyBlock) {
    locate(task.keys, task, first, least(kKeyBlock, task.end - first), scratch.copies[0], block);
    alignas(64) float factors[kKeyBlock];
    block_factors(task, block, factors);
    multiply_keys(task, block, nullptr, scratch);
    float sums[kKeyBlock] = {};
    for (int64_t row = 0; row < task.rows; ++row) {
      float* scores = scratch.scores + row * kKeyBlock;
      finish_scores(task, row, first, block.count, factors, scores);
      const float lse = task.lse[row / task.ratio * task.lse_stride + row % task.ratio] * kLog2E;
      for (int64_t j = 0; j < kKeyBlock; ++j) {
        const float x = scores[j] - lse;
        sums[j] += x < -126.0f ? 0.0f : power_of_two(x);
      }
    }
    for (int64_t j = 0; j < block.count; ++j) task.sums[first - task.begin + j] += sums[j];
  }
}

// FlashAttention-2, section 3.3: parts are weighed by their log-sum-exp.
static void merge_parts(const MergeCall& in) {
  for (int64_t row = 0; row < in.rows; ++row) {
    const int64_t query = row / in.ratio, head = row % in.ratio;
    uint16_t* out = in.out + query * in.out_stride + head * in.width;
    float& whole_lse = in.lse[query * in.lse_stride + head];
    float highest = in.onto && whole_lse > kLowest ? whole_lse : kLowest;
    for (int64_t part = 0; part < in.parts; ++part) {
      const float lse = in.partial_lse[part * in.stride + row];
      highest = lse > highest ? lse : highest;
    }
    float sum = 0;
    float total[kMaxHeadWidth] = {};
    if (in.onto) {
      sum = exponential(whole_lse - highest);
      for (int64_t d = 0; d < in.width; ++d) total[d] = sum * from_bf16(out[d]);
    }
    for (int64_t part = 0; part < in.parts; ++part) {
      const float weight = exponential(in.partial_lse[part * in.stride + row] - highest);
      const float* from = in.partial + (part * in.stride + row) * in.width;
      for (int64_t d = 0; d < in.width; ++d) total[d] += weight * from[d];
      sum += weight;
    }
    whole_lse = highest + binary_logarithm(sum) * kLn2;
    for (int64_t d = 0; d < in.width; ++d) out[d] = to_bf16(total[d] / sum);
  }
}

#include "coded_attention.inl"

constexpr AttentionKernels attention_kernels() {
  return {store_tokens,  attention_scratch, attend,      sum_scores,
          merge_parts,   coded_scratch,     attend_coded};
}
