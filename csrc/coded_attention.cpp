#include <algorithm>
#include <stdexcept>
#include <vector>

#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include "context.h"

namespace nb = nanobind;

namespace headrace {

namespace {

constexpr int64_t kRowsAtOnce = 512;    // of a task: a unit is decoded once for all of them
constexpr int64_t kTasksPerThread = 4;  // so that threads finish together
constexpr int64_t kDecodingRows = 32;   // decoding a unit costs as much as attending so many rows

// How the coded units of a layer lie in pages; see NativeCodedAttention.
struct CodedLayer {
  CodedLayer(int64_t heads, int64_t slots, int64_t width, const CodedLines& keys,
             const CodedLines& values)
      : heads(heads), slots(slots), width(width), keys(keys), values(values) {
    if (heads < 1 || slots < 1 || width < 2 || width % 2 != 0 || width > kMaxHeadWidth)
      throw std::invalid_argument("coded units: width must be even, and at most " +
                                  std::to_string(kMaxHeadWidth));
    if (keys.lines != width || keys.length != slots || values.lines != slots ||
        values.length != width)
      throw std::invalid_argument("coded units: a line of keys is a channel, and of values a slot");
  }

  int64_t heads, slots, width;
  CodedLines keys, values;
};

// Rows with units before their own slots. The arrays are copied.
struct CodedRows {
  CodedRows(int64_t rows, int64_t unit_pages, uintptr_t starts, uintptr_t queries, uintptr_t units,
            uintptr_t table)
      : unit_pages(unit_pages) {
    const auto copy = [rows](uintptr_t address) {
      const auto* from = pointer<const int64_t>(address);
      return std::vector<int64_t>(from, from + rows);
    };
    this->starts = copy(starts);
    this->queries = copy(queries);
    this->units = copy(units);
    int64_t total = 0;
    for (const int64_t count : this->units) {
      first.push_back(total);
      total += count;
    }
    const auto* from = pointer<const int32_t>(table);
    this->table.assign(from, from + total * unit_pages);
  }

  int64_t unit_pages;
  std::vector<int64_t> starts, queries;  // [R]: the first of its inputs, and how many
  std::vector<int64_t> units, first;     // [R]: how many, and the place of the first
  std::vector<int32_t> table;            // [units of all rows, unit_pages]
};

struct CodedCall {
  const CodedLayer* layer;
  const CodedRows* rows;
  const std::byte* pages;
  int64_t page_bytes, heads;
  const uint16_t* q;
  int64_t q_stride, q_head_stride;
  const uint16_t *cos, *sin;
  float scale, softcap;
  uint16_t* out;  // [T, heads, width]: what it holds is merged with
  float* lse;     // [T, heads]

  int64_t ratio() const { return heads / layer->heads; }
};

// Queries of a row and KV head, and some of their units.
struct Piece {
  int64_t row, head, query, queries;
  int64_t begin, end;
  int64_t part;  // index of the partial result
};

struct Pieces {
  int64_t first, count;
};

class AttendCoded {
 public:
  AttendCoded(Context& context, const CodedCall& call)
      : context_(context), kernels_(context.kernels->attention), call_(call) {
    divide();
    const int64_t width = call.layer->width;
    const size_t partial = align64(pieces_.size() * most_rows_ * width * sizeof(float));
    const size_t lse = align64(pieces_.size() * most_rows_ * sizeof(float));
    scratch_bytes_ = 0;
    for (const Piece& piece : pieces_)
      scratch_bytes_ = std::max(scratch_bytes_, align64(kernels_.coded_scratch(task(piece))));
    std::byte* at = context.workspace(partial + lse + scratch_bytes_ * context.pool.threads());
    partial_ = reinterpret_cast<float*>(at);
    partial_lse_ = reinterpret_cast<float*>(at + partial);
    scratch_ = at + partial + lse;
  }

  void run() {
    context_.pool.run(pieces_.size(), [this](int64_t index, int thread) {
      const Piece& piece = pieces_[index];
      kernels_.attend_coded(task(piece), scratch_ + thread * scratch_bytes_);
      if (piece.begin == 0 && piece.end == call_.rows->units[piece.row]) merge({index, 1});
    });
    context_.pool.run(merges_.size(), [this](int64_t index, int) { merge(merges_[index]); });
  }

 private:
  void divide() {
    const CodedRows& rows = *call_.rows;
    const int64_t at_once = std::max<int64_t>(1, kRowsAtOnce / call_.ratio());
    const auto cost = [&](int64_t queries) { return queries * call_.ratio() + kDecodingRows; };
    const auto each = [&](const auto& visit) {
      for (size_t row = 0; row < rows.units.size(); ++row)
        for (int64_t head = 0; head < call_.layer->heads; ++head)
          for (int64_t query = 0; query < rows.queries[row]; query += at_once)
            visit(static_cast<int64_t>(row), head, query,
                  std::min(at_once, rows.queries[row] - query));
    };
    int64_t total = 0;
    each([&](int64_t row, int64_t, int64_t, int64_t queries) {
      total += rows.units[row] * cost(queries);
    });
    const int64_t tasks = context_.pool.threads() * kTasksPerThread;
    const int64_t target = std::max<int64_t>(1, total / tasks);
    each([&](int64_t row, int64_t head, int64_t query, int64_t queries) {
      const int64_t units = rows.units[row];
      const int64_t parts =
          std::clamp<int64_t>((units * cost(queries) + target - 1) / target, 1, units);
      if (parts > 1) merges_.push_back({static_cast<int64_t>(pieces_.size()), parts});
      for (int64_t part = 0; part < parts; ++part)
        pieces_.push_back({row, head, query, queries, units * part / parts,
                           units * (part + 1) / parts, static_cast<int64_t>(pieces_.size())});
      most_rows_ = std::max(most_rows_, queries * call_.ratio());
    });
  }

  CodedTask task(const Piece& piece) const {
    const CodedLayer& layer = *call_.layer;
    const CodedRows& rows = *call_.rows;
    const int64_t token = rows.starts[piece.row] + piece.query;
    return {
        .q = call_.q + token * call_.q_stride + piece.head * call_.ratio() * call_.q_head_stride,
        .q_stride = call_.q_stride,
        .q_head_stride = call_.q_head_stride,
        .cos = call_.cos + token * (layer.width / 2),
        .sin = call_.sin + token * (layer.width / 2),
        .queries = piece.queries,
        .ratio = call_.ratio(),
        .width = layer.width,
        .scale = call_.scale,
        .softcap = call_.softcap,
        .keys = &layer.keys,
        .values = &layer.values,
        .slots = layer.slots,
        .head = piece.head,
        .pages = call_.pages,
        .page_bytes = call_.page_bytes,
        .table = rows.table.data() + (rows.first[piece.row] + piece.begin) * rows.unit_pages,
        .units = piece.end - piece.begin,
        .unit_pages = rows.unit_pages,
        .partial = partial_ + piece.part * most_rows_ * layer.width,
        .lse = partial_lse_ + piece.part * most_rows_,
    };
  }

  void merge(const Pieces& parts) const {
    const Piece& piece = pieces_[parts.first];
    const int64_t width = call_.layer->width, heads = call_.heads;
    const int64_t token = call_.rows->starts[piece.row] + piece.query;
    const int64_t place = token * heads + piece.head * call_.ratio();
    kernels_.merge({
        .parts = parts.count,
        .rows = piece.queries * call_.ratio(),
        .stride = most_rows_,
        .ratio = call_.ratio(),
        .width = width,
        .partial = partial_ + parts.first * most_rows_ * width,
        .partial_lse = partial_lse_ + parts.first * most_rows_,
        .out = call_.out + place * width,
        .out_stride = heads * width,
        .lse = call_.lse + place,
        .lse_stride = heads,
        .onto = true,
    });
  }

  Context& context_;
  const AttentionKernels& kernels_;
  const CodedCall& call_;
  std::vector<Piece> pieces_;
  std::vector<Pieces> merges_;
  int64_t most_rows_ = 0;
  size_t scratch_bytes_ = 0;
  float *partial_ = nullptr, *partial_lse_ = nullptr;
  std::byte* scratch_ = nullptr;
};

using Place = std::pair<int64_t, int64_t>;

void make_lines(CodedLines* self, int64_t bits, int64_t lines, int64_t length, int64_t groups,
                int64_t rank, int64_t kept, const std::vector<Place>& places) {
  if (bits != 1 && bits != 2 && bits != 4 && bits != 8)
    throw std::invalid_argument("bits: must be 1, 2, 4 or 8");
  if (lines < 1 || length < 1 || length * bits % 8 != 0 || groups < 1 || length % groups != 0)
    throw std::invalid_argument("coded lines: a line needs whole bytes and whole groups");
  if (rank < 0 || rank > kMaxCodedRank || kept < 0 || kept > length)
    throw std::invalid_argument("coded lines: rank or outliers out of range");
  if (places.size() != 6) throw std::invalid_argument("coded lines: needs places of six parts");
  const auto part = [&](size_t index, bool needed) {
    if (needed && (places[index].first < 0 || places[index].second < 0))
      throw std::invalid_argument("coded lines: a part is missing");
    return CodedPart{needed ? places[index].first : -1, places[index].second};
  };
  new (self) CodedLines{bits,          lines,         length,           groups,
                        rank,          kept,          part(0, true),    part(1, true),
                        part(2, rank > 0), part(3, rank > 0), part(4, kept > 0), part(5, kept > 0)};
}

}  // namespace

void bind_coded_attention(nb::module_& module, nb::class_<Context>& context) {
  nb::class_<CodedLines>(module, "CodedLines")
      .def("__init__", &make_lines, nb::arg("bits"), nb::arg("lines"), nb::arg("length"),
           nb::arg("groups"), nb::arg("rank"), nb::arg("kept"), nb::arg("places"));
  nb::class_<CodedLayer>(module, "CodedLayer")
      .def(nb::init<int64_t, int64_t, int64_t, const CodedLines&, const CodedLines&>(),
           nb::arg("heads"), nb::arg("slots"), nb::arg("width"), nb::arg("keys"),
           nb::arg("values"))
      .def_ro("width", &CodedLayer::width);
  nb::class_<CodedRows>(module, "CodedRows")
      .def(nb::init<int64_t, int64_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t>(),
           nb::arg("rows"), nb::arg("unit_pages"), nb::arg("starts"), nb::arg("queries"),
           nb::arg("units"), nb::arg("table"));
  // Attention to units, merged into `out` and `lse`.
  context.def(
      "attend_coded",
      [](Context& self, const CodedLayer& layer, const CodedRows& rows, uintptr_t pages,
         int64_t page_bytes, int64_t heads, uintptr_t q, int64_t q_stride, int64_t q_head_stride,
         uintptr_t cos, uintptr_t sin, float scale, float softcap, uintptr_t out, uintptr_t lse) {
        if (heads < 1 || heads % layer.heads != 0)
          throw std::invalid_argument("heads: must be a multiple of the KV heads");
        const CodedCall call{
            &layer,
            &rows,
            pointer<const std::byte>(pages),
            page_bytes,
            heads,
            pointer<const uint16_t>(q),
            q_stride,
            q_head_stride,
            pointer<const uint16_t>(cos),
            pointer<const uint16_t>(sin),
            scale,
            softcap,
            pointer<uint16_t>(out),
            pointer<float>(lse),
        };
        nb::gil_scoped_release released;
        const std::lock_guard lock(self.busy);
        AttendCoded(self, call).run();
      });
}

}  // namespace headrace
