// The choice of a block for a number of rows and panels. Rows go in blocks of nearly equal size.

#define HEADRACE_ROWS(call)                                                                      \
  switch (rows) {                                                                                \
    case 1: call(1); break;                                                                      \
    case 2: call(2); break;                                                                      \
    case 3: call(3); break;                                                                      \
    case 4: call(4); break;                                                                      \
    case 5: call(5); break;                                                                      \
    case 6: call(6); break;                                                                      \
    case 7: call(7); break;                                                                      \
    case 8: call(8); break;                                                                      \
    case 9: call(9); break;                                                                      \
    case 10: call(10); break;                                                                    \
    case 11: call(11); break;                                                                    \
    case 12: call(12); break;                                                                    \
  }

template <int Panels>
static void bf16_rows(int64_t rows, int64_t pairs, const uint16_t* a, int64_t a_stride,
                      const uint16_t* b, int64_t b_stride, float* c, int64_t c_stride,
                      bool accumulate) {
  constexpr int most = Panels > kWidePanels ? kNarrowRows : kMaxBf16Rows;
#define HEADRACE_CALL(n)                                                                         \
  if constexpr (n <= most)                                                                       \
  bf16_block<n <= most ? n : 1, Panels>(pairs, a, a_stride, b, b_stride, c, c_stride, accumulate)
  HEADRACE_ROWS(HEADRACE_CALL)
#undef HEADRACE_CALL
}

// Some panels times rows that fit in one block.
static void bf16_panels(int64_t rows, int64_t panels, int64_t pairs, const uint16_t* a,
                        int64_t a_stride, const uint16_t* b, int64_t b_stride, float* c,
                        int64_t c_stride, bool accumulate) {
  int64_t panel = 0;
  if constexpr (kNarrowPanels > kWidePanels) {
    if (rows <= kNarrowRows)
      for (; panel + kNarrowPanels <= panels; panel += kNarrowPanels)
        bf16_rows<kNarrowPanels>(rows, pairs, a, a_stride, b + panel * b_stride, b_stride,
                                 c + panel * kPanel, c_stride, accumulate);
  }
  if constexpr (kWidePanels > 1)
    for (; panel + kWidePanels <= panels; panel += kWidePanels)
      bf16_rows<kWidePanels>(rows, pairs, a, a_stride, b + panel * b_stride, b_stride,
                             c + panel * kPanel, c_stride, accumulate);
  for (; panel < panels; ++panel)
    bf16_rows<1>(rows, pairs, a, a_stride, b + panel * b_stride, b_stride, c + panel * kPanel,
                 c_stride, accumulate);
}

// C[m][16 * panel + lane] (+)= sum over k of A[m][k] * B[k][16 * panel + lane], in fp32.
//
// A is bf16 [rows, 2 * pairs]; element (k, n) of a panel lies at (k / 2) * 32 + n * 2 + k % 2.
// Strides are in elements.
static void multiply_bf16(int64_t rows, int64_t panels, int64_t pairs, const uint16_t* a,
                          int64_t a_stride, const uint16_t* b, int64_t b_panel_stride, float* c,
                          int64_t c_stride, bool accumulate) {
  int64_t row = 0;
#if HEADRACE_LEVEL >= 4
  if (rows >= kTileRows && pairs % 16 == 0) {
    configure_tiles(64);
    row = rows / kTileRows * kTileRows;
    for (int64_t panel = 0; panel < panels; panel += 2)
      multiply_tile_rows<Product::bf16>(row, panel + 1 < panels, pairs / 16, a, a_stride * 2,
                                        b + panel * b_panel_stride, b_panel_stride * 2,
                                        c + panel * kPanel, c_stride * 4, accumulate);
    release_tiles();
  }
#endif
  const int64_t left = rows - row;
  if (left <= 0) return;
  const int64_t blocks = (left + kMaxBf16Rows - 1) / kMaxBf16Rows;
  const int64_t most = (left + blocks - 1) / blocks;
  for (; row < rows; row += most)
    bf16_panels(least(most, rows - row), panels, pairs, a + row * a_stride, a_stride, b,
                b_panel_stride, c + row * c_stride, c_stride, accumulate);
}

template <int Panels, bool Nibbles>
static void integer_rows(int64_t rows, const IntegerBlock& block) {
  constexpr int limit = Nibbles ? kMaxNibbleRows : kMaxByteRows;
  constexpr int most = Panels > kWidePanels ? kNarrowRows : limit;
#define HEADRACE_CALL(n)                                                                         \
  if constexpr (n <= most) integer_block<n <= most ? n : 1, Panels, Nibbles>(block)
  HEADRACE_ROWS(HEADRACE_CALL)
#undef HEADRACE_CALL
}

// The integer product of all rows of x with up to kNarrowPanels panels, scales applied:
// c is [rows, c_stride].
template <bool Nibbles>
static void multiply_integer(const LinearWeight& weight, const Prepared& x, int64_t panel,
                             int64_t panels, int64_t row, int64_t rows, float* c,
                             int64_t c_stride) {
  constexpr int64_t limit = Nibbles ? kMaxNibbleRows : kMaxByteRows;
  const int64_t blocks = (rows + limit - 1) / limit, most = (rows + blocks - 1) / blocks;
  for (int64_t m = 0; m < rows; m += most) {
    const int64_t count = least(most, rows - m);
    int64_t p = 0;
    const int64_t ahead = m + count == rows ? panels * weight.panel_bytes() : 0;
    const auto at = [&] {
      return IntegerBlock{&weight, &x, row + m, panel + p, c + m * c_stride + p * kPanel, c_stride, ahead};
    };
    if constexpr (kNarrowPanels > kWidePanels) {
      if (count <= kNarrowRows)
        for (; p + kNarrowPanels <= panels; p += kNarrowPanels)
          integer_rows<kNarrowPanels, Nibbles>(count, at());
    }
    if constexpr (kWidePanels > 1)
      for (; p + kWidePanels <= panels; p += kWidePanels)
        integer_rows<kWidePanels, Nibbles>(count, at());
    for (; p < panels; ++p) integer_rows<1, Nibbles>(count, at());
  }
}
