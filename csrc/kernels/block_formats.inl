// Products with weights in planes of bits, whose groups have scales of one or two levels: 256 columns
// of a few panels are brought to bytes in the cache, and multiplied with all rows from there.

constexpr int64_t kBlockColumns = kActivationGroup;
constexpr int64_t kLeastGroup = 16;
constexpr int64_t kBlockPanels = 4;  // at once

// Memory of a thread for one chunk of some panels.
struct BlockChunk {
  uint8_t values[kBlockPanels][kBlockColumns * kPanel];  // [columns / 4, 16, 4]
  float scales[kBlockPanels][kBlockColumns / kLeastGroup][kPanel];
  float lows[kBlockPanels][kBlockColumns / kLeastGroup][kPanel];
};

INLINE float from_half(uint16_t half) {
  const uint32_t magnitude = uint32_t{half & 0x7fffu} << 13;
  const float value = __builtin_bit_cast(float, magnitude) * 0x1p112f;
  uint32_t bits = __builtin_bit_cast(uint32_t, value);
  bits = (half & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000 : bits;
  return __builtin_bit_cast(float, bits | uint32_t{half & 0x8000u} << 16);
}

// Bytes two by two, since no instruction shifts single ones.
typedef uint16_t Pairs __attribute__((vector_size(64)));

// 64 fields of so many bits, one of each byte.
template <int Bits>
INLINE Pairs plane_values(const uint8_t* plane, int place) {
  Pairs bytes;
  __builtin_memcpy(&bytes, plane, sizeof bytes);
  constexpr uint16_t field = (1 << Bits) - 1;
  return (bytes >> static_cast<uint16_t>(Bits * place)) & static_cast<uint16_t>(field << 8 | field);
}

// The values of some columns of a panel: a first plane of bits, and a second above it.
template <int First, int Second>
static void unpack_planes(const LinearWeight& weight, int64_t panel, int64_t column,
                          int64_t columns, uint8_t* out) {
  const BlockParts& parts = weight.blocks;
  const int64_t start = (panel * weight.padded_columns + column) * kPanel / 8;
  const uint8_t* first = parts.planes[0] + start * First;
  const uint8_t* second = parts.planes[1] + start * Second;
  for (int64_t done = 0; done < columns; done += 32, first += 64 * First, second += 64 * Second)
#pragma GCC unroll 8
    for (int quad = 0; quad < 8; ++quad, out += 64) {
      constexpr int each = 8 / First, others = Second == 0 ? 1 : 8 / (Second == 0 ? 1 : Second);
      Pairs value = plane_values<First>(first + quad / each * 64, quad % each);
      if constexpr (Second > 0)
        value |= plane_values<Second>(second + quad / others * 64, quad % others) << First;
      __builtin_memcpy(out, &value, sizeof value);
    }
}

// Values of four bits as the table has them, 128 more.
INLINE void look_up(const uint8_t* table, int64_t count, uint8_t* values) {
#if HEADRACE_LEVEL >= 1
  const __m256i entries = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table));
  for (int64_t i = 0; i < count; i += 32) {
    const __m256i found =
        _mm256_shuffle_epi8(entries, _mm256_loadu_si256((const __m256i*)(values + i)));
    _mm256_storeu_si256((__m256i*)(values + i), found);
  }
#else
  for (int64_t i = 0; i < count; ++i) values[i] = table[values[i]];
#endif
}

static void unpack_values(const LinearWeight& weight, int64_t panel, int64_t column,
                          int64_t columns, uint8_t* out) {
  const BlockParts& parts = weight.blocks;
  switch (parts.bits[0] * 10 + parts.bits[1]) {
    case 20: unpack_planes<2, 0>(weight, panel, column, columns, out); break;
    case 21: unpack_planes<2, 1>(weight, panel, column, columns, out); break;
    case 40: unpack_planes<4, 0>(weight, panel, column, columns, out); break;
    case 41: unpack_planes<4, 1>(weight, panel, column, columns, out); break;
    case 42: unpack_planes<4, 2>(weight, panel, column, columns, out); break;
    case 80: unpack_planes<8, 0>(weight, panel, column, columns, out); break;
  }
  if (parts.table != nullptr) look_up(parts.table, columns * kPanel, out);
}

// factor * step of each group from the column on.
INLINE void unpack_scales(const LinearWeight& weight, int64_t panel, int64_t column,
                          int64_t columns, const uint16_t* factors, const int8_t* steps,
                          float (*out)[kPanel]) {
  const BlockParts& parts = weight.blocks;
  const int64_t groups = weight.groups(), supers = (groups + parts.super - 1) / parts.super;
  const int64_t first = column / weight.group;
  float level[kPanel];
  for (int64_t g = 0; g < columns / weight.group; ++g) {
    if (g == 0 || (first + g) % parts.super == 0) {
      const uint16_t* factor = factors + (panel * supers + (first + g) / parts.super) * kPanel;
      for (int lane = 0; lane < kLanes; ++lane)
        level[lane] = parts.wide_factors ? from_bf16(factor[lane]) : from_half(factor[lane]);
    }
    const int8_t* step = steps == nullptr ? nullptr : steps + (panel * groups + first + g) * kPanel;
    for (int lane = 0; lane < kLanes; ++lane)
      out[g][lane] = step == nullptr ? level[lane] : level[lane] * static_cast<float>(step[lane]);
  }
}

static void unpack_chunk(const LinearWeight& weight, int64_t panel, int64_t column,
                         int64_t columns, int64_t place, BlockChunk& chunk) {
  const BlockParts& parts = weight.blocks;
  unpack_values(weight, panel, column, columns, chunk.values[place]);
  unpack_scales(weight, panel, column, columns, parts.factors, parts.steps, chunk.scales[place]);
  if (parts.low_factors != nullptr)
    unpack_scales(weight, panel, column, columns, parts.low_factors, parts.low_steps,
                  chunk.lows[place]);
}

// What a chunk adds to some rows and panels of the result.
struct ChunkProduct {
  const LinearWeight* weight;
  const Prepared* x;
  const BlockChunk* chunk;
  int64_t column, columns;
  int64_t row, panel, place;  // of the first; `place` counts panels in the chunk
  float* c;
  int64_t c_stride;
};

#if HEADRACE_LEVEL >= 2

#include "block_rows.inl"

template <int Rows, int Panels>
static void multiply_chunk(const ChunkProduct& in) {
  const LinearWeight& weight = *in.weight;
  const int64_t groups = weight.groups(), first = in.column / weight.group;
  const int64_t quads = weight.group / 4;
  const bool has_lows = weight.blocks.low_factors != nullptr;
  const int8_t* a = in.x->bytes + in.row * in.x->stride + in.column;
  const int32_t* offsets = in.x->offsets + in.row * groups + first;
  const uint8_t* b = in.chunk->values[in.place];
  constexpr int64_t next = sizeof in.chunk->values[0];
  __m512 part[Rows][Panels];
#pragma GCC unroll 8
  for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 4
    for (int p = 0; p < Panels; ++p) part[m][p] = _mm512_setzero_ps();
  for (int64_t g = 0; g < in.columns / weight.group; ++g) {
    __m512i sum[Rows][Panels];
#pragma GCC unroll 8
    for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 4
      for (int p = 0; p < Panels; ++p) {
        const uint8_t* zeros =
            weight.zeros
                ? weight.zeros + ((in.panel + p) * groups + first + g) * kPanel
                : nullptr;
        sum[m][p] = has_lows ? _mm512_setzero_si512() : zero_term(zeros, offsets[m * groups + g]);
      }
    for (int64_t quad = 0; quad < quads; ++quad, b += 64, a += 4) {
      __m512i right[Panels];
#pragma GCC unroll 4
      for (int p = 0; p < Panels; ++p) right[p] = _mm512_loadu_si512(b + p * next);
#pragma GCC unroll 8
      for (int m = 0; m < Rows; ++m) {
        const __m512i x = _mm512_set1_epi32(load32(a + m * in.x->stride));
#pragma GCC unroll 4
        for (int p = 0; p < Panels; ++p) add_products(sum[m][p], right[p], x);
      }
    }
#pragma GCC unroll 4
    for (int p = 0; p < Panels; ++p) {
      const __m512 scale = _mm512_loadu_ps(in.chunk->scales[in.place + p][g]);
#pragma GCC unroll 8
      for (int m = 0; m < Rows; ++m)
        part[m][p] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[m][p]), scale, part[m][p]);
      if (!has_lows) continue;
      const __m512 low = _mm512_loadu_ps(in.chunk->lows[in.place + p][g]);
#pragma GCC unroll 8
      for (int m = 0; m < Rows; ++m) {
        const __m512 total = _mm512_set1_ps(static_cast<float>(offsets[m * groups + g]));
        part[m][p] = _mm512_fmadd_ps(total, low, part[m][p]);
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < Rows; ++m) {
    const __m512 scale = _mm512_set1_ps(in.x->scales[(in.row + m) * groups + first]);
#pragma GCC unroll 4
    for (int p = 0; p < Panels; ++p) {
      float* c = in.c + m * in.c_stride + p * kPanel;
      const __m512 before = in.column == 0 ? _mm512_setzero_ps() : _mm512_loadu_ps(c);
      _mm512_storeu_ps(c, _mm512_fmadd_ps(part[m][p], scale, before));
    }
  }
}

#else

#if HEADRACE_LEVEL == 1

// Sums of a group for one row and panel. The values may have all eight bits: products of 16 bits are
// exact.
INLINE void group_sums(const uint8_t* b, const int8_t* a, int64_t quads, int32_t* sums) {
  __m256i sum[4] = {};
  for (int64_t quad = 0; quad < quads; ++quad, b += 64, a += 4) {
    const __m256i x = _mm256_cvtepi8_epi16(_mm_set1_epi32(static_cast<int>(load32(a))));
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) {
      const __m256i w = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(b + 16 * part)));
      sum[part] = _mm256_add_epi32(sum[part], _mm256_madd_epi16(w, x));
    }
  }
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const __m256i pairs = _mm256_hadd_epi32(sum[2 * half], sum[2 * half + 1]);
    _mm256_storeu_si256((__m256i*)(sums + 8 * half), _mm256_permute4x64_epi64(pairs, 0xd8));
  }
}

#else

INLINE void group_sums(const uint8_t* b, const int8_t* a, int64_t quads, int32_t* sums) {
  for (int lane = 0; lane < kLanes; ++lane) sums[lane] = 0;
  for (int64_t quad = 0; quad < quads; ++quad, b += 64, a += 4)
    for (int lane = 0; lane < kLanes; ++lane)
      for (int j = 0; j < 4; ++j) sums[lane] += b[4 * lane + j] * a[j];
}

#endif

template <int Rows, int Panels>
static void multiply_chunk(const ChunkProduct& in) {
  static_assert(Rows == 1 && Panels == 1);
  const LinearWeight& weight = *in.weight;
  const int64_t groups = weight.groups(), first = in.column / weight.group;
  const bool has_lows = weight.blocks.low_factors != nullptr;
  const int8_t* a = in.x->bytes + in.row * in.x->stride + in.column;
  const int32_t* offsets = in.x->offsets + in.row * groups + first;
  float part[kLanes] = {};
  for (int64_t g = 0; g < in.columns / weight.group; ++g) {
    int32_t sums[kLanes];
    group_sums(in.chunk->values[in.place] + g * weight.group * kPanel, a + g * weight.group,
               weight.group / 4, sums);
    const float* scales = in.chunk->scales[in.place][g];
    if (has_lows) {
      const float* lows = in.chunk->lows[in.place][g];
      const auto total = static_cast<float>(offsets[g]);
      for (int lane = 0; lane < kLanes; ++lane)
        part[lane] += static_cast<float>(sums[lane]) * scales[lane] + total * lows[lane];
      continue;
    }
    const uint8_t* zeros =
        weight.zeros ? weight.zeros + (in.panel * groups + first + g) * kPanel : nullptr;
    for (int lane = 0; lane < kLanes; ++lane) {
      const int32_t sum = sums[lane] + (zeros ? zeros[lane] : 1) * offsets[g];
      part[lane] += static_cast<float>(sum) * scales[lane];
    }
  }
  const float scale = in.x->scales[in.row * groups + first];
  for (int lane = 0; lane < kLanes; ++lane)
    in.c[lane] = (in.column == 0 ? 0.0f : in.c[lane]) + part[lane] * scale;
}

#endif

// Rows and panels that one pass over a chunk takes.
constexpr int kChunkRows = HEADRACE_LEVEL >= 2 ? 4 : 1;
constexpr int kChunkPanels = HEADRACE_LEVEL >= 2 ? 4 : 1;

template <int Panels>
static void multiply_chunk_rows(int64_t rows, const ChunkProduct& in) {
  switch (rows) {
    case 1: multiply_chunk<1, Panels>(in); break;
#if HEADRACE_LEVEL >= 2
    case 2: multiply_chunk<2, Panels>(in); break;
    case 3: multiply_chunk<3, Panels>(in); break;
    case 4: multiply_chunk<4, Panels>(in); break;
#endif
  }
}

// c [rows, panels * 16] of up to kBlockPanels panels.
static void multiply_blocks(const LinearWeight& weight, const Prepared& x, int64_t panel,
                            int64_t panels, int64_t row, int64_t rows, float* c, int64_t c_stride,
                            BlockChunk& chunk) {
#if HEADRACE_LEVEL >= 2
  if (rows <= kDirectRows)
    return multiply_few_rows(weight, x, panel, panels, row, rows, c, c_stride);
#endif
  for (int64_t column = 0; column < weight.padded_columns; column += kBlockColumns) {
    const int64_t columns = least(kBlockColumns, weight.padded_columns - column);
    for (int64_t p = 0; p < panels; ++p)
      unpack_chunk(weight, panel + p, column, columns, p, chunk);
    for (int64_t m = 0; m < rows; m += kChunkRows) {
      const int64_t count = least(kChunkRows, rows - m);
      int64_t p = 0;
      const auto at = [&] {
        return ChunkProduct{&weight, &x,        &chunk, column, columns, row + m, panel + p,
                            p,       c + m * c_stride + p * kPanel, c_stride};
      };
      if constexpr (kChunkPanels > 1) {
        for (; p + 4 <= panels; p += 4) multiply_chunk_rows<4>(count, at());
        for (; p + 2 <= panels; p += 2) multiply_chunk_rows<2>(count, at());
      }
      for (; p < panels; ++p) multiply_chunk_rows<1>(count, at());
    }
  }
}

// A row of the weight, dequantized.
static void row_of_blocks(const LinearWeight& weight, int64_t panel, int64_t lane, BlockChunk& chunk,
                          uint16_t* out) {
  for (int64_t column = 0; column < weight.columns; column += kBlockColumns) {
    const int64_t columns = least(kBlockColumns, weight.padded_columns - column);
    unpack_chunk(weight, panel, column, columns, 0, chunk);
    const int64_t known = least(columns, weight.columns - column);
    for (int64_t k = 0; k < known; ++k) {
      const int64_t g = k / weight.group, group = column / weight.group + g;
      const int value = chunk.values[0][k / 4 * 64 + lane * 4 + k % 4];
      const int zero = weight.zeros
                           ? weight.zeros[(panel * weight.groups() + group) * kPanel + lane]
                           : weight.blocks.zero;
      out[column + k] =
          weight.blocks.low_factors != nullptr
              ? to_bf16(static_cast<float>(value) * chunk.scales[0][g][lane] + chunk.lows[0][g][lane])
              : to_bf16(static_cast<float>(value - zero) * chunk.scales[0][g][lane]);
    }
  }
}
