// What every instruction set provides: one table of functions, each for the part of an operation
// that one thread does. The code is kernels/*.inl, compiled once per instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention_kernels.h"

namespace headrace {

constexpr int64_t kPanel = 16;  // output rows of a weight that are stored together

enum class Format : int { bf16 = 0, w8a8 = 1, w4a8 = 2, blocks = 3 };

// Values in planes of bits, and scales of one or two levels: a group's is factor * step. What a
// value q stands for is scale * (q - zero), or scale * q + low where there are lows.
struct BlockParts {
  int bits[2] = {0, 0};        // of the first plane, and of the one above it
  const uint8_t* planes[2] = {nullptr, nullptr};  // [panels, columns * bits / 32, 16, 4]
  const uint8_t* table = nullptr;  // 16: what values of four bits are, 128 more; or null
  int zero = 0;
  int64_t super = 1;          // groups that share a factor
  bool wide_factors = false;  // bfloat16, else half precision
  const uint16_t* factors = nullptr;      // [panels, groups / super, 16]
  const int8_t* steps = nullptr;          // [panels, groups, 16], or null: 1
  const uint16_t* low_factors = nullptr;  // the same of lows, or null
  const int8_t* low_steps = nullptr;
};

// A packed weight; the memory is the caller's. Shapes: docs/weights.md.
struct LinearWeight {
  Format format;
  int64_t panels;          // of 16 rows
  int64_t rows;            // rows of the result (half of the weight's rows if gated)
  int64_t columns;         // logical columns
  int64_t padded_columns;  // as stored
  int64_t group;           // columns that share a scale; padded_columns when a row has one
  bool gated;              // panels alternate gate and up; the result is silu(gate) * up
  const uint8_t* values;
  const void* scales;     // fp32 [panels * 16] (w8a8) or bf16 [panels, groups, 16] (w4a8)
  const uint8_t* zeros;   // [panels, groups, 16] or null: 8 (w4a8), 128 (w8a8)
  const float* bias;      // [panels * 16] in stored order, or null
  BlockParts blocks;      // in place of values and scales

  int64_t groups() const { return padded_columns / group; }
  int64_t panel_bytes() const {
    const int64_t bits = format == Format::bf16     ? 16
                         : format == Format::w8a8   ? 8
                         : format == Format::w4a8   ? 4
                                                    : blocks.bits[0] + blocks.bits[1];
    return kPanel * padded_columns * bits / 8;
  }
};

// Columns of activations that share a scale where weights have groups, of which it is a multiple.
constexpr int64_t kActivationGroup = 256;

// Activations as a kernel takes them, padded with zeros.
struct Prepared {
  int64_t rows;
  int64_t stride;    // elements from row to row, at least the weight's padded columns
  uint16_t* halves;  // bf16 [rows, stride]: what is multiplied, or what bytes are made of
  int8_t* bytes;     // int8 [rows, stride], unless halves are multiplied
  float* scales;     // [rows, groups], the same ones within kActivationGroup columns
  int32_t* offsets;  // [rows, groups]: minus the sum of the int8 values, times the zero point of
                     // symmetric formats; the sum itself where groups have lows
};

struct LinearCall {
  const LinearWeight* weight;
  const uint16_t* x;  // bf16 [rows, columns]
  int64_t x_stride;   // elements
  int64_t rows;
  const uint16_t* norm;      // weight [columns] of an RMS norm before the product, or null
  float epsilon;             // of that norm
  const uint16_t* residual;  // bf16 [rows, weight.rows], added to the result, or null
  int64_t residual_stride;
  void* out;  // [rows, weight.rows], bf16 or fp32
  int64_t out_stride;
  bool out_is_float;
  bool in_halves;  // whether activations are multiplied as bf16, else as int8
  Prepared prepared;
};

// The weights of a gated feed-forward, neuron by neuron; the memory is the caller's.
struct NeuronWeight {
  int64_t neurons, hidden;
  const void* values;       // bf16 or int8 [neurons, 3, hidden]: row of the gate, row of what it
                            // gates, and column of the product behind them
  const float* scales;      // [neurons, 3]: what a step of int8 stands for; null of bf16
  const float* inner_bias;  // [neurons, 2], or null

  int64_t neuron_bytes() const { return 3 * hidden * (scales == nullptr ? 2 : 1); }
};

// Some rows of activations, each of which goes through some neurons.
struct NeuronCall {
  const NeuronWeight* weight;
  const uint16_t* x;  // bf16 [rows, hidden]
  int64_t x_stride;   // elements
  int64_t rows;       // at most kNeuronRows
  const uint16_t* norm;  // weight [hidden] of an RMS norm before it, or null
  float epsilon;         // of that norm
  uint16_t* halves;      // [rows, hidden]: room for the norm
  std::byte* inputs;     // [rows, input_bytes]: what goes through the neurons, as products take it
  const uint8_t* takers;  // [neurons]: bit r for row r, which goes through the neuron

  // Room for fp32, or for two bytes of each value in whole vectors, a factor and a sum.
  int64_t input_bytes() const { return (weight->hidden * 4 + 63) / 64 * 64 + 192; }
};

constexpr int64_t kNeuronRows = 8;
constexpr int64_t kMaxNeuronHidden = 1 << 16;  // for which sums of bytes fit in 32 bits

// A scale search over groups of weights: value = scale * (q - zero), q in [lowest, highest].
struct ScaleSearch {
  const float* weights;  // [groups, size]
  int64_t size;
  const float* ends;  // [candidates]: where on its grid a group's largest value (with zero points:
  int64_t candidates;  // its span) is placed
  int lowest, highest;
  int zero;           // where no zero points are asked for
  bool round_scales;  // to bf16
  uint8_t* values;    // [groups, size]
  float* scales;      // [groups]
  uint8_t* zeros;     // [groups], or null
};

// Magnitudes below count as zero, so that scales stay clear of subnormal numbers.
constexpr float kSmallest = 1e-30f;

struct Kernels {
  const char* name;
  // Whether so many rows are multiplied as bf16; else they are quantized first.
  bool (*in_halves)(const LinearWeight& weight, int64_t rows);
  // Bytes of scratch that one thread needs for a linear call.
  size_t (*linear_scratch)(const LinearWeight& weight, int64_t rows);
  // Norm and quantization of rows [begin, end).
  void (*prepare)(const LinearCall& call, int64_t begin, int64_t end);
  // The product for panels [begin, end); both even if gated.
  void (*linear)(const LinearCall& call, int64_t begin, int64_t end, std::byte* scratch);
  // Rows `ids` [count] of a packed weight, dequantized, as bf16 [count, columns].
  void (*rows_of)(const LinearWeight& weight, const int64_t* ids, int64_t count, uint16_t* out);
  void (*rms_norm)(const uint16_t* x, int64_t stride, int64_t rows, int64_t width,
                   const uint16_t* weight, float epsilon, uint16_t* out);
  // Norm and inputs of row `row`.
  void (*prepare_neurons)(const NeuronCall& call, int64_t row);
  // What `count` neurons add to the result: sums [rows, hidden], which are set.
  void (*neurons)(const NeuronCall& call, const int32_t* ids, int64_t count, float* sums);
  // out [width] = the sum of `parts` [count] sums, `stride` apart, bias and residual (or null).
  void (*join)(const float* sums, int64_t parts, int64_t stride, int64_t width, const float* bias,
               const uint16_t* residual, uint16_t* out);
  void (*search_scales)(const ScaleSearch& search, int64_t begin, int64_t end);
  // The highest of `count` scores, a multiple of 16; NaN if one is.
  float (*highest)(const float* scores, int64_t count);
  // Read memory; the result keeps the loads alive.
  uint64_t (*read)(const std::byte* data, size_t bytes);
  // Run about `steps` instructions of the kernels' inner product; returns operations done.
  double (*peak_int8)(int64_t steps);
  double (*peak_bf16)(int64_t steps);
  AttentionKernels attention;
};

}  // namespace headrace
