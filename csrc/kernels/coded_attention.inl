// Attention to coded units: a unit is decoded to panels for matrix products, which stay in the cache,
// and attended to at once. Entries with the same place in two lines that follow each other are a
// pair of those products, of keys as of values, so that nothing has to be transposed.

INLINE const std::byte* part_of(const CodedTask& task, const int32_t* table, const CodedPart& part) {
  return task.pages + table[part.page] * task.page_bytes + part.offset;
}

// The parts of a head that lie in a unit.
struct CodedHead {
  const uint8_t* levels;
  const uint16_t *steps, *left, *right, *places, *outliers;

  CodedHead(const CodedTask& task, const CodedLines& in, const int32_t* table) {
    const auto find = [&](const CodedPart& part, int64_t head_bytes) {
      return part.page < 0 ? nullptr : part_of(task, table, part) + task.head * head_bytes;
    };
    const auto halves = [&](const CodedPart& part, int64_t count) {
      return reinterpret_cast<const uint16_t*>(find(part, 2 * count));
    };
    levels = reinterpret_cast<const uint8_t*>(
        find(in.levels, in.lines * (in.length * in.bits / 8)));
    steps = halves(in.steps, in.lines * in.groups * 2);
    left = halves(in.left, in.lines * in.rank);
    right = halves(in.right, in.rank * in.length);
    places = halves(in.places, in.lines * in.kept);
    outliers = halves(in.outliers, in.lines * in.kept);
  }
};

// A line as it is decoded, sixteen entries at a time.
struct CodedLine {
  const uint8_t* levels;
  const uint16_t* steps;
  float left[kMaxCodedRank];
};

INLINE void find_line(const CodedLines& in, const CodedHead& head, int64_t line, CodedLine& out) {
  out.levels = head.levels + line * (in.length * in.bits / 8);
  out.steps = head.steps + line * in.groups * 2;
  for (int64_t r = 0; r < in.rank; ++r) out.left[r] = from_half(head.left[line * in.rank + r]);
}

// The bytes of sixteen levels, of which those behind the end of a line are not read.
template <int Bits>
INLINE const uint8_t* sixteen_levels(const uint8_t* levels, int64_t first, int64_t length,
                                     uint8_t* copy) {
  const uint8_t* from = levels + first * Bits / 8;
  if (length - first >= kPanel) return from;
  __builtin_memset(copy, 0, 2 * Bits);
  __builtin_memcpy(copy, from, (length - first) * Bits / 8);
  return copy;
}

// What each of sixteen entries is multiplied with, and what is added.
INLINE void load_steps(const CodedLines& in, const uint16_t* steps, int64_t first, float* step,
                       float* lowest) {
  const int64_t group = in.length / in.groups;
  for (int64_t lane = 0; lane < kPanel; ++lane) {
    const int64_t at = least((first + lane) / group, in.groups - 1) * 2;
    step[lane] = from_half(steps[at]);
    lowest[lane] = from_half(steps[at + 1]);
  }
}

#if HEADRACE_LEVEL >= 2

typedef __m512 Sixteen;

INLINE Sixteen widen_half(uint16_t half) {
  return _mm512_cvtph_ps(_mm256_set1_epi16(static_cast<int16_t>(half)));
}

// Levels in the lowest bits of the lanes; what is above belongs to others.
template <int Bits>
INLINE __m512i spread_levels(const uint8_t* from) {
  if constexpr (Bits == 8) return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  if constexpr (Bits == 1) {
    uint16_t word;
    __builtin_memcpy(&word, from, sizeof word);
    return _mm512_srlv_epi32(_mm512_set1_epi32(word), lanes);
  }
  const __m512i word = _mm512_set1_epi32(static_cast<int>(load32(from)));
  if constexpr (Bits == 2) return _mm512_srlv_epi32(word, _mm512_slli_epi32(lanes, 1));
  const __m512i both =
      _mm512_mask_set1_epi32(word, 0xff00, static_cast<int>(load32(from + 4 * (Bits == 4))));
  return _mm512_srlv_epi32(both, _mm512_and_si512(_mm512_slli_epi32(lanes, 2), _mm512_set1_epi32(31)));
}

// A line's numbers for the levels, one group after another.
template <int Bits>
struct LevelScale {
  static constexpr int kMask = (1 << Bits) - 1;
  const CodedLines& in;
  const CodedLine& line;
  const bool uniform;  // sixteen entries have one step
  int64_t end = 0;     // of the group that is known
  Sixteen step, lowest, table;

  LevelScale(const CodedLines& in, const CodedLine& line)
      : in(in), line(line), uniform(in.groups == 1 || in.length / in.groups % kPanel == 0) {}

  INLINE_MEMBER Sixteen values(int64_t first) {
    uint8_t copy[16];
    const __m512i levels =
        spread_levels<Bits>(sixteen_levels<Bits>(line.levels, first, in.length, copy));
    if (!uniform) {
      alignas(64) float steps[kPanel], lows[kPanel];
      load_steps(in, line.steps, first, steps, lows);
      return scaled(levels, _mm512_load_ps(steps), _mm512_load_ps(lows));
    }
    if (first >= end) next_group(first);
    if constexpr (Bits <= 4) return _mm512_permutexvar_ps(levels, table);
    return scaled(levels, step, lowest);
  }
  INLINE_MEMBER void next_group(int64_t first) {
    const int64_t group = in.length / in.groups, number = first / group;
    end = in.groups == 1 ? in.length : (number + 1) * group;
    step = widen_half(line.steps[2 * number]);
    lowest = widen_half(line.steps[2 * number + 1]);
    // Four bits choose from it, some of which are another level's.
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    if constexpr (Bits <= 4) table = scaled(lanes, step, lowest);
  }
  static INLINE_MEMBER Sixteen scaled(__m512i levels, Sixteen step, Sixteen lowest) {
    const __m512i own = _mm512_and_si512(levels, _mm512_set1_epi32(kMask));
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(own), step, lowest);
  }
};

INLINE void add_product(Sixteen& sum, float left, const float* right) {
  sum = _mm512_fmadd_ps(_mm512_set1_ps(left), _mm512_loadu_ps(right), sum);
}

INLINE void store_pairs(Sixteen a, Sixteen b, uint16_t* out) {
  const __m512i low = _mm512_cvtepu16_epi32(halves(a)), high = _mm512_cvtepu16_epi32(halves(b));
  _mm512_storeu_si512(out, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

#else

struct Sixteen {
  float lanes[kPanel];
};

template <int Bits>
struct LevelScale {
  const CodedLines& in;
  const CodedLine& line;
  int64_t end = 0;  // of the group that is known, if sixteen entries have one step
  float step[kPanel], lowest[kPanel];

  LevelScale(const CodedLines& in, const CodedLine& line) : in(in), line(line) {}

  INLINE_MEMBER Sixteen values(int64_t first) {
    uint8_t copy[16];
    const uint8_t* from = sixteen_levels<Bits>(line.levels, first, in.length, copy);
    if (first >= end) {
      load_steps(in, line.steps, first, step, lowest);
      const int64_t group = in.length / in.groups;
      end = in.groups == 1 ? in.length : group % kPanel == 0 ? (first / group + 1) * group : first;
    }
    // Words of 32 bits, or what there is.
    constexpr int each = Bits == 1 ? 16 : 32 / Bits;
    Sixteen found;
    for (int begin = 0; begin < kPanel; begin += each) {
      uint32_t word = 0;
      __builtin_memcpy(&word, from + begin * Bits / 8, each * Bits / 8);
      for (int lane = 0; lane < each; ++lane) {
        const auto level = static_cast<int32_t>(word >> (lane * Bits) & ((1 << Bits) - 1));
        found.lanes[begin + lane] =
            multiply_add(static_cast<float>(level), step[begin + lane], lowest[begin + lane]);
      }
    }
    return found;
  }
};

INLINE void add_product(Sixteen& sum, float left, const float* right) {
  for (int64_t lane = 0; lane < kPanel; ++lane)
    sum.lanes[lane] = multiply_add(left, right[lane], sum.lanes[lane]);
}

INLINE void store_pairs(const Sixteen& a, const Sixteen& b, uint16_t* out) {
  for (int64_t lane = 0; lane < kPanel; ++lane) {
    const uint32_t pair = to_bf16(a.lanes[lane]) | uint32_t{to_bf16(b.lanes[lane])} << 16;
    __builtin_memcpy(out + 2 * lane, &pair, sizeof pair);
  }
}

#endif

// Two lines as pairs, sixteen of them in each panel.
template <int Bits>
static void decode_pair(const CodedLines& in, const CodedLine& a, const CodedLine& b,
                        const float* right, uint16_t* out, int64_t panel_stride) {
  const int64_t stride = round_up(in.length, kPanel);
  LevelScale<Bits> first(in, a), second(in, b);
  for (int64_t i = 0; i < in.length; i += kPanel, out += panel_stride) {
    Sixteen x = first.values(i), y = second.values(i);
    for (int64_t r = 0; r < in.rank; ++r) {
      add_product(x, a.left[r], right + r * stride + i);
      add_product(y, b.left[r], right + r * stride + i);
    }
    store_pairs(x, y, out);
  }
}

// The lines of a head as panels for products over `padded` lines, even, of which those that are not
// there are zero. `right` has room for [rank, length rounded up to whole panels].
static void decode_lines(const CodedLines& in, const CodedHead& head, int64_t padded, float* right,
                         uint16_t* out) {
  const int64_t panels = round_up(in.length, kPanel) / kPanel, stride = padded * kPanel;
  for (int64_t r = 0; r < in.rank; ++r)
    for (int64_t i = 0; i < panels * kPanel; ++i)
      right[r * panels * kPanel + i] =
          i < in.length ? from_half(head.right[r * in.length + i]) : 0.0f;
  const auto decode = in.bits == 1   ? decode_pair<1>
                      : in.bits == 2 ? decode_pair<2>
                      : in.bits == 4 ? decode_pair<4>
                                     : decode_pair<8>;
  CodedLine a, b;
  for (int64_t line = 0; line < in.lines; line += 2) {
    uint16_t* to = out + line * kPanel;
    const int64_t other = least(line + 1, in.lines - 1);
    find_line(in, head, line, a);
    find_line(in, head, other, b);
    decode(in, a, b, right, to, stride);
    for (int64_t k = line * in.kept; k < (other + 1) * in.kept; ++k) {
      const int64_t place = head.places[k];
      if (place < in.length)
        to[place / kPanel * stride + place % kPanel * 2 + (k >= (line + 1) * in.kept)] =
            to_bf16(from_half(head.outliers[k]));
    }
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
  float* right;
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
  const CodedLines &keys = *task.keys, &values = *task.values;
  const int64_t of_keys = keys.rank * round_up(keys.length, kPanel);
  const int64_t of_values = values.rank * round_up(values.length, kPanel);
  take(out.right, of_keys > of_values ? of_keys : of_values);
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
    decode_lines(*in.keys, CodedHead(in, *in.keys, table), in.width, own.right, own.keys);
    decode_lines(*in.values, CodedHead(in, *in.values, table), padded_slots(in), own.right,
                 own.values);
    attend_unit(task, in, common, own);
  }
  write_result(task, common, round_up(in.width, kPanel), [](int64_t d) { return d; });
}
