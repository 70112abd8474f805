// Weights in planes of bits, whose groups have scales of one or two levels. 256 columns of a panel
// at a time are brought to bytes here: for rows by themselves, and for portable products.

constexpr int64_t kBlockColumns = kActivationGroup;
constexpr int64_t kLeastGroup = 16;

// Some columns of a panel.
struct BlockChunk {
  alignas(64) uint8_t values[kBlockColumns * kPanel];  // [columns / 4, 16, 4]
  float scales[kBlockColumns / kLeastGroup][kPanel];
  float lows[kBlockColumns / kLeastGroup][kPanel];
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
                         int64_t columns, BlockChunk& chunk) {
  const BlockParts& parts = weight.blocks;
  unpack_values(weight, panel, column, columns, chunk.values);
  unpack_scales(weight, panel, column, columns, parts.factors, parts.steps, chunk.scales);
  if (parts.low_factors != nullptr)
    unpack_scales(weight, panel, column, columns, parts.low_factors, parts.low_steps, chunk.lows);
}

// A row of the weight, dequantized.
static void row_of_blocks(const LinearWeight& weight, int64_t panel, int64_t lane, uint16_t* out) {
  const BlockParts& parts = weight.blocks;
  BlockChunk chunk;
  for (int64_t column = 0; column < weight.columns; column += kBlockColumns) {
    const int64_t columns = least(kBlockColumns, weight.padded_columns - column);
    unpack_chunk(weight, panel, column, columns, chunk);
    const int64_t known = least(columns, weight.columns - column);
    for (int64_t k = 0; k < known; ++k) {
      const int64_t g = k / weight.group, group = column / weight.group + g;
      const int stored = chunk.values[k / 4 * 64 + lane * 4 + k % 4];
      const int value = parts.table != nullptr ? parts.table[stored] : stored;
      const int zero = weight.zeros
                           ? weight.zeros[(panel * weight.groups() + group) * kPanel + lane]
                           : parts.zero;
      out[column + k] =
          parts.low_factors != nullptr
              ? to_bf16(static_cast<float>(value) * chunk.scales[g][lane] + chunk.lows[g][lane])
              : to_bf16(static_cast<float>(value - zero) * chunk.scales[g][lane]);
    }
  }
}

#if HEADRACE_LEVEL >= 1
#include "block_rows.inl"
#else
#include "block_chunks.inl"
#endif
