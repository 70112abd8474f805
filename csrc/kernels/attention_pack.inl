// From slots in pages to panels for matrix products.

// Values are packed by interleaving the 128-bit lanes of two keys: inside a chunk of columns, their
// order is that of the instruction. kVectorLanes 1 is the natural order.
#if HEADRACE_LEVEL >= 2
constexpr int64_t kVectorLanes = 4;
#elif HEADRACE_LEVEL == 1
constexpr int64_t kVectorLanes = 2;
#else
constexpr int64_t kVectorLanes = 1;
#endif
constexpr int64_t kChunk = kVectorLanes > 2 ? 8 * kVectorLanes : kPanel;

// Where a packed block has column `d` of the values.
INLINE int64_t packed_column(int64_t d) {
  const int64_t chunk = 8 * kVectorLanes, r = d % chunk;
  return d - r + r % 8 / 4 * (4 * kVectorLanes) + r / 8 * 4 + r % 4;
}

constexpr int64_t kPanels = kKeyBlock / kPanel;

// Into the second-level cache, which can wait for more lines than the first.
INLINE void prefetch(const std::byte* line) { __builtin_prefetch(line, 0, 2); }

// Some consecutive slots. Each panel of sixteen entries lies in one piece: in a page, or in a copy
// where it reaches over pages or behind the last slot; there, entries and scales are zero.
struct KeyBlock {
  int64_t count;
  const std::byte* panels[kPanels];
  alignas(64) float scales[kKeyBlock];
};

// Where the slots of one plane are.
struct SlotMap {
  const PlaneView& plane;
  const AttentionTask& task;
  int64_t entry;  // bytes

  const std::byte* page(int64_t slot) const {
    return plane.pages + task.table[slot / plane.block_size] * plane.page_bytes;
  }
  const std::byte* at(int64_t slot) const {
    return page(slot) + plane.offsets[task.head] + slot % plane.block_size * entry;
  }
  const std::byte* scale_at(int64_t slot) const {
    return page(slot) + plane.scale_offsets[task.head] +
           slot % plane.block_size * static_cast<int64_t>(sizeof(float));
  }
};

// `copies` has room for the entries of a block.
static void locate(const PlaneView& plane, const AttentionTask& task, int64_t first, int64_t count,
                   std::byte* copies, KeyBlock& block) {
  const bool bytes = plane.scale_offsets != nullptr;
  const SlotMap map{plane, task, task.width * (bytes ? 1 : 2)};
  const int64_t panel_bytes = kPanel * map.entry;
  block.count = count;
  for (int64_t n = 0; n < count; n += kPanel, copies += panel_bytes) {
    const int64_t slot = first + n, keys = least(kPanel, count - n);
    const int64_t left = plane.block_size - slot % plane.block_size;  // in the page
    float* scales = block.scales + n;
    block.panels[n / kPanel] = copies;
    for (int64_t i = 0, run; i < keys; i += run) {
      run = i == 0 ? least(left, keys) : least(plane.block_size, keys - i);
      const std::byte* entries = map.at(slot + i);
      if (run == kPanel)
        block.panels[n / kPanel] = entries;
      else
        __builtin_memcpy(copies + i * map.entry, entries, run * map.entry);
      if (bytes)
        __builtin_memcpy(scales + i, map.scale_at(slot + i), run * sizeof(float));
    }
    // Scales are few and far between: without this they would be waited for, one by one.
    if (bytes && slot + kKeyBlock < task.end) prefetch(map.scale_at(slot + kKeyBlock));
    if (keys < kPanel) {
      __builtin_memset(copies + keys * map.entry, 0, (kPanel - keys) * map.entry);
      if (bytes) __builtin_memset(scales + keys, 0, (kPanel - keys) * sizeof(float));
    }
  }
}

// The panel to prefetch while `panel` is read: the same one of the next block, line by line, so
// that requests to memory are spread evenly; without a next block the panel itself.
INLINE const std::byte* panel_ahead(const KeyBlock& block, const KeyBlock* next, int64_t panel) {
  const bool there = next != nullptr && panel * kPanel < next->count;
  return there ? next->panels[panel] : block.panels[panel];
}

#if HEADRACE_LEVEL >= 2

// Up to 32 elements of an entry as bf16; zeros behind `count`.
template <bool Bytes>
INLINE __m512i load_entry(const std::byte* entry, int64_t column, int64_t count) {
  const __mmask32 mask = count >= 32 ? ~__mmask32{0} : (__mmask32{1} << count) - 1;
  if constexpr (!Bytes) return _mm512_maskz_loadu_epi16(mask, entry + column * 2);
  const __m256i bytes = _mm256_maskz_loadu_epi8(mask, entry + column);
  const auto widened = [](__m128i x) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x)); };
  const __m512 low = widened(_mm256_castsi256_si128(bytes));
  const __m512 high = widened(_mm256_extracti128_si256(bytes, 1));
#if HEADRACE_LEVEL >= 3
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
#else
  // Small whole numbers are exact: their lower halves are zero.
  const auto upper = [](__m512 x) {
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(x), 16));
  };
  return _mm512_inserti64x4(_mm512_castsi256_si512(upper(low)), upper(high), 1);
#endif
}

// Sixteen rows of sixteen 32-bit elements.
INLINE void transpose(__m512i* r) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // Row i + j of a group of four holds pair j of every lane.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    t[j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);
    t[4 + j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
    t[8 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
    t[12 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    r[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
    r[4 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0x88);
    r[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd);
    r[12 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0xdd);
  }
}

template <bool Bytes>
static void pack_keys(const KeyBlock& block, const KeyBlock* next, int64_t width,
                      uint16_t* out) {
  const int64_t entry = width * (Bytes ? 1 : 2);
  for (int64_t first = 0; first < block.count; first += kPanel, out += width * kPanel) {
    const std::byte* panel = block.panels[first / kPanel];
    const std::byte* ahead = panel_ahead(block, next, first / kPanel);
    for (int64_t column = 0; column < width; column += 32) {
      __m512i r[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        r[i] = load_entry<Bytes>(panel + i * entry, column, width - column);
        prefetch(ahead + i * entry + column * (Bytes ? 1 : 2));
      }
      transpose(r);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        if (column + 2 * i < width) _mm512_storeu_si512(out + (column + 2 * i) * kPanel, r[i]);
    }
  }
}

template <bool Bytes>
static void pack_values(const KeyBlock& block, const KeyBlock* next, int64_t width, int64_t keys,
                        uint16_t* out) {
  const int64_t entry = width * (Bytes ? 1 : 2), present = round_up(block.count, kPanel);
  for (int64_t column = 0; column < width; column += 32, out += 2 * kPanel * keys) {
    for (int64_t n = 0; n < present; n += 2) {
      const int64_t place = n % kPanel * entry;
      const std::byte* at = block.panels[n / kPanel] + place;
      const std::byte* ahead = panel_ahead(block, next, n / kPanel) + place;
      prefetch(ahead + column * (Bytes ? 1 : 2));
      prefetch(ahead + entry + column * (Bytes ? 1 : 2));
      const __m512i a = load_entry<Bytes>(at, column, width - column);
      const __m512i b = load_entry<Bytes>(at + entry, column, width - column);
      _mm512_storeu_si512(out + n * kPanel, _mm512_unpacklo_epi16(a, b));
      _mm512_storeu_si512(out + (keys + n) * kPanel, _mm512_unpackhi_epi16(a, b));
    }
    for (int64_t half = 0; half < 2; ++half)
      __builtin_memset(out + (half * keys + present) * kPanel, 0, (keys - present) * kPanel * 2);
  }
}

#elif HEADRACE_LEVEL == 1

// Up to 16 elements of an entry as bf16; zeros behind `count`.
template <bool Bytes>
INLINE __m256i load_entry(const std::byte* entry, int64_t column, int64_t count) {
  constexpr int64_t size = Bytes ? 1 : 2;
  const std::byte* at = entry + column * size;
  alignas(32) std::byte rest[16 * size];
  if (count < 16) {
    __builtin_memset(rest, 0, sizeof rest);
    __builtin_memcpy(rest, at, count * size);
    at = rest;
  }
  if constexpr (!Bytes) return _mm256_loadu_si256((const __m256i*)at);
  const __m128i bytes = _mm_loadu_si128((const __m128i*)at);
  // Small whole numbers are exact: their lower halves are zero.
  const auto upper = [](__m128i eight) {
    const __m256 values = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight));
    return _mm256_srli_epi32(_mm256_castps_si256(values), 16);
  };
  const __m256i both = _mm256_packus_epi32(upper(bytes), upper(_mm_unpackhi_epi64(bytes, bytes)));
  return _mm256_permute4x64_epi64(both, 0xd8);
}

// Eight rows of eight 32-bit elements.
INLINE void transpose(__m256i* r) {
  __m256i t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2x128_si256(r[i], r[4 + i], 0x20);
    t[4 + i] = _mm256_permute2x128_si256(r[i], r[4 + i], 0x31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}

template <bool Bytes>
static void pack_keys(const KeyBlock& block, const KeyBlock* next, int64_t width,
                      uint16_t* out) {
  const int64_t entry = width * (Bytes ? 1 : 2);
  for (int64_t first = 0; first < block.count; first += kPanel, out += width * kPanel)
    for (int64_t half = 0; half < 2; ++half) {
      const std::byte* keys = block.panels[first / kPanel] + half * 8 * entry;
      const std::byte* ahead = panel_ahead(block, next, first / kPanel) + half * 8 * entry;
      for (int64_t column = 0; column < width; column += 16) {
        __m256i r[8];
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
          r[i] = load_entry<Bytes>(keys + i * entry, column, width - column);
          if (column % 32 == 0) prefetch(ahead + i * entry + column * (Bytes ? 1 : 2));
        }
        transpose(r);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i)
          if (column + 2 * i < width)
            _mm256_storeu_si256((__m256i*)(out + (column + 2 * i) * kPanel + half * 16), r[i]);
      }
    }
}

template <bool Bytes>
static void pack_values(const KeyBlock& block, const KeyBlock* next, int64_t width, int64_t keys,
                        uint16_t* out) {
  const int64_t entry = width * (Bytes ? 1 : 2), present = round_up(block.count, kPanel);
  for (int64_t column = 0; column < width; column += 16, out += kPanel * keys) {
    for (int64_t n = 0; n < present; n += 2) {
      const int64_t place = n % kPanel * entry;
      const std::byte* at = block.panels[n / kPanel] + place;
      const std::byte* ahead = panel_ahead(block, next, n / kPanel) + place;
      prefetch(ahead + column * (Bytes ? 1 : 2));
      prefetch(ahead + entry + column * (Bytes ? 1 : 2));
      const __m256i a = load_entry<Bytes>(at, column, width - column);
      const __m256i b = load_entry<Bytes>(at + entry, column, width - column);
      _mm256_storeu_si256((__m256i*)(out + n * kPanel), _mm256_unpacklo_epi16(a, b));
      _mm256_storeu_si256((__m256i*)(out + n * kPanel + 16), _mm256_unpackhi_epi16(a, b));
    }
    __builtin_memset(out + present * kPanel, 0, (keys - present) * kPanel * 2);
  }
}

#else

template <bool Bytes>
INLINE uint16_t element(const std::byte* entry, int64_t column) {
  if constexpr (Bytes) {
    const float value = reinterpret_cast<const int8_t*>(entry)[column];
    return __builtin_bit_cast(uint32_t, value) >> 16;
  } else {
    return reinterpret_cast<const uint16_t*>(entry)[column];
  }
}

template <bool Bytes>
static void pack_keys(const KeyBlock& block, const KeyBlock*, int64_t width,
                      uint16_t* out) {
  for (int64_t first = 0; first < block.count; first += kPanel, out += width * kPanel)
    for (int64_t lane = 0; lane < kPanel; ++lane) {
      const std::byte* entry = block.panels[first / kPanel] + lane * width * (Bytes ? 1 : 2);
      for (int64_t column = 0; column < width; ++column)
        out[column / 2 * 32 + lane * 2 + column % 2] = element<Bytes>(entry, column);
    }
}

template <bool Bytes>
static void pack_values(const KeyBlock& block, const KeyBlock*, int64_t width, int64_t keys,
                        uint16_t* out) {
  const int64_t columns = round_up(width, kChunk);
  for (int64_t n = 0; n < keys; ++n) {
    const std::byte* entry =
        n < block.count ? block.panels[n / kPanel] + n % kPanel * width * (Bytes ? 1 : 2) : nullptr;
    for (int64_t d = 0; d < columns; ++d) {
      const int64_t at = packed_column(d);
      out[at / kPanel * kPanel * keys + n / 2 * 32 + at % kPanel * 2 + n % 2] =
          entry == nullptr || d >= width ? 0 : element<Bytes>(entry, d);
    }
  }
}

#endif
