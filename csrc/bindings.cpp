// SPDX-License-Identifier: Apache-2.0
// The Python module _C: pointers, strides and a stream come in as integers. No tensor type, no
// logic.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "attention/cover.h"
#include "attention/short_groups.h"
#include "gradients.h"
#include "params.h"
#if SPARSE_ATTN_CUDA
#include "dispatch.h"
#endif

namespace py = pybind11;
using namespace sparse_attn;

namespace {

SequenceView sequence_view(int length, int groups, int max_rows, int offset, int group_step,
                           int run, int run_stride) {
  return {length, groups, max_rows, offset, group_step, Divisor::of(run), Divisor::of(run_stride)};
}

Run make_run(int length, int window, const std::vector<int>& chunks, bool past, bool future) {
  if (chunks.size() > kMaxChunks) throw py::value_error("too many chunk lengths");
  Run run{length, window, {}, static_cast<int>(chunks.size()), past, future};
  for (size_t i = 0; i < chunks.size(); ++i) run.chunks[i] = Divisor::of(chunks[i]);
  return run;
}

Branch make_branch(const SequenceView& queries, const Run& run,
                   const std::vector<std::pair<SequenceView, int>>& segments, int block) {
  if (segments.size() > kMaxSegments) throw py::value_error("too many segments");
  Branch branch{queries, run, {}, static_cast<int>(segments.size()), {block, 0, 0, nullptr}};
  for (size_t i = 0; i < segments.size(); ++i) {
    branch.segments[i] = {segments[i].first, static_cast<Part>(segments[i].second)};
  }
  return branch;
}

Branch with_blocks(Branch branch, int64_t rows, int words, int64_t head_stride) {
  branch.blocks = {branch.blocks.size, words, head_stride, reinterpret_cast<const uint32_t*>(rows)};
  return branch;
}

py::bytes cover_bytes(const std::vector<Branch>& branches, int length, int tile_queries,
                      int tile_keys) {
  const std::vector<uint8_t> counts = cover(branches, length, tile_queries, tile_keys);
  return py::bytes(reinterpret_cast<const char*>(counts.data()), counts.size());
}

Element element(bool bfloat16) { return bfloat16 ? Element::bfloat16 : Element::float16; }

using Strides = std::array<int64_t, 3>;  // of batch, head and row, in elements

TensorView without_address(const Strides& strides) {
  return {nullptr, strides[0], strides[1], static_cast<int>(strides[2])};
}

CallParams call_params(const Strides& q, const Strides& k, const Strides& v, const Strides& out,
                       int batch, int heads, int first_head, int head_count, int kv_heads, int seq,
                       int head_dim, int head_dim_v, float scale, bool bfloat16, bool sm90,
                       int device) {
  CallParams params{};
  params.q = without_address(q);
  params.k = without_address(k);
  params.v = without_address(v);
  params.out = without_address(out);
  params.batch = batch;
  params.heads = heads;
  params.first_head = first_head;
  params.head_count = head_count;
  params.kv_heads = kv_heads;
  params.seq_q = params.seq_k = seq;
  params.head_dim = head_dim;
  params.head_dim_v = head_dim_v;
  params.scale = scale;
  params.element = element(bfloat16);
  params.kernels = sm90 ? Kernels::sm90 : Kernels::sm80;
  params.device = device;
  return params;
}

BackwardParams backward_params(const CallParams& call, const Strides& dout, const Strides& dq,
                               const Strides& dk, const Strides& dv, int heads_together) {
  BackwardParams params{};
  static_cast<CallParams&>(params) = call;
  params.dout = without_address(dout);
  params.dq = without_address(dq);
  params.dk = without_address(dk);
  params.dv = without_address(dv);
  params.heads_together = heads_together;
  return params;
}

using HeadRangeArgument = std::pair<BackwardParams, std::vector<Branch>>;

Gradients gradients(const std::vector<HeadRangeArgument>& arguments) {
  std::vector<HeadRange> ranges;
  for (const auto& [call, branches] : arguments) ranges.push_back({call, branches});
  return Gradients::of(ranges);
}

py::dict build_info() {
  py::dict info;
  info["version"] = SPARSE_ATTN_VERSION;
  info["cuda_compiler"] = SPARSE_ATTN_CUDA_COMPILER;
  info["architectures"] = SPARSE_ATTN_ARCHITECTURES;
  return info;
}

#if SPARSE_ATTN_CUDA
using TensorArgument = std::array<int64_t, 4>;  // pointer; batch, head and row stride in elements

TensorView tensor_view(const TensorArgument& tensor) {
  return {reinterpret_cast<void*>(tensor[0]), tensor[1], tensor[2], static_cast<int>(tensor[3])};
}

template <class Pointer>
Pointer pointer(int64_t address) {
  return reinterpret_cast<Pointer>(address);
}

ForwardParams forward_params(const CallParams& call, const std::vector<Branch>& branches) {
  if (branches.size() > kMaxBranches) throw py::value_error("too many branches");
  ForwardParams params{};
  static_cast<CallParams&>(params) = call;
  params.branch_count = static_cast<int>(branches.size());
  std::copy(branches.begin(), branches.end(), params.branches);
  return params;
}

// The launches of a forward call, complete but for addresses and stream.
struct ForwardCall {
  struct Launch {
    ForwardParams params;
    int counters;
  };
  std::vector<Launch> launches;
  int counters = 0;  // shared by the launches

  explicit ForwardCall(const std::vector<ForwardParams>& calls) {
    for (const ForwardParams& params : calls) {
      launches.push_back({params, forward_counters(params)});
      counters = std::max(counters, launches.back().counters);
    }
  }

  void operator()(int64_t q, int64_t k, int64_t v, int64_t out, int64_t lse, int64_t block_rows,
                  int64_t counters_address, int64_t stream) const {
    for (const Launch& launch : launches) {
      ForwardParams params = launch.params;
      params.q.data = pointer<void*>(q);
      params.k.data = pointer<void*>(k);
      params.v.data = pointer<void*>(v);
      params.out.data = pointer<void*>(out);
      params.lse = pointer<float*>(lse);
      for (Branch& branch : params.branches) {
        branch.blocks.rows = pointer<const uint32_t*>(block_rows);
      }
      params.counters = launch.counters > 0 ? pointer<int*>(counters_address) : nullptr;
      params.stream = pointer<void*>(stream);
      forward(params);
    }
  }
};

// The launches of a backward call, complete but for addresses and stream.
struct BackwardCall {
  Gradients gradients;

  void operator()(int64_t dout, int64_t q, int64_t k, int64_t v, int64_t out, int64_t lse,
                  int64_t dlse, int64_t stats_rows, int64_t dq, int64_t dk, int64_t dv,
                  int64_t query_block_rows, int64_t key_block_rows, int64_t workspace,
                  int64_t stream) const {
    for (const GradientLaunch& launch : gradients.launches) {
      BackwardParams params = launch.params;
      params.q.data = pointer<void*>(q);
      params.k.data = pointer<void*>(k);
      params.v.data = pointer<void*>(v);
      params.dout.data = pointer<void*>(dout);
      params.dq.data = pointer<void*>(dq);
      params.dk.data = pointer<void*>(dk);
      params.dv.data = pointer<void*>(dv);
      params.stats = pointer<RowStats*>(stats_rows);
      params.out.data = pointer<void*>(out);
      params.lse = pointer<float*>(lse);
      params.dlse = pointer<const float*>(dlse);
      params.branch.blocks.rows = pointer<const uint32_t*>(
          params.owner == Owner::queries ? query_block_rows : key_block_rows);
      params.query_blocks = pointer<const uint32_t*>(query_block_rows);
      params.workspace = launch.workspace > 0 ? pointer<void*>(workspace) : nullptr;
      params.stream = pointer<void*>(stream);
      if (gradients.stats_before && &launch == &gradients.launches.front()) row_stats(params);
      backward(params);
    }
  }
};

BlockRowsParams block_rows_params(const TensorArgument& layout, int64_t rows, int heads, int blocks,
                                  int words, bool past, bool future, int device, int64_t stream) {
  BlockRowsParams params{};
  params.layout = pointer<const bool*>(layout[0]);
  params.head_stride = layout[1];
  params.row_stride = layout[2];
  params.column_stride = layout[3];
  params.rows = pointer<uint32_t*>(rows);
  params.heads = heads;
  params.blocks = blocks;
  params.words = words;
  params.past = past;
  params.future = future;
  params.device = device;
  params.stream = pointer<void*>(stream);
  return params;
}

DecodeRead decode_read(const SequenceView& queries, const Run& run, const SequenceView& keys,
                       int part, int store) {
  return {Groups::of(queries), run, {keys, static_cast<Part>(part)}, store};
}

DecodeStore decode_store(const TensorArgument& k, const TensorArgument& v,
                         const SequenceView& tokens, int slots) {
  return {tensor_view(k), tensor_view(v), tokens, Divisor::of(slots)};
}

DecodeParams decode_params(const TensorArgument& q, const TensorArgument& k_new,
                           const TensorArgument& v_new, const TensorArgument& out, int64_t position,
                           int64_t parts, int64_t part_out, int batch, int heads, int first_head,
                           int head_count, int kv_heads, int new_tokens, int head_dim,
                           int head_dim_v, int part_count, float scale, bool bfloat16,
                           const std::vector<DecodeRead>& reads,
                           const std::vector<DecodeStore>& stores, int device, int64_t stream) {
  if (reads.size() > kMaxReads) throw py::value_error("too many reads");
  if (stores.size() > kMaxStores) throw py::value_error("too many stores");
  DecodeParams params{};
  params.q = tensor_view(q);
  params.k_new = tensor_view(k_new);
  params.v_new = tensor_view(v_new);
  params.out = tensor_view(out);
  params.position = pointer<const int64_t*>(position);
  params.parts = pointer<DecodePart*>(parts);
  params.part_out = pointer<float*>(part_out);
  params.batch = batch;
  params.heads = heads;
  params.first_head = first_head;
  params.head_count = head_count;
  params.kv_heads = kv_heads;
  params.new_tokens = new_tokens;
  params.head_dim = head_dim;
  params.head_dim_v = head_dim_v;
  params.part_count = part_count;
  params.scale = scale;
  params.element = element(bfloat16);
  params.read_count = static_cast<int>(reads.size());
  std::copy(reads.begin(), reads.end(), params.reads);
  params.store_count = static_cast<int>(stores.size());
  std::copy(stores.begin(), stores.end(), params.stores);
  params.device = device;
  params.stream = pointer<void*>(stream);
  return params;
}
#endif

}  // namespace

PYBIND11_MODULE(_C, module) {
  py::class_<SequenceView>(module, "SequenceView")
      .def(py::init(&sequence_view), py::kw_only(), py::arg("length"), py::arg("groups"),
           py::arg("max_rows"), py::arg("offset"), py::arg("group_step"), py::arg("run"),
           py::arg("run_stride"));
  py::class_<Run>(module, "Run")
      .def(py::init(&make_run), py::kw_only(), py::arg("length"), py::arg("window"),
           py::arg("chunks"), py::arg("past"), py::arg("future"));
  py::class_<Branch>(module, "Branch")
      .def(py::init(&make_branch), py::arg("queries"), py::arg("run"), py::arg("segments"),
           py::arg("block"))
      .def("with_blocks", &with_blocks, py::kw_only(), py::arg("rows"), py::arg("words"),
           py::arg("head_stride"))
      .def("with_short_groups_together", &with_short_groups_together, py::arg("tile_rows"));
  module.def("cover", &cover_bytes, py::arg("branches"), py::arg("length"), py::arg("tile_queries"),
             py::arg("tile_keys"));
  py::class_<CallParams>(module, "CallParams")
      .def(py::init(&call_params), py::kw_only(), py::arg("q"), py::arg("k"), py::arg("v"),
           py::arg("out"), py::arg("batch"), py::arg("heads"), py::arg("first_head"),
           py::arg("head_count"), py::arg("kv_heads"), py::arg("seq"), py::arg("head_dim"),
           py::arg("head_dim_v"), py::arg("scale"), py::arg("bfloat16"), py::arg("sm90"),
           py::arg("device"));
  py::class_<BackwardParams>(module, "BackwardParams")
      .def(py::init(&backward_params), py::arg("call"), py::kw_only(), py::arg("dout"),
           py::arg("dq"), py::arg("dk"), py::arg("dv"), py::arg("heads_together"));
  py::class_<GradientLaunch>(module, "GradientLaunch")
      .def_property_readonly("first_head",
                             [](const GradientLaunch& x) { return x.params.first_head; })
      .def_property_readonly("head_count",
                             [](const GradientLaunch& x) { return x.params.head_count; })
      .def_property_readonly(
          "owner", [](const GradientLaunch& x) { return static_cast<int>(x.params.owner); })
      .def_property_readonly("branch", [](const GradientLaunch& x) { return x.params.branch; })
      .def_property_readonly("accumulate",
                             [](const GradientLaunch& x) { return x.params.accumulate; })
      .def_property_readonly("finds_stats",
                             [](const GradientLaunch& x) { return x.params.finds_stats; })
      .def_readonly("workspace", &GradientLaunch::workspace)
      .def_readonly("writes_every_dq", &GradientLaunch::writes_every_dq);
  py::class_<Gradients>(module, "Gradients")
      .def(py::init(&gradients), py::arg("ranges"))
      .def_readonly("launches", &Gradients::launches)
      .def_readonly("stats_before", &Gradients::stats_before)
      .def_readonly("keeps_stats", &Gradients::keeps_stats)
      .def_readonly("workspace", &Gradients::workspace);
  module.def("build_info", &build_info);
  module.attr("max_chunks") = kMaxChunks;
#if SPARSE_ATTN_CUDA
  module.def("head_dims", &head_dims);
  module.def("sm90_fits", &sm90_fits, py::arg("head_dim"), py::arg("head_dim_v"));
  module.def("driver_version", &driver_version);
  py::class_<ForwardParams>(module, "ForwardParams")
      .def(py::init(&forward_params), py::arg("call"), py::arg("branches"));
  py::class_<ForwardCall>(module, "ForwardCall")
      .def(py::init<const std::vector<ForwardParams>&>(), py::arg("launches"))
      .def_readonly("counters", &ForwardCall::counters)
      .def("__call__", &ForwardCall::operator());
  py::class_<BackwardCall>(module, "BackwardCall")
      .def(py::init<Gradients>(), py::arg("gradients"))
      .def("__call__", &BackwardCall::operator());
  py::class_<BlockRowsParams>(module, "BlockRowsParams")
      .def(py::init(&block_rows_params), py::kw_only(), py::arg("layout"), py::arg("rows"),
           py::arg("heads"), py::arg("blocks"), py::arg("words"), py::arg("past"),
           py::arg("future"), py::arg("device"), py::arg("stream"));
  module.def("block_rows", &block_rows, py::arg("params"));
  py::class_<DecodeRead>(module, "DecodeRead")
      .def(py::init(&decode_read), py::arg("queries"), py::arg("run"), py::arg("keys"),
           py::arg("part"), py::arg("store"));
  py::class_<DecodeStore>(module, "DecodeStore")
      .def(py::init(&decode_store), py::arg("k"), py::arg("v"), py::arg("tokens"),
           py::arg("slots"));
  py::class_<DecodeParams>(module, "DecodeParams")
      .def(py::init(&decode_params), py::kw_only(), py::arg("q"), py::arg("k_new"),
           py::arg("v_new"), py::arg("out"), py::arg("position"), py::arg("parts"),
           py::arg("part_out"), py::arg("batch"), py::arg("heads"), py::arg("first_head"),
           py::arg("head_count"), py::arg("kv_heads"), py::arg("new_tokens"), py::arg("head_dim"),
           py::arg("head_dim_v"), py::arg("part_count"), py::arg("scale"), py::arg("bfloat16"),
           py::arg("reads"), py::arg("stores"), py::arg("device"), py::arg("stream"));
  module.def("decode_parts", &decode_parts, py::arg("params"));
  module.def("decode_finish", &decode_finish, py::arg("params"));
#endif
}
