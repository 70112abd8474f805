// Few rows times weights in planes of bits: values come from memory into registers as bytes, and go
// nowhere else.

#include "block_vectors.inl"

constexpr int kDirectRows = 4;
constexpr int64_t kPlaneColumns = 32;  // in the planes, whole vectors of these follow each other
constexpr int64_t kVectorBytes = sizeof(Integers);

typedef uint16_t Words __attribute__((vector_size(kVectorBytes)));
typedef uint8_t Bytes __attribute__((vector_size(kVectorBytes)));

// What a kernel multiplies. Fetches are `ahead` panels further.
struct BlockRows {
  const LinearWeight* weight;
  const Prepared* x;
  int64_t row, panel;  // the first ones
  float* c;
  int64_t c_stride, ahead;
};

// Bits of each byte moved down, or up if `places` is negative. Some come from the byte beside it.
INLINE Integers move_bits(Integers bytes, int places) {
  return (Integers)(places < 0 ? (Words)bytes << static_cast<uint16_t>(-places)
                               : (Words)bytes >> static_cast<uint16_t>(places));
}
INLINE Integers mask_of(int bits, int place) {
  return (Integers)(Bytes{} + static_cast<uint8_t>(((1 << bits) - 1) << place));
}
INLINE Integers load_plane(const uint8_t* from) {
  Integers bytes;
  __builtin_memcpy(&bytes, from, sizeof bytes);
  return bytes;
}

// Values of columns 4 * quad to 4 * quad + 3 of a part of a panel, counted from where the planes point.
template <int First, int Second, bool Table>
INLINE Integers block_values(const uint8_t* first, const uint8_t* second, int quad, Integers table) {
  if constexpr (First == 8) return load_bytes(first + quad * 64);
  constexpr int each = 8 / First, others = Second == 0 ? 1 : 8 / (Second == 0 ? 1 : Second);
  Integers values = move_bits(load_plane(first + quad / each * 64), First * (quad % each));
  values = values & mask_of(First, 0);
  if constexpr (Second > 0) {
    const Integers above = load_plane(second + quad / others * 64);
    values = put_above(values, move_bits(above, Second * (quad % others) - First), mask_of(Second, First));
  }
  return Table ? look_up(table, values) : values;
}

// Where the levels of a vector's rows lie, of groups and of the factors above them.
struct LevelPlaces {
  int64_t panel, groups, supers;
};
INLINE int64_t group_place(const LevelPlaces& in, int v, int64_t group) {
  return ((in.panel + v / kParts) * in.groups + group) * kPanel + v % kParts * (kPanel / kParts);
}
INLINE int64_t factor_place(const LevelPlaces& in, int v, int64_t super) {
  return ((in.panel + v / kParts) * in.supers + super) * kPanel + v % kParts * (kPanel / kParts);
}

// value += the sums of activations of groups [begin, end) times their lows. Groups with steps share a
// factor.
template <int Rows, int Vectors>
INLINE void add_lows(const BlockParts& parts, const LevelPlaces& places, const int32_t* totals, int64_t begin,
                     int64_t end, Floats (&value)[Rows][Vectors]) {
  if (parts.low_steps == nullptr) {
    for (int64_t g = begin; g < end; ++g)
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        const int64_t place = factor_place(places, v, parts.super == 1 ? g : g / parts.super);
        const Floats low = load_factors(parts.low_factors + place, parts.wide_factors);
#pragma GCC unroll 4
        for (int m = 0; m < Rows; ++m)
          value[m][v] = multiply_add(repeat(static_cast<float>(totals[m * places.groups + g])), low, value[m][v]);
      }
    return;
  }
  Integers sum[Rows][Vectors];
#pragma GCC unroll 4
  for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) sum[m][v] = Integers{};
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
    for (int m = 0; m < Rows; ++m) value[m][v] = multiply_add(to_floats(sum[m][v]), factor, value[m][v]);
  }
}

template <int First, int Second, bool Table, int Rows, int Panels>
static void block_rows(const BlockRows& in) {
  constexpr int Bits = Table ? 8 : First + Second, Vectors = Panels * kParts;
  constexpr int narrow_quads = kNarrowQuads<Bits>;
  const LinearWeight& weight = *in.weight;
  const BlockParts& parts = weight.blocks;
  const int64_t groups = weight.groups(), group = weight.group;
  const int64_t supers = (groups + parts.super - 1) / parts.super;
  const int64_t first_bytes = weight.padded_columns * kPanel * First / 8;
  const int64_t second_bytes = weight.padded_columns * kPanel * Second / 8;
  const uint8_t* first = parts.planes[0] + in.panel * first_bytes;
  const uint8_t* second = Second ? parts.planes[1] + in.panel * second_bytes : first;
  const int8_t* a = in.x->bytes + in.row * in.x->stride;
  const int32_t* offsets = in.x->offsets + in.row * groups;
  const bool has_lows = parts.low_factors != nullptr, wide = parts.wide_factors;
  const Integers table = Table ? load_table(parts.table) : Integers{};
  Integers sum[Rows][Vectors], narrow[Rows][Vectors];
  Floats part[Rows][Vectors];
  const LevelPlaces places{in.panel, groups, supers};

  const auto begin_group = [&](int64_t g) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v)
#pragma GCC unroll 4
      for (int m = 0; m < Rows; ++m)
        sum[m][v] = first_sum<Bits>(weight.zeros ? weight.zeros + group_place(places, v, g) : nullptr,
                                    offsets[m * groups + g], has_lows);
  };
  const auto fold = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) fold_products<Bits>(sum[m][v], narrow[m][v]);
  };
  const auto clear = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) narrow[m][v] = Integers{};
  };
  const auto end_group = [&](int64_t g) __attribute__((always_inline)) {
    const int64_t super = parts.super == 1 ? g : g / parts.super;
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      const Floats scale = parts.steps ? to_floats(load_steps(parts.steps + group_place(places, v, g)))
                                       : load_factors(parts.factors + factor_place(places, v, super), wide);
#pragma GCC unroll 4
      for (int m = 0; m < Rows; ++m)
        part[m][v] = multiply_add(to_floats(sum[m][v]), scale, part[m][v]);
    }
  };
  // What groups [begin, end) add, which share a scale of activations, and a factor if they have steps.
  const auto end_chunk = [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
    if (parts.steps != nullptr)
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        const Floats factor = load_factors(parts.factors + factor_place(places, v, begin / parts.super), wide);
#pragma GCC unroll 4
        for (int m = 0; m < Rows; ++m) part[m][v] = part[m][v] * factor;
      }
    if (has_lows) add_lows(parts, places, offsets, begin, end, part);
#pragma GCC unroll 4
    for (int m = 0; m < Rows; ++m) {
      const Floats scale = repeat(in.x->scales[(in.row + m) * groups + begin]);
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        float* c = in.c + m * in.c_stride + v * (kPanel / kParts);
        Floats before{};
        if (begin != 0) __builtin_memcpy(&before, c, sizeof before);
        before = multiply_add(part[m][v], scale, before);
        __builtin_memcpy(c, &before, sizeof before);
        part[m][v] = Floats{};
      }
    }
  };
#pragma GCC unroll 4
  for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) part[m][v] = Floats{};

  int64_t g = 0, columns_left = group;
  for (int64_t column = 0; column < weight.padded_columns; column += kBlockColumns) {
    const int64_t end = least(column + kBlockColumns, weight.padded_columns), shared = g;
    begin_group(g);
    for (int64_t k = column; k < end; k += kPlaneColumns) {
#pragma GCC unroll 8
      for (int quad = 0; quad < 8; ++quad, a += 4) {
        if (quad == 4 && group == kLeastGroup) {
          if constexpr (narrow_quads == 8) {
            fold();
            clear();
          }
          end_group(g);
          begin_group(++g);
        }
        Integers right[Vectors];
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) {
          const int64_t at = v % kParts * kVectorBytes;
          right[v] = block_values<First, Second, Table>(
              first + v / kParts * first_bytes + at, second + v / kParts * second_bytes + at, quad, table);
        }
#pragma GCC unroll 4
        for (int m = 0; m < Rows; ++m) {
          const Integers x = repeat_quad(a + m * in.x->stride);
#pragma GCC unroll 4
          for (int v = 0; v < Vectors; ++v)
            multiply_quad<Bits>(sum[m][v], narrow[m][v], quad % narrow_quads == 0, right[v], x);
        }
        if ((quad + 1) % narrow_quads == 0) fold();
      }
#pragma GCC unroll 4
      for (int p = 0; p < Panels; ++p) {
#pragma GCC unroll 8
        for (int line = 0; line < First; ++line)
          _mm_prefetch(first + (in.ahead + p) * first_bytes + line * 64, _MM_HINT_T1);
#pragma GCC unroll 2
        for (int line = 0; line < Second; ++line)
          _mm_prefetch(second + (in.ahead + p) * second_bytes + line * 64, _MM_HINT_T1);
      }
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

// Up to kBlockPanels panels times up to kDirectRows rows.
template <int First, int Second, bool Table>
static void multiply_block_rows(int64_t rows, int64_t panels, BlockRows in) {
  const auto advance = [&](int64_t count) {
    in.panel += count;
    in.c += count * kPanel;
    panels -= count;
  };
  constexpr int one = kOneRowPanels, few = kFewRowsPanels;
  if (rows == 1)
    for (; panels >= one; advance(one)) block_rows<First, Second, Table, 1, one>(in);
  for (; panels >= few; advance(few)) switch (rows) {
      case 1: block_rows<First, Second, Table, 1, few>(in); break;
      case 2: block_rows<First, Second, Table, 2, few>(in); break;
      case 3: block_rows<First, Second, Table, 3, few>(in); break;
      case 4: block_rows<First, Second, Table, 4, few>(in); break;
    }
  if constexpr (few > 1)
    for (; panels > 0; advance(1)) switch (rows) {
        case 1: block_rows<First, Second, Table, 1, 1>(in); break;
        case 2: block_rows<First, Second, Table, 2, 1>(in); break;
        case 3: block_rows<First, Second, Table, 3, 1>(in); break;
        case 4: block_rows<First, Second, Table, 4, 1>(in); break;
      }
}

static void multiply_few_rows(const LinearWeight& weight, const Prepared& x, int64_t panel,
                              int64_t panels, int64_t row, int64_t rows, float* c,
                              int64_t c_stride, int64_t ahead) {
  const BlockRows in{&weight, &x, row, panel, c, c_stride, ahead};
  if (weight.blocks.table != nullptr) return multiply_block_rows<4, 0, true>(rows, panels, in);
  switch (weight.blocks.bits[0] * 10 + weight.blocks.bits[1]) {
    case 20: return multiply_block_rows<2, 0, false>(rows, panels, in);
    case 21: return multiply_block_rows<2, 1, false>(rows, panels, in);
    case 40: return multiply_block_rows<4, 0, false>(rows, panels, in);
    case 41: return multiply_block_rows<4, 1, false>(rows, panels, in);
    case 42: return multiply_block_rows<4, 2, false>(rows, panels, in);
    case 80: return multiply_block_rows<8, 0, false>(rows, panels, in);
  }
}
