// Many rows times weights in planes of bits: 256 columns of a few panels are brought to bytes in the
// cache, and multiplied with all rows from there.

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
static void multiply_chunks(const LinearWeight& weight, const Prepared& x, int64_t panel,
                            int64_t panels, int64_t row, int64_t rows, float* c, int64_t c_stride,
                            BlockChunk& chunk) {
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

