// SPDX-License-Identifier: Apache-2.0
// The Python module _C: pointers, strides and a stream come in as integers. No tensor type, no
// logic.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "attention/cover.h"
#include "params.h"
#if SPARSE_ATTN_CUDA
#include "dispatch.h"
#endif

namespace py = pybind11;
using namespace sparse_attn;

namespace {

SequenceView sequence_view(int length, int groups, int max_rows, int offset, int group_step,
                           int run, int run_stride) {
  return {length, groups, max_rows, offset, group_step, run, run_stride};
}

Run make_run(int length, int window, const std::vector<int>& chunks, bool causal) {
  if (chunks.size() > kMaxChunks) throw py::value_error("too many chunk lengths");
  Run run{length, window, {}, static_cast<int>(chunks.size()), causal};
  for (size_t i = 0; i < chunks.size(); ++i) run.chunks[i] = chunks[i];
  return run;
}

Branch make_branch(const SequenceView& queries, const Run& run,
                   const std::vector<std::pair<SequenceView, int>>& segments) {
  if (segments.size() > kMaxSegments) throw py::value_error("too many segments");
  Branch branch{queries, run, {}, static_cast<int>(segments.size())};
  for (size_t i = 0; i < segments.size(); ++i) {
    branch.segments[i] = {segments[i].first, static_cast<Part>(segments[i].second)};
  }
  return branch;
}

py::bytes cover_bytes(const std::vector<Branch>& branches, int length, int tile_queries,
                      int tile_keys) {
  const std::vector<uint8_t> counts = cover(branches, length, tile_queries, tile_keys);
  return py::bytes(reinterpret_cast<const char*>(counts.data()), counts.size());
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
  return {reinterpret_cast<void*>(tensor[0]), tensor[1], tensor[2], tensor[3]};
}

void launch_forward(const TensorArgument& q, const TensorArgument& k, const TensorArgument& v,
                    const TensorArgument& out, int64_t lse, int batch, int heads, int first_head,
                    int head_count, int kv_heads, int seq, int head_dim, int head_dim_v,
                    float scale, bool bfloat16, const Branch& branch, bool merge, int device,
                    int64_t stream) {
  ForwardParams params{};
  params.q = tensor_view(q);
  params.k = tensor_view(k);
  params.v = tensor_view(v);
  params.out = tensor_view(out);
  params.lse = reinterpret_cast<float*>(lse);
  params.batch = batch;
  params.heads = heads;
  params.first_head = first_head;
  params.head_count = head_count;
  params.kv_heads = kv_heads;
  params.seq_q = params.seq_k = seq;
  params.head_dim = head_dim;
  params.head_dim_v = head_dim_v;
  params.scale = scale;
  params.element = bfloat16 ? Element::bfloat16 : Element::float16;
  params.branch = branch;
  params.merge = merge;
  params.device = device;
  params.stream = reinterpret_cast<void*>(stream);
  forward(params);
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
           py::arg("chunks"), py::arg("causal"));
  py::class_<Branch>(module, "Branch")
      .def(py::init(&make_branch), py::arg("queries"), py::arg("run"), py::arg("segments"));
  module.def("cover", &cover_bytes, py::arg("branches"), py::arg("length"), py::arg("tile_queries"),
             py::arg("tile_keys"));
  module.def("build_info", &build_info);
  module.attr("max_chunks") = kMaxChunks;
#if SPARSE_ATTN_CUDA
  module.def("head_dims", &head_dims);
  module.def("driver_version", &driver_version);
  module.def("forward", &launch_forward, py::kw_only(), py::arg("q"), py::arg("k"), py::arg("v"),
             py::arg("out"), py::arg("lse"), py::arg("batch"), py::arg("heads"),
             py::arg("first_head"), py::arg("head_count"), py::arg("kv_heads"), py::arg("seq"),
             py::arg("head_dim"), py::arg("head_dim_v"), py::arg("scale"), py::arg("bfloat16"),
             py::arg("branch"), py::arg("merge"), py::arg("device"), py::arg("stream"));
#endif
}
