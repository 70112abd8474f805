// Products with weights in planes of bits in plain C++: columns of a panel are brought to bytes in
// the cache, and multiplied with all rows from there.

// Values as the table has them.
INLINE void look_up(const uint8_t* table, int64_t count, uint8_t* values) {
#pragma GCC unroll 16
  for (int64_t i = 0; i < count; ++i) values[i] = table[values[i]];
}

INLINE void group_sums(const uint8_t* b, const int8_t* a, int64_t quads, int32_t* sums) {
  for (int lane = 0; lane < kLanes; ++lane) sums[lane] = 0;
  for (int64_t quad = 0; quad < quads; ++quad, b += 64, a += 4)
    for (int lane = 0; lane < kLanes; ++lane)
      for (int j = 0; j < 4; ++j) sums[lane] += b[4 * lane + j] * a[j];
}

// c [16] (+)= a row times a chunk, which begins with column `column` and group `first`.
static void multiply_chunk(const LinearWeight& weight, const Prepared& x, const BlockChunk& chunk,
                           int64_t panel, int64_t column, int64_t columns, int64_t row, float* c) {
  const int64_t groups = weight.groups(), first = column / weight.group;
  const int8_t* a = x.bytes + row * x.stride + column;
  float part[kLanes] = {};
  for (int64_t g = 0; g < columns / weight.group; ++g) {
    int32_t sums[kLanes];
    group_sums(chunk.values + g * weight.group * kPanel, a + g * weight.group, weight.group / 4,
               sums);
    const int32_t offset = x.offsets[row * groups + first + g];
    if (weight.blocks.low_factors != nullptr) {
      const auto total = static_cast<float>(offset);
      for (int lane = 0; lane < kLanes; ++lane)
        part[lane] +=
            static_cast<float>(sums[lane]) * chunk.scales[g][lane] + total * chunk.lows[g][lane];
      continue;
    }
    const uint8_t* zeros =
        weight.zeros ? weight.zeros + (panel * groups + first + g) * kPanel : nullptr;
    for (int lane = 0; lane < kLanes; ++lane) {
      const int32_t sum = sums[lane] + (zeros ? zeros[lane] : 1) * offset;
      part[lane] += static_cast<float>(sum) * chunk.scales[g][lane];
    }
  }
  const float scale = x.scales[row * groups + first];
  for (int lane = 0; lane < kLanes; ++lane)
    c[lane] = (column == 0 ? 0.0f : c[lane]) + part[lane] * scale;
}

// c is [rows, c_stride], of `panels` panels.
static void multiply_blocks(const LinearWeight& weight, const Prepared& x, int64_t panel,
                            int64_t panels, int64_t row, int64_t rows, float* c,
                            int64_t c_stride, BlockChunk& chunk) {
  const uint8_t* table = weight.blocks.table;
  for (int64_t p = 0; p < panels; ++p)
    for (int64_t column = 0; column < weight.padded_columns; column += kBlockColumns) {
      const int64_t columns = least(kBlockColumns, weight.padded_columns - column);
      unpack_chunk(weight, panel + p, column, columns, chunk);
      if (table != nullptr) look_up(table, columns * kPanel, chunk.values);
      for (int64_t m = 0; m < rows; ++m)
        multiply_chunk(weight, x, chunk, panel + p, column, columns, row + m,
                       c + m * c_stride + p * kPanel);
    }
}
