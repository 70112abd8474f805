// Attention to coded units: a unit is decoded to panels for matrix products, which stay in the
// cache, and attended to at once. Entries with the same place in two lines that follow each other are a
// pair of those products, of keys as of values, so that nothing has to be transposed.

#include "coded_vectors.inl"

// What the parts of a head in a unit say.
struct CodedHead {
  const uint8_t* levels;       // [lines, length * bits / 8]
  const float* steps;          // [lines, groups, 2]
  const float *left, *right;   // [lines, rank] and [rank, length rounded up to whole panels]
  const uint16_t* places;      // [lines, kept]
  const uint16_t* outliers;    // bf16
};

// Where a head's share of a part is.
INLINE const std::byte* find_part(const CodedTask& task, const int32_t* table,
                                  const CodedPart& part, int64_t head_bytes) {
  const std::byte* page = task.pages + table[part.page] * task.page_bytes;
  return page + part.offset + task.head * head_bytes;
}

INLINE int64_t number_count(const CodedLines& in) {
  return in.lines * (in.groups * 2 + in.rank + in.kept) +
         in.rank * round_up(in.length, kPanel);
}

// `numbers` has room for so many.
INLINE void read_head(const CodedTask& task, const CodedLines& in, const int32_t* table,
                      float* numbers, CodedHead& out) {
  const auto widened = [&](const CodedPart& part, int64_t count) {
    float* to = numbers;
    if (count > 0)
      widen_halves(reinterpret_cast<const uint16_t*>(find_part(task, table, part, 2 * count)),
                   count, to);
    numbers += count;
    return to;
  };
  out.levels = reinterpret_cast<const uint8_t*>(
      find_part(task, table, in.levels, in.lines * (in.length * in.bits / 8)));
  out.steps = widened(in.steps, in.lines * in.groups * 2);
  out.left = widened(in.left, in.lines * in.rank);
  if (const int64_t count = in.lines * in.kept; count > 0) {
    const auto find = [&](const CodedPart& part) {
      return reinterpret_cast<const uint16_t*>(find_part(task, table, part, 2 * count));
    };
    const uint16_t* outliers = find(in.outliers);
    auto* to = reinterpret_cast<uint16_t*>(numbers);
    for (int64_t k = 0; k < count; ++k) to[k] = to_bf16(from_half(outliers[k]));
    numbers += (count + 1) / 2;
    out.places = find(in.places);
    out.outliers = to;
  }
  const int64_t stride = round_up(in.length, kPanel);
  out.right = numbers;
  if (in.rank == 0) return;
  const auto* right = reinterpret_cast<const uint16_t*>(
      find_part(task, table, in.right, in.rank * in.length * 2));
  for (int64_t r = 0; r < in.rank; ++r, numbers += stride) {
    widen_halves(right + r * in.length, in.length, numbers);
    for (int64_t i = in.length; i < stride; ++i) numbers[i] = 0.0f;
  }
}

// Fetch what a head has in a unit into the second-level cache.
INLINE void prefetch_head(const CodedTask& task, const CodedLines& in, const int32_t* table) {
  const auto fetch = [&](const CodedPart& part, int64_t bytes) {
    if (bytes == 0) return;
    const std::byte* at = find_part(task, table, part, bytes);
    for (int64_t i = 0; i < bytes; i += 64) prefetch(at + i);
  };
  fetch(in.levels, in.lines * (in.length * in.bits / 8));
  fetch(in.steps, in.lines * in.groups * 4);
  fetch(in.left, in.lines * in.rank * 2);
  fetch(in.right, in.rank * in.length * 2);
  fetch(in.places, in.lines * in.kept * 2);
  fetch(in.outliers, in.lines * in.kept * 2);
}

// Of sixteen levels, those that there are.
template <int Bits>
INLINE EntryLevels load_levels(const uint8_t* levels, int64_t count) {
  uint8_t copy[2 * Bits] = {};
  __builtin_memcpy(copy, levels, least(count, kPanel) * Bits / 8);
  return load_levels<Bits>(copy);
}

// What levels stand for where sixteen of them have one step.
template <int Bits>
struct LevelScale {
  Entries step, lowest;
#if HEADRACE_LEVEL >= 2
  Entries table;  // four bits choose from it, some of which may be another level's
#endif

  explicit LevelScale(const float* steps)
      : step(repeat_entry(steps[0])), lowest(repeat_entry(steps[1])) {
#if HEADRACE_LEVEL >= 2
    table = scale_levels<Bits>(count_lanes(), step, lowest);
#endif
  }
  INLINE_MEMBER Entries operator()(EntryLevels levels) const {
#if HEADRACE_LEVEL >= 2
    if constexpr (Bits <= 4) return _mm512_permutexvar_ps(levels, table);
#endif
    return scale_levels<Bits>(levels, step, lowest);
  }
};

// The same where there are several.
template <int Bits>
INLINE Entries scale_apart(EntryLevels levels, const float* steps, int64_t first, int64_t group,
                           int64_t groups) {
  float step[kPanel], lowest[kPanel];
  for (int64_t lane = 0; lane < kPanel; ++lane) {
    const int64_t at = least((first + lane) / group, groups - 1) * 2;
    step[lane] = steps[at];
    lowest[lane] = steps[at + 1];
  }
  return scale_levels<Bits>(levels, load_entries(step), load_entries(lowest));
}

// The lines `line` and `other` as pairs, sixteen of them in each panel. Rank -1: any.
template <int Bits, int Rank>
static void decode_pair(const CodedLines& in, const CodedHead& head, int64_t group, int64_t line,
                        int64_t other, uint16_t* out, int64_t panel_stride) {
  const int64_t length = in.length, rank = Rank < 0 ? in.rank : Rank;
  const int64_t stride = round_up(length, kPanel), whole = length / kPanel * kPanel;
  const uint8_t* a = head.levels + line * (length * Bits / 8);
  const uint8_t* b = head.levels + other * (length * Bits / 8);
  const float* a_steps = head.steps + line * in.groups * 2;
  const float* b_steps = head.steps + other * in.groups * 2;
  const float *a_left = head.left + line * rank, *b_left = head.left + other * rank;
  const float* right = head.right;
  const auto finish = [&](Entries x, Entries y) __attribute__((always_inline)) {
    for (int64_t r = 0; r < rank; ++r) {
      const Entries factors = load_entries(right + r * stride);
      add_product(x, a_left[r], factors);
      add_product(y, b_left[r], factors);
    }
    store_pairs(x, y, out);
    right += kPanel;
    out += panel_stride;
    a += 2 * Bits;
    b += 2 * Bits;
  };
  if (in.groups > 1 && group % kPanel != 0) {
    for (int64_t i = 0; i < length; i += kPanel)
      finish(scale_apart<Bits>(load_levels<Bits>(a, length - i), a_steps, i, group, in.groups),
             scale_apart<Bits>(load_levels<Bits>(b, length - i), b_steps, i, group, in.groups));
    return;
  }
  // Only a line of one group may end within a panel.
  for (int64_t first = 0; first < length; first += group, a_steps += 2, b_steps += 2) {
    const LevelScale<Bits> of_a(a_steps), of_b(b_steps);
    for (int64_t i = least(group, whole); i > 0; i -= kPanel)
      finish(of_a(load_levels<Bits>(a)), of_b(load_levels<Bits>(b)));
    if (const int64_t rest = length - whole; rest > 0)
      finish(of_a(load_levels<Bits>(a, rest)), of_b(load_levels<Bits>(b, rest)));
  }
}

// In place of what their line, every second element of `out`, has there.
INLINE void put_outliers(const CodedLines& in, const CodedHead& head, int64_t line, uint16_t* out,
                         int64_t panel_stride) {
  for (int64_t k = line * in.kept; k < (line + 1) * in.kept; ++k) {
    const uint32_t place = head.places[k];
    if (place < in.length)
      out[place / kPanel * panel_stride + place % kPanel * 2] = head.outliers[k];
  }
}

template <int Bits>
INLINE auto pair_decoder(int64_t rank) {
  if (rank == 0) return decode_pair<Bits, 0>;
  return rank == 2 ? decode_pair<Bits, 2> : decode_pair<Bits, -1>;
}

// The lines of a head as panels for products over `padded` lines, even, of which those that are not
// there are zero.
static void decode_lines(const CodedLines& in, const CodedHead& head, int64_t padded,
                         uint16_t* out) {
  const int64_t panels = round_up(in.length, kPanel) / kPanel, stride = padded * kPanel;
  const int64_t group = in.length / in.groups;
  const auto decode = in.bits == 1   ? pair_decoder<1>(in.rank)
                      : in.bits == 2 ? pair_decoder<2>(in.rank)
                      : in.bits == 4 ? pair_decoder<4>(in.rank)
                                     : pair_decoder<8>(in.rank);
  for (int64_t line = 0; line < in.lines; line += 2) {
    uint16_t* to = out + line * kPanel;
    const int64_t other = least(line + 1, in.lines - 1);
    decode(in, head, group, line, other, to, stride);
    put_outliers(in, head, line, to, stride);
    if (other != line) put_outliers(in, head, other, to + 1, stride);
    if (other == line)
      for (int64_t i = 0; i < panels * kPanel; ++i) to[i / kPanel * stride + i % kPanel * 2 + 1] = 0;
  }
  const int64_t rest = padded - round_up(in.lines, 2);
  for (int64_t panel = 0; panel < panels; ++panel)
    __builtin_memset(out + panel * stride + (padded - rest) * kPanel, 0, rest * kPanel * 2);
}

// The working memory of a thread, beside that of other attention.
struct CodedScratch {
  uint16_t *q, *keys, *values;
  float* numbers;
};

INLINE int64_t padded_slots(const CodedTask& task) { return round_up(task.slots, 32); }

static size_t carve_coded(const CodedTask& task, uintptr_t at, AttentionScratch& common,
                          CodedScratch& out) {
  const int64_t rows = task.queries * task.ratio;
  const uintptr_t begin = at;
  at += carve(rows, task.width, at, common);
  const auto take = [&](auto*& pointer, int64_t count) {
    pointer = reinterpret_cast<decltype(pointer + 0)>(at);
    at += (count * sizeof(*pointer) + 63) / 64 * 64;
  };
  take(out.q, rows * task.width);
  take(out.keys, round_up(task.slots, kPanel) * task.width);
  take(out.values, round_up(task.width, kPanel) * padded_slots(task));
  const int64_t of_keys = number_count(*task.keys), of_values = number_count(*task.values);
  take(out.numbers, of_keys > of_values ? of_keys : of_values);
  return at - begin;
}

static size_t coded_scratch(const CodedTask& task) {
  AttentionScratch common;
  CodedScratch unused;
  return carve_coded(task, 0, common, unused);
}

INLINE void rotate_queries(const CodedTask& in, uint16_t* out) {
  const int64_t half = in.width / 2;
  for (int64_t query = 0; query < in.queries; ++query)
    for (int64_t g = 0; g < in.ratio; ++g, out += in.width)
      rotate(in.q + query * in.q_stride + g * in.q_head_stride, in.cos + query * half,
             in.sin + query * half, half, out);
}

// All rows attend to the decoded slots of a unit, block by block.
static void attend_unit(const AttentionTask& task, const CodedTask& in,
                        const AttentionScratch& common, const CodedScratch& own) {
  const int64_t columns = round_up(in.width, kPanel), padded = padded_slots(in);
  const float scale = in.scale * kLog2E;
  alignas(64) float factors[kKeyBlock];
  for (int64_t first = 0; first < in.slots; first += kKeyBlock) {
    const int64_t count = least(kKeyBlock, in.slots - first);
    for (int64_t j = 0; j < kKeyBlock; ++j) factors[j] = j < count ? scale : 0.0f;
    multiply_bf16(task.rows, (count + kPanel - 1) / kPanel, in.width / 2, own.q, in.width,
                  own.keys + first * in.width, in.width * kPanel, common.scores, kKeyBlock, false);
    for (int64_t row = 0; row < task.rows; ++row)
      half_softmax(task, row, first, count, factors, nullptr, common, columns);
    multiply_bf16(task.rows, columns / kPanel, round_up(count, 32) / 2, common.probability,
                  kKeyBlock, own.values + first * kPanel, padded * kPanel, common.result, columns,
                  true);
  }
}

static void attend_coded(const CodedTask& in, std::byte* memory) {
  AttentionScratch common;
  CodedScratch own;
  carve_coded(in, reinterpret_cast<uintptr_t>(memory), common, own);
  AttentionTask task{};
  task.rows = in.queries * in.ratio;
  task.ratio = in.ratio;
  task.width = in.width;
  task.scale = in.scale;
  task.softcap = in.softcap;
  task.partial = in.partial;
  task.lse = in.lse;
  for (int64_t row = 0; row < task.rows; ++row) common.highest[row] = kLowest;
  __builtin_memset(common.sums, 0, task.rows * kPanel * sizeof(float));
  __builtin_memset(common.result, 0, task.rows * round_up(in.width, 64) * sizeof(float));
  rotate_queries(in, own.q);
  for (int64_t unit = 0; unit < in.units; ++unit) {
    const int32_t* table = in.table + unit * in.unit_pages;
    CodedHead head;
    read_head(in, *in.keys, table, own.numbers, head);
    decode_lines(*in.keys, head, in.width, own.keys);
    read_head(in, *in.values, table, own.numbers, head);
    decode_lines(*in.values, head, padded_slots(in), own.values);
    if (unit + 1 < in.units) {
      prefetch_head(in, *in.keys, table + in.unit_pages);
      prefetch_head(in, *in.values, table + in.unit_pages);
    }
    attend_unit(task, in, common, own);
  }
  write_result(task, common, round_up(in.width, kPanel), [](int64_t d) { return d; });
}
