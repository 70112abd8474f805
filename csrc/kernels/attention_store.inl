// Rotation of queries and keys, and the write of keys and values into their pages.
// RoFormer: Enhanced Transformer with Rotary Position Embedding, section 3.2.

// Computed in fp32, where products of two halves are exact, and rounded once.
INLINE void rotate(const uint16_t* x, const uint16_t* cos, const uint16_t* sin, int64_t half,
                   uint16_t* out) {
  for (int64_t i = 0; i < half; ++i) {
    const float a = from_bf16(x[i]), b = from_bf16(x[half + i]);
    const float c = from_bf16(cos[i]), s = from_bf16(sin[i]);
    out[i] = to_bf16(a * c - b * s);
    out[half + i] = to_bf16(b * c + a * s);
  }
}

// Symmetric int8: the scale is the largest magnitude / 127. As an integer NaN is larger than all
// numbers, so that it becomes the scale.
INLINE float quantize(const uint16_t* x, int64_t width, int8_t* out) {
  int32_t bits = 0;
  for (int64_t i = 0; i < width; ++i) {
    const int32_t magnitude = (x[i] & 0x7fff) << 16;
    bits = magnitude > bits ? magnitude : bits;
  }
  float largest = __builtin_bit_cast(float, bits);
  largest = largest < 1e-30f ? 1e-30f : largest;
  const float factor = 1.0f / largest * 127.0f;
  for (int64_t i = 0; i < width; ++i) {
    // Not `nearest`: its addition might be fused with this product, which has to be rounded.
    const float level = __builtin_rintf(from_bf16(x[i]) * factor);
    out[i] = static_cast<int8_t>(level >= -127.0f && level <= 127.0f ? level : 0.0f);
  }
  return largest / 127.0f;
}

INLINE void store_entry(const PlaneView& plane, int64_t head, int64_t page, int64_t slot,
                        const uint16_t* entry, int64_t width) {
  std::byte* at = plane.pages + page * plane.page_bytes;
  std::byte* strip = at + plane.offsets[head];
  if (plane.scale_offsets == nullptr) {
    __builtin_memcpy(strip + slot * width * 2, entry, width * 2);
    return;
  }
  auto* scales = reinterpret_cast<float*>(at + plane.scale_offsets[head]);
  scales[slot] = quantize(entry, width, reinterpret_cast<int8_t*>(strip) + slot * width);
}

static void store_tokens(const StoreCall& in, int64_t begin, int64_t end) {
  const int64_t half = in.width / 2, ratio = in.heads / in.kv_heads;
  for (int64_t t = begin; t < end; ++t) {
    const uint16_t *cos = in.cos + t * half, *sin = in.sin + t * half;
    for (int64_t head = 0; head < in.kv_heads; ++head) {
      for (int64_t g = 0; g < ratio; ++g)
        rotate(in.q + t * in.q_stride + (head * ratio + g) * in.q_head_stride, cos, sin, half,
               in.rotated + ((head * in.tokens + t) * ratio + g) * in.width);
      const int64_t place = in.head_group[head] * in.tokens + t;
      const int64_t page = in.pages[place], slot = in.slots[place];
      uint16_t key[kMaxHeadWidth];
      rotate(in.k + t * in.k_stride + head * in.k_head_stride, cos, sin, half, key);
      store_entry(in.keys, head, page, slot, key, in.width);
      store_entry(in.values, head, page, slot,
                  in.v + t * in.v_stride + head * in.v_head_stride, in.width);
    }
  }
}
