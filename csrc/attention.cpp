#include "attention.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include <nanobind/stl/vector.h>

namespace nb = nanobind;

namespace headrace {
namespace {

constexpr int64_t kRowsAtOnce = 128;     // rows (queries times heads that share keys) of a task
constexpr int64_t kTasksPerThread = 4;   // so that threads finish together
constexpr int64_t kLeastSlots = 512;     // of a part; less is not worth merging
constexpr int64_t kPackingRows = 16;     // packing keys costs as much as attending so many rows
constexpr int64_t kTokensAtOnce = 16;    // that are stored by a task

// A tensor of a step: rows of heads, entries contiguous; strides in elements.
struct Heads {
  const uint16_t* data;
  int64_t stride, head_stride;
};

struct Call {
  const LayerCache* cache;
  const StepRows* step;
  int64_t heads;
  Heads q, k, v;
  const uint16_t *cos, *sin;
  float scale, softcap;  // 0: no cap
  int64_t window;        // 0: none
  bool causal;
  uint16_t* out;   // [T, heads, width]
  float* lse;      // [T, heads]
  float* sums;     // [kv_heads, sums_stride], or null
  int64_t sums_stride;

  int64_t ratio() const { return heads / cache->kv_heads(); }
};

// Queries [query, query + queries) of a row, and one part of what they see.
struct Piece {
  int64_t row, head, query, queries;
  int64_t begin, end;
  int64_t part;  // index of its partial result, or -1
};

struct Merge {
  int64_t piece;  // the first of its pieces
  int64_t parts;
};

struct Division {
  std::vector<Piece> pieces;
  std::vector<Merge> merges;
  int64_t parts = 0;
};

// The slots that some queries of a row see.
void visible(const Call& call, Piece& piece) {
  const StepRows& step = *call.step;
  const int64_t past = step.past[step.head_group[piece.head] * step.rows + piece.row];
  const int64_t first = past + piece.query;
  piece.begin = call.window > 0 ? std::max<int64_t>(0, first + 1 - call.window) : 0;
  // Panels then lie in one page. What comes before the window is in that page too.
  if (step.block_size % kPanel == 0) piece.begin -= piece.begin % kPanel;
  piece.end = call.causal ? first + piece.queries : past + step.lengths[piece.row];
}

int64_t cost(const Call& call, const Piece& piece) {
  return (piece.end - piece.begin) * (piece.queries * call.ratio() + kPackingRows);
}

Division divide(const Call& call, int threads) {
  const StepRows& step = *call.step;
  const int64_t at_once = std::max<int64_t>(1, kRowsAtOnce / call.ratio());
  std::vector<Piece> whole;
  int64_t total = 0;
  for (int64_t row = 0; row < step.rows; ++row)
    for (int64_t head = 0; head < call.cache->kv_heads(); ++head) {
      const int64_t length = step.lengths[row];
      // The last queries see most: they come first.
      for (int64_t query = (length - 1) / at_once * at_once; query >= 0; query -= at_once) {
        Piece piece{row, head, query, std::min(at_once, length - query), 0, 0, -1};
        visible(call, piece);
        total += cost(call, piece);
        whole.push_back(piece);
      }
    }
  if (threads == 1) return {std::move(whole), {}, 0};
  Division made;
  const int64_t target = std::max<int64_t>(1, total / (threads * kTasksPerThread));
  for (const Piece& piece : whole) {
    const int64_t slots = piece.end - piece.begin;
    const int64_t wanted = (cost(call, piece) + target - 1) / target;
    const int64_t parts = std::min(wanted, slots / kLeastSlots);
    if (parts <= 1) {
      made.pieces.push_back(piece);
      continue;
    }
    made.merges.push_back({static_cast<int64_t>(made.pieces.size()), parts});
    const int64_t blocks = (slots + kKeyBlock - 1) / kKeyBlock;
    for (int64_t part = 0; part < parts; ++part) {
      Piece some = piece;
      some.begin = piece.begin + blocks * part / parts * kKeyBlock;
      some.end = std::min(piece.end, piece.begin + blocks * (part + 1) / parts * kKeyBlock);
      some.part = made.parts++;
      made.pieces.push_back(some);
    }
  }
  return made;
}

// Parts of the working memory.
struct Memory {
  uint16_t* rotated;
  float* partial;      // [parts, most rows, width]
  float* partial_lse;  // [parts, most rows]
  std::byte* scratch;  // for each thread
  size_t scratch_bytes;
};

class Attend {
 public:
  Attend(Context& context, const Call& call)
      : context_(context), kernels_(context.kernels->attention), call_(call),
        division_(divide(call, context.pool.threads())) {
    for (const Piece& piece : division_.pieces)
      most_rows_ = std::max(most_rows_, piece.queries * call.ratio());
    const int64_t width = call.cache->width;
    const size_t rotated = align64(call.step->tokens * call.heads * width * sizeof(uint16_t));
    const size_t partial = align64(division_.parts * most_rows_ * width * sizeof(float));
    const size_t partial_lse = align64(division_.parts * most_rows_ * sizeof(float));
    memory_.scratch_bytes = align64(kernels_.scratch(most_rows_, width));
    const size_t scratch = memory_.scratch_bytes * context.pool.threads();
    std::byte* at = context.workspace(rotated + partial + partial_lse + scratch);
    memory_.rotated = reinterpret_cast<uint16_t*>(at);
    memory_.partial = reinterpret_cast<float*>(at += rotated);
    memory_.partial_lse = reinterpret_cast<float*>(at += partial);
    memory_.scratch = at + partial_lse;
  }

  void run() {
    store();
    context_.pool.run(division_.pieces.size(), [this](int64_t index, int thread) {
      kernels_.attend(task(division_.pieces[index]), scratch(thread));
    });
    context_.pool.run(division_.merges.size(),
                      [this](int64_t index, int) { merge(division_.merges[index]); });
    if (call_.sums != nullptr) sum_scores();
  }

 private:
  std::byte* scratch(int thread) const { return memory_.scratch + thread * memory_.scratch_bytes; }

  void store() {
    const StepRows& step = *call_.step;
    const StoreCall store{
        .heads = call_.heads,
        .kv_heads = call_.cache->kv_heads(),
        .width = call_.cache->width,
        .q = call_.q.data,
        .k = call_.k.data,
        .v = call_.v.data,
        .q_stride = call_.q.stride,
        .k_stride = call_.k.stride,
        .v_stride = call_.v.stride,
        .q_head_stride = call_.q.head_stride,
        .k_head_stride = call_.k.head_stride,
        .v_head_stride = call_.v.head_stride,
        .cos = call_.cos,
        .sin = call_.sin,
        .tokens = step.tokens,
        .rotated = memory_.rotated,
        .keys = call_.cache->keys(),
        .values = call_.cache->values(),
        .head_group = step.head_group.data(),
        .pages = step.token_pages.data(),
        .slots = step.token_slots.data(),
    };
    context_.pool.run((step.tokens + kTokensAtOnce - 1) / kTokensAtOnce, [&](int64_t index, int) {
      kernels_.store(store, index * kTokensAtOnce,
                     std::min(step.tokens, (index + 1) * kTokensAtOnce));
    });
  }

  AttentionTask task(const Piece& piece) const {
    const StepRows& step = *call_.step;
    const int64_t width = call_.cache->width, ratio = call_.ratio();
    const int64_t group = step.head_group[piece.head];
    const int64_t token = step.starts[piece.row] + piece.query;
    const bool whole = piece.part < 0;
    return {
        .q = memory_.rotated + (piece.head * step.tokens + token) * ratio * width,
        .rows = piece.queries * ratio,
        .ratio = ratio,
        .width = width,
        .first_slot = step.past[group * step.rows + piece.row] + piece.query,
        .window = call_.window,
        .causal = call_.causal,
        .scale = call_.scale,
        .softcap = call_.softcap,
        .keys = call_.cache->keys(),
        .values = call_.cache->values(),
        .head = piece.head,
        .table = step.table(group, piece.row),
        .begin = piece.begin,
        .end = piece.end,
        .out = call_.out + (token * call_.heads + piece.head * ratio) * width,
        .out_stride = call_.heads * width,
        .lse = whole ? call_.lse + token * call_.heads + piece.head * ratio
                     : memory_.partial_lse + piece.part * most_rows_,
        .lse_stride = call_.heads,
        .partial = whole ? nullptr : memory_.partial + piece.part * most_rows_ * width,
        .sums = nullptr,
    };
  }

  void merge(const Merge& merge) const {
    Piece piece = division_.pieces[merge.piece];
    const int64_t first = piece.part;
    piece.part = -1;
    const AttentionTask whole = task(piece);
    kernels_.merge({
        .parts = merge.parts,
        .rows = whole.rows,
        .stride = most_rows_,
        .ratio = whole.ratio,
        .width = whole.width,
        .partial = memory_.partial + first * most_rows_ * whole.width,
        .partial_lse = memory_.partial_lse + first * most_rows_,
        .out = whole.out,
        .out_stride = whole.out_stride,
        .lse = whole.lse,
        .lse_stride = whole.lse_stride,
        .onto = false,
    });
  }

  // Each task adds up all queries of a row over some slots of a head.
  void sum_scores() {
    const StepRows& step = *call_.step;
    const int64_t at_once = std::max<int64_t>(1, kRowsAtOnce / call_.ratio());
    std::vector<Piece> pieces;
    for (int64_t row = 0; row < step.rows; ++row)
      for (int64_t head = 0; head < call_.cache->kv_heads(); ++head) {
        const int64_t context = step.context(step.head_group[head], row);
        for (int64_t begin = 0; begin < context; begin += kLeastSlots)
          pieces.push_back({row, head, 0, 0, begin, std::min(begin + kLeastSlots, context), -1});
      }
    context_.pool.run(pieces.size(), [&](int64_t index, int thread) {
      const Piece& slots = pieces[index];
      const int64_t place = step.head_group[slots.head] * step.rows + slots.row;
      float* sums = call_.sums + slots.head * call_.sums_stride + step.score_starts[place];
      std::memset(sums + slots.begin, 0, (slots.end - slots.begin) * sizeof(float));
      for (int64_t query = 0; query < step.lengths[slots.row]; query += at_once) {
        Piece some = slots;
        some.query = query;
        some.queries = std::min(at_once, step.lengths[slots.row] - query);
        visible(call_, some);
        some.begin = std::max(some.begin, slots.begin);
        some.end = std::min(some.end, slots.end);
        AttentionTask part = task(some);
        part.sums = sums + some.begin;
        kernels_.sum_scores(part, scratch(thread));
      }
    });
  }

  Context& context_;
  const AttentionKernels& kernels_;
  const Call& call_;
  Division division_;
  Memory memory_;
  int64_t most_rows_ = 0;
};

void check(const LayerCache& cache, const StepRows& step, int64_t heads) {
  if (heads < 1 || heads % cache.kv_heads() != 0)
    throw std::invalid_argument("heads: must be a multiple of the KV heads");
  if (static_cast<int64_t>(step.head_group.size()) != cache.kv_heads())
    throw std::invalid_argument("the step was planned for another number of KV heads");
  if (step.block_size != cache.block_size)
    throw std::invalid_argument("the step was planned for another block size");
}

template <class T>
std::vector<T> copied(uintptr_t address, int64_t count) {
  const T* data = pointer<const T>(address);
  return {data, data + count};
}

}  // namespace

LayerCache::LayerCache(uintptr_t pages, int64_t page_bytes, int64_t block_size, int64_t width,
                       std::vector<int64_t> keys, std::vector<int64_t> values,
                       std::vector<int64_t> key_scales, std::vector<int64_t> value_scales)
    : pages(pointer<std::byte>(pages)),
      page_bytes(page_bytes),
      block_size(block_size),
      width(width),
      key_offsets(std::move(keys)),
      value_offsets(std::move(values)),
      key_scale_offsets(std::move(key_scales)),
      value_scale_offsets(std::move(value_scales)) {
  if (width < 2 || width % 2 != 0 || width > kMaxHeadWidth)
    throw std::invalid_argument("width: must be even, from 2 to " + std::to_string(kMaxHeadWidth));
  const size_t scales = key_scale_offsets.size();
  if (key_offsets.empty() || value_offsets.size() != key_offsets.size() ||
      value_scale_offsets.size() != scales || (scales != 0 && scales != key_offsets.size()))
    throw std::invalid_argument("offsets: keys, values and their scales need one per head");
}

PlaneView LayerCache::view(const std::vector<int64_t>& offsets,
                           const std::vector<int64_t>& scales) const {
  return {pages, page_bytes, block_size, offsets.data(), scales.empty() ? nullptr : scales.data()};
}

StepRows::StepRows(int64_t rows, int64_t groups, int64_t pages, int64_t kv_heads,
                   int64_t block_size, uintptr_t lengths, uintptr_t past, uintptr_t tables,
                   uintptr_t head_group)
    : rows(rows),
      groups(groups),
      pages(pages),
      block_size(block_size),
      tokens(0),
      lengths(copied<int64_t>(lengths, rows)),
      past(copied<int64_t>(past, groups * rows)),
      tables(copied<int32_t>(tables, groups * rows * pages)),
      head_group(copied<int64_t>(head_group, kv_heads)) {
  for (const int64_t group : this->head_group)
    if (group < 0 || group >= groups) throw std::invalid_argument("head_group: no such group");
  for (const int64_t length : this->lengths) {
    if (length < 1) throw std::invalid_argument("lengths: every row needs a query");
    starts.push_back(tokens);
    tokens += length;
  }
  for (int64_t group = 0; group < groups; ++group) {
    int64_t start = 0;
    for (int64_t row = 0; row < rows; ++row) {
      if (this->past[group * rows + row] < 0 || context(group, row) > pages * block_size)
        throw std::invalid_argument("tables: too few pages for the context of a row");
      score_starts.push_back(start);
      start += context(group, row);
      for (int64_t slot = this->past[group * rows + row]; slot < context(group, row); ++slot) {
        token_pages.push_back(table(group, row)[slot / block_size]);
        token_slots.push_back(static_cast<int32_t>(slot % block_size));
      }
    }
  }
}

void bind_attention(nb::module_& module, nb::class_<Context>& context) {
  nb::class_<LayerCache>(module, "LayerCache")
      .def(nb::init<uintptr_t, int64_t, int64_t, int64_t, std::vector<int64_t>,
                    std::vector<int64_t>, std::vector<int64_t>, std::vector<int64_t>>(),
           nb::arg("pages"), nb::arg("page_bytes"), nb::arg("block_size"), nb::arg("width"),
           nb::arg("keys"), nb::arg("values"), nb::arg("key_scales"), nb::arg("value_scales"));
  nb::class_<StepRows>(module, "StepRows")
      .def(nb::init<int64_t, int64_t, int64_t, int64_t, int64_t, uintptr_t, uintptr_t, uintptr_t,
                    uintptr_t>(),
           nb::arg("rows"), nb::arg("groups"), nb::arg("pages"), nb::arg("kv_heads"),
           nb::arg("block_size"), nb::arg("lengths"), nb::arg("past"), nb::arg("tables"),
           nb::arg("head_group"))
      .def_prop_ro("tokens", [](const StepRows& self) { return self.tokens; });
  // Each of q, k, v is (address, stride from token to token, stride from head to head).
  context.def(
      "attend",
      [](Context& self, const LayerCache& cache, const StepRows& step, int64_t heads, uintptr_t q,
         int64_t q_stride, int64_t q_head_stride, uintptr_t k, int64_t k_stride,
         int64_t k_head_stride, uintptr_t v, int64_t v_stride, int64_t v_head_stride,
         uintptr_t cos, uintptr_t sin, float scale, float softcap, int64_t window, bool causal,
         uintptr_t out, uintptr_t lse, uintptr_t sums, int64_t sums_stride) {
        check(cache, step, heads);
        const Call call{
            &cache,
            &step,
            heads,
            {pointer<const uint16_t>(q), q_stride, q_head_stride},
            {pointer<const uint16_t>(k), k_stride, k_head_stride},
            {pointer<const uint16_t>(v), v_stride, v_head_stride},
            pointer<const uint16_t>(cos),
            pointer<const uint16_t>(sin),
            scale,
            softcap,
            window,
            causal,
            pointer<uint16_t>(out),
            pointer<float>(lse),
            pointer<float>(sums),
            sums_stride,
        };
        nb::gil_scoped_release released;
        const std::lock_guard lock(self.busy);
        Attend(self, call).run();
      });
}

}  // namespace headrace
