// Rows times weights in planes of bits: values come from memory into registers as bytes, and go
// nowhere else. A few rows at a time; the next ones read the panels again, from a cache.

#include "block_vectors.inl"

constexpr int64_t kPlaneColumns = 32;  // in the planes, whole vectors of these follow each other

typedef uint16_t Words __attribute__((vector_size(sizeof(Integers))));
typedef uint8_t Bytes __attribute__((vector_size(sizeof(Integers))));

// What a kernel multiplies. Memory is fetched `ahead` panels further.
struct BlockRows {
  const LinearWeight* weight;
  const Prepared* x;
  int64_t row, panel;  // the first ones
  float* c;
  int64_t c_stride, ahead;
};

// Bits of each byte moved down, or up if `places` is negative. Some come from the byte beside it.
INLINE Integers move_bits(Integers bytes, int places) {
  const auto down = static_cast<uint16_t>(places), up = static_cast<uint16_t>(-places);
  return (Integers)(places < 0 ? (Words)bytes << up : (Words)bytes >> down);
}
INLINE Integers mask_of(int bits, int place) {
  const auto mask = static_cast<uint8_t>(((1 << bits) - 1) << place);
  return (Integers)(Bytes{} + mask);
}
INLINE Integers load_plane(const uint8_t* from) {
  Integers bytes;
  __builtin_memcpy(&bytes, from, sizeof bytes);
  return bytes;
}

// A vector of values, of columns 4 * quad to 4 * quad + 3, counted from where the planes point.
template <int First, int Second, bool Table>
INLINE Integers block_values(const uint8_t* first, const uint8_t* second, int quad,
                             Integers table) {
  if constexpr (First == 8) return load_bytes(first + quad * 64);
  constexpr int each = 8 / First, others = Second == 0 ? 1 : 8 / (Second == 0 ? 1 : Second);
  Integers values = move_bits(load_plane(first + quad / each * 64), First * (quad % each));
  values = values & mask_of(First, 0);
  if constexpr (Second > 0) {
    const Integers above = load_plane(second + quad / others * 64);
    values = put_above(values, move_bits(above, Second * (quad % others) - First),
                       mask_of(Second, First));
  }
  return Table ? look_up(table, values) : values;
}

// Where the levels of a weight's groups are, and the factors above them, for the rows of a vector.
struct LevelPlaces {
  int64_t panel, groups, supers;
};
INLINE int64_t group_place(const LevelPlaces& in, int v, int64_t group) {
  return ((in.panel + v / kParts) * in.groups + group) * kPanel + v % kParts * (kPanel / kParts);
}
INLINE int64_t factor_place(const LevelPlaces& in, int v, int64_t super) {
  return ((in.panel + v / kParts) * in.supers + super) * kPanel + v % kParts * (kPanel / kParts);
}

// Scales of a group: its factors, or the steps that these are to be multiplied with.
INLINE Floats group_scales(const BlockParts& parts, const LevelPlaces& places, int v,
                           int64_t group) {
  if (parts.steps != nullptr)
    return to_floats(load_steps(parts.steps + group_place(places, v, group)));
  const int64_t super = parts.super == 1 ? group : group / parts.super;
  return load_factors(parts.factors + factor_place(places, v, super), parts.wide_factors);
}

// value += lows of groups [begin, end) times sums of activations. Groups with steps share a factor.
template <int Rows, int Vectors>
INLINE void add_lows(const BlockParts& parts, const LevelPlaces& places, const int32_t* totals,
                     int64_t begin, int64_t end, Floats (&value)[Rows][Vectors]) {
  if (parts.low_steps == nullptr) {
    for (int64_t g = begin; g < end; ++g)
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        const int64_t place = factor_place(places, v, parts.super == 1 ? g : g / parts.super);
        const Floats low = load_factors(parts.low_factors + place, parts.wide_factors);
#pragma GCC unroll 4
        for (int m = 0; m < Rows; ++m) {
          const Floats total = repeat(static_cast<float>(totals[m * places.groups + g]));
          value[m][v] = multiply_add(total, low, value[m][v]);
        }
      }
    return;
  }
  Integers sum[Rows][Vectors] = {};
  for (int64_t g = begin; g < end; ++g)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      const Integers steps = load_steps(parts.low_steps + group_place(places, v, g));
#pragma GCC unroll 4
      for (int m = 0; m < Rows; ++m) add_step(sum[m][v], steps, totals[m * places.groups + g]);
    }
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v) {
    const int64_t place = factor_place(places, v, begin / parts.super);
    const Floats factor = load_factors(parts.low_factors + place, parts.wide_factors);
#pragma GCC unroll 4
    for (int m = 0; m < Rows; ++m)
      value[m][v] = multiply_add(to_floats(sum[m][v]), factor, value[m][v]);
  }
}

// Fetch `bytes` of each of some panels, which are `stride` bytes apart.
template <int Panels>
INLINE void fetch_panels(const void* from, int64_t stride, int64_t bytes) {
#pragma GCC unroll 4
  for (int p = 0; p < Panels; ++p)
#pragma GCC unroll 8
    for (int64_t line = 0; line < bytes; line += 64)
      _mm_prefetch(static_cast<const char*>(from) + p * stride + line, _MM_HINT_T1);
}

// Fetch the levels of groups [begin, end): no processor foresees so many short streams.
template <int Panels>
INLINE void fetch_levels(const BlockParts& parts, const LevelPlaces& places, int64_t begin,
                         int64_t end) {
  const auto fetch = [&](const int8_t* steps, const uint16_t* factors) {
    if (steps != nullptr)
      return fetch_panels<Panels>(steps + group_place(places, 0, begin), places.groups * kPanel,
                                  (end - begin) * kPanel);
    fetch_panels<Panels>(factors + factor_place(places, 0, begin / parts.super),
                         places.supers * kPanel * 2, (end - begin) / parts.super * kPanel * 2);
  };
  fetch(parts.steps, parts.factors);
  if (parts.low_factors != nullptr) fetch(parts.low_steps, parts.low_factors);
}

template <int First, int Second, bool Table, int Rows, int Panels>
static void block_rows(const BlockRows& in) {
  constexpr int bits = Table ? 8 : First + Second, vectors = Panels * kParts;
  constexpr int narrow_quads = kNarrowQuads<bits>;
  const LinearWeight& weight = *in.weight;
  const BlockParts& parts = weight.blocks;
  const int64_t groups = weight.groups(), group = weight.group;
  const int64_t first_bytes = weight.padded_columns * kPanel * First / 8;
  const int64_t second_bytes = weight.padded_columns * kPanel * Second / 8;
  const uint8_t* first = parts.planes[0] + in.panel * first_bytes;
  const uint8_t* second = Second ? parts.planes[1] + in.panel * second_bytes : first;
  const int8_t* a = in.x->bytes + in.row * in.x->stride;
  const int32_t* offsets = in.x->offsets + in.row * groups;
  const bool has_lows = parts.low_factors != nullptr;
  const LevelPlaces places{in.panel, groups, (groups + parts.super - 1) / parts.super};
  const LevelPlaces later{in.panel + in.ahead, groups, places.supers};
  const Integers table = Table ? load_table(parts.table) : Integers{};
  // Products of a group: those of the last quads, and all before. Then what groups have added.
  Integers narrow[Rows][vectors], sum[Rows][vectors];
  Floats part[Rows][vectors];

  const auto begin_group = [&](int64_t g) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      const uint8_t* zeros = weight.zeros ? weight.zeros + group_place(places, v, g) : nullptr;
#pragma GCC unroll 4
      for (int m = 0; m < Rows; ++m)
        sum[m][v] = first_sum<bits>(zeros, offsets[m * groups + g], has_lows);
    }
  };
  const auto fold = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) fold_products<bits>(sum[m][v], narrow[m][v]);
  };
  const auto end_group = [&](int64_t g) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      const Floats scales = group_scales(parts, places, v, g);
#pragma GCC unroll 4
      for (int m = 0; m < Rows; ++m)
        part[m][v] = multiply_add(to_floats(sum[m][v]), scales, part[m][v]);
    }
  };
  // Groups [begin, end) share a scale of activations, and a factor if they have steps.
  const auto end_chunk = [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
    if (parts.steps != nullptr)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        const int64_t place = factor_place(places, v, begin / parts.super);
        const Floats factor = load_factors(parts.factors + place, parts.wide_factors);
#pragma GCC unroll 4
        for (int m = 0; m < Rows; ++m) part[m][v] = part[m][v] * factor;
      }
    if (has_lows) add_lows(parts, places, offsets, begin, end, part);
#pragma GCC unroll 4
    for (int m = 0; m < Rows; ++m) {
      const Floats scale = repeat(in.x->scales[(in.row + m) * groups + begin]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        float* c = in.c + m * in.c_stride + v * (kPanel / kParts);
        Floats value{};
        if (begin != 0) __builtin_memcpy(&value, c, sizeof value);
        value = multiply_add(part[m][v], scale, value);
        __builtin_memcpy(c, &value, sizeof value);
      }
    }
  };

  int64_t g = 0, columns_left = group;
  for (int64_t column = 0; column < weight.padded_columns; column += kBlockColumns) {
    const int64_t end = least(column + kBlockColumns, weight.padded_columns), shared = g;
    fetch_levels<Panels>(parts, later, g, g + (end - column) / group);
#pragma GCC unroll 4
    for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) part[m][v] = Floats{};
    begin_group(g);
    for (int64_t k = column; k < end; k += kPlaneColumns) {
#pragma GCC unroll 8
      for (int quad = 0; quad < 8; ++quad, a += 4) {
        if (quad == 4 && group == kLeastGroup) {
          if constexpr (narrow_quads > 4) fold();
          end_group(g);
          begin_group(++g);
        }
        Integers values[vectors];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
          const int64_t p = v / kParts, at = v % kParts * static_cast<int64_t>(sizeof(Integers));
          values[v] = block_values<First, Second, Table>(
              first + p * first_bytes + at, second + p * second_bytes + at, quad, table);
        }
#pragma GCC unroll 4
        for (int m = 0; m < Rows; ++m) {
          const Integers x = repeat_quad(a + m * in.x->stride);
#pragma GCC unroll 4
          for (int v = 0; v < vectors; ++v)
            multiply_quad<bits>(sum[m][v], narrow[m][v], quad % narrow_quads == 0, values[v], x);
        }
        if ((quad + 1) % narrow_quads == 0) fold();
      }
      fetch_panels<Panels>(first + in.ahead * first_bytes, first_bytes, 64 * First);
      fetch_panels<Panels>(second + in.ahead * second_bytes, second_bytes, 64 * Second);
      first += 64 * First;
      second += 64 * Second;
      columns_left -= kPlaneColumns;
      if (columns_left > 0) continue;
      columns_left = group;
      end_group(g++);
      if (k + kPlaneColumns < end) begin_group(g);
    }
    end_chunk(shared, g);
  }
}

// Some panels times up to kBlockRows rows.
template <int First, int Second, bool Table>
static void multiply_block_rows(int64_t rows, int64_t panels, BlockRows in) {
  constexpr int one = kOneRowPanels, few = kFewRowsPanels;
  const auto advance = [&](int64_t count) {
    in.panel += count;
    in.c += count * kPanel;
    panels -= count;
  };
  if (rows == 1)
    for (; panels >= one; advance(one)) block_rows<First, Second, Table, 1, one>(in);
  for (; panels >= few; advance(few)) switch (rows) {
      case 1: block_rows<First, Second, Table, 1, few>(in); break;
      case 2: block_rows<First, Second, Table, 2, few>(in); break;
      case 3: block_rows<First, Second, Table, 3, few>(in); break;
      case 4: block_rows<First, Second, Table, 4, few>(in); break;
    }
  // The last one, if it is left alone.
  for (int64_t m = 0; panels > 0 && m < rows; ++m, ++in.row, in.c += in.c_stride)
    block_rows<First, Second, Table, 1, 1>(in);
}

// c is [rows, c_stride], of `panels` panels.
static void multiply_blocks(const LinearWeight& weight, const Prepared& x, int64_t panel,
                            int64_t panels, int64_t row, int64_t rows, float* c,
                            int64_t c_stride, BlockChunk&) {
  const int64_t times = (rows + kBlockRows - 1) / kBlockRows, most = (rows + times - 1) / times;
  for (int64_t m = 0; m < rows; m += most) {
    const int64_t count = least(most, rows - m), ahead = m + count == rows ? panels : 0;
    const BlockRows in{&weight, &x, row + m, panel, c + m * c_stride, c_stride, ahead};
    if (weight.blocks.table != nullptr) {
      multiply_block_rows<4, 0, true>(count, panels, in);
      continue;
    }
    switch (weight.blocks.bits[0] * 10 + weight.blocks.bits[1]) {
      case 20: multiply_block_rows<2, 0, false>(count, panels, in); break;
      case 21: multiply_block_rows<2, 1, false>(count, panels, in); break;
      case 40: multiply_block_rows<4, 0, false>(count, panels, in); break;
      case 41: multiply_block_rows<4, 1, false>(count, panels, in); break;
      case 42: multiply_block_rows<4, 2, false>(count, panels, in); break;
      case 80: multiply_block_rows<8, 0, false>(count, panels, in); break;
    }
  }
}
