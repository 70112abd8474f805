// Few rows times weights in planes of bits: values come from memory into registers as bytes, and go
// nowhere else. For AVX-512 with VNNI.

constexpr int kDirectRows = 4;
constexpr int64_t kPlaneColumns = 32;  // in the planes, whole vectors of these follow each other

// What a kernel multiplies. Fetches are `ahead` panels further.
struct BlockRows {
  const LinearWeight* weight;
  const Prepared* x;
  int64_t row, panel;  // the first ones
  float* c;
  int64_t c_stride, ahead;
};

// 64 values, of columns 4 * quad to 4 * quad + 3 of a panel, counted from where the planes point.
template <int First, int Second, bool Table>
INLINE __m512i block_values(const uint8_t* first, const uint8_t* second, int quad, __m512i table) {
  if constexpr (First == 8) return _mm512_loadu_si512(first + quad * 64);
  constexpr int each = 8 / First, others = Second == 0 ? 1 : 8 / (Second == 0 ? 1 : Second);
  __m512i value = _mm512_loadu_si512(first + quad / each * 64);
  value = _mm512_srli_epi16(value, static_cast<unsigned>(First * (quad % each)));
  value = _mm512_and_si512(value, _mm512_set1_epi8((1 << First) - 1));
  if constexpr (Second > 0) {
    __m512i above = _mm512_loadu_si512(second + quad / others * 64);
    above = _mm512_srli_epi16(above, static_cast<unsigned>(Second * (quad % others)));
    above = _mm512_and_si512(above, _mm512_set1_epi8((1 << Second) - 1));
    value = _mm512_or_si512(value, _mm512_slli_epi16(above, First));
  }
  return Table ? _mm512_shuffle_epi8(table, value) : value;
}

INLINE __m512 load_factors(const uint16_t* factors, bool wide) {
  const __m256i halves = _mm256_loadu_si256((const __m256i*)factors);
  if (wide) return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  return _mm512_cvtph_ps(halves);
}

// Scales or lows of a group: its factors, times its steps if there are any.
INLINE __m512 group_level(__m512 factor, const int8_t* steps) {
  if (steps == nullptr) return factor;
  const __m128i bytes = _mm_loadu_si128((const __m128i*)steps);
  return _mm512_mul_ps(factor, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
}

template <int First, int Second, bool Table, int Rows, int Panels>
static void block_rows(const BlockRows& in) {
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
  const bool has_lows = parts.low_factors != nullptr;
  const __m512i table =
      Table ? _mm512_maskz_broadcast_i32x4(0xffff, _mm_loadu_si128((const __m128i*)parts.table)) : __m512i{};
  __m512i sum[Rows][Panels];
  __m512 part[Rows][Panels], factor[Panels], low[Panels];

  // Divisions take as long as the products of a group: what is counted down needs none.
  int64_t super = 0, groups_left = 0, columns_left = group;
  const auto begin_group = [&](int64_t g) __attribute__((always_inline)) {
    const bool begins = groups_left == 0;
    if (begins) groups_left = parts.super;
    --groups_left;
#pragma GCC unroll 4
    for (int p = 0; p < Panels; ++p) {
      const uint8_t* zeros =
          weight.zeros ? weight.zeros + ((in.panel + p) * groups + g) * kPanel : nullptr;
#pragma GCC unroll 4
      for (int m = 0; m < Rows; ++m)
        sum[m][p] = has_lows ? _mm512_setzero_si512() : zero_term(zeros, offsets[m * groups + g]);
      if (!begins) continue;
      const int64_t place = ((in.panel + p) * supers + super) * kPanel;
      factor[p] = load_factors(parts.factors + place, parts.wide_factors);
      if (has_lows) low[p] = load_factors(parts.low_factors + place, parts.wide_factors);
    }
    super += begins;
  };
  const auto end_group = [&](int64_t g) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int p = 0; p < Panels; ++p) {
      const int64_t place = ((in.panel + p) * groups + g) * kPanel;
      const __m512 scale = group_level(factor[p], parts.steps ? parts.steps + place : nullptr);
#pragma GCC unroll 4
      for (int m = 0; m < Rows; ++m)
        part[m][p] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[m][p]), scale, part[m][p]);
      if (!has_lows) continue;
      const __m512 under = group_level(low[p], parts.low_steps ? parts.low_steps + place : nullptr);
#pragma GCC unroll 4
      for (int m = 0; m < Rows; ++m)
        part[m][p] = _mm512_fmadd_ps(
            _mm512_set1_ps(static_cast<float>(offsets[m * groups + g])), under, part[m][p]);
    }
  };

  int64_t g = 0;
  for (int64_t column = 0; column < weight.padded_columns; column += kBlockColumns) {
    const int64_t end = least(column + kBlockColumns, weight.padded_columns), shared = g;
#pragma GCC unroll 4
    for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 4
      for (int p = 0; p < Panels; ++p) part[m][p] = _mm512_setzero_ps();
    begin_group(g);
    for (int64_t k = column; k < end; k += kPlaneColumns) {
#pragma GCC unroll 8
      for (int quad = 0; quad < 8; ++quad, a += 4) {
        if (quad == 4 && group == kLeastGroup) {
          end_group(g);
          begin_group(++g);
        }
        __m512i right[Panels];
#pragma GCC unroll 4
        for (int p = 0; p < Panels; ++p)
          right[p] = block_values<First, Second, Table>(first + p * first_bytes,
                                                        second + p * second_bytes, quad, table);
#pragma GCC unroll 4
        for (int m = 0; m < Rows; ++m) {
          const __m512i x = _mm512_set1_epi32(load32(a + m * in.x->stride));
#pragma GCC unroll 4
          for (int p = 0; p < Panels; ++p) add_products(sum[m][p], right[p], x);
        }
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
#pragma GCC unroll 4
    for (int m = 0; m < Rows; ++m) {
      const __m512 scale = _mm512_set1_ps(in.x->scales[(in.row + m) * groups + shared]);
#pragma GCC unroll 4
      for (int p = 0; p < Panels; ++p) {
        float* c = in.c + m * in.c_stride + p * kPanel;
        const __m512 before = column == 0 ? _mm512_setzero_ps() : _mm512_loadu_ps(c);
        _mm512_storeu_ps(c, _mm512_fmadd_ps(part[m][p], scale, before));
      }
    }
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
  if (rows == 1)
    for (; panels >= 4; advance(4)) block_rows<First, Second, Table, 1, 4>(in);
  for (; panels >= 2; advance(2)) switch (rows) {
      case 1: block_rows<First, Second, Table, 1, 2>(in); break;
      case 2: block_rows<First, Second, Table, 2, 2>(in); break;
      case 3: block_rows<First, Second, Table, 3, 2>(in); break;
      case 4: block_rows<First, Second, Table, 4, 2>(in); break;
    }
  for (; panels > 0; advance(1)) switch (rows) {
      case 1: block_rows<First, Second, Table, 1, 1>(in); break;
      case 2: block_rows<First, Second, Table, 2, 1>(in); break;
      case 3: block_rows<First, Second, Table, 3, 1>(in); break;
      case 4: block_rows<First, Second, Table, 4, 1>(in); break;
    }
}

static void multiply_few_rows(const LinearWeight& weight, const Prepared& x, int64_t panel,
                              int64_t panels, int64_t row, int64_t rows, float* c,
                              int64_t c_stride) {
  const BlockRows in{&weight, &x, row, panel, c, c_stride, panels};
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
