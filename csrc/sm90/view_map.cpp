// SPDX-License-Identifier: Apache-2.0
#include "sm90/view_map.h"

#include <cudaTypedefs.h>

#include "check.h"

namespace sparse_attn::sm90 {
namespace {

PFN_cuTensorMapEncodeTiled_v12000 encoder() {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    CHECK_CUDA(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                cudaEnableDefault, &found));
    REQUIRE(found == cudaDriverEntryPointSuccess, "the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  return encode;
}

}  // namespace

ViewMap ViewMap::of(const TensorView& tensor, const SequenceView& view, int head_dim, int heads,
                    int batch, int tile_rows, int panel_columns, Element element, bool usable) {
  const int run = view.run.value, run_stride = view.run_stride.value;
  const bool neighbours = run == 1 && run_stride == 1;
  // Places in a run, runs, and the tile's part of either.
  int places, runs, box_places, box_runs;
  ViewMap result{};
  if (neighbours) {
    // A tile may hold rows of the next group, but for whole groups of tiles.
    result.rows = view.groups == 1 ? view.max_rows : view.max_rows / tile_rows * tile_rows;
    result.run = Divisor::of(greatest(view.length, 1));
    places = view.length - view.offset, runs = 1;
    box_places = tile_rows, box_runs = 1;
  } else {
    places = run * view.groups;
    runs = view.rows(view.groups - 1) / run;
    result.rows = runs * run;
    result.run = view.run;
    box_places = run, box_runs = tile_rows / run;
    usable = usable && tile_rows % run == 0 && (view.groups == 1 || view.group_step == run);
  }
  result.first = neighbours ? Divisor::of(1) : view.run;
  result.group_step = view.group_step;
  if (!usable || places <= 0 || runs <= 0 || result.rows == 0) {
    result.rows = -1;
    return result;
  }

  const auto bytes = [](int size, int64_t stride) {
    return size == 1 ? cuuint64_t{16} : static_cast<cuuint64_t>(2 * stride);
  };
  const auto unsign = [](int size) { return static_cast<cuuint64_t>(size); };
  const cuuint64_t sizes[] = {unsign(head_dim), unsign(places), unsign(runs), unsign(heads),
                              unsign(batch)};
  const cuuint64_t strides[] = {
      bytes(places, tensor.row_stride), bytes(runs, int64_t{tensor.row_stride} * run_stride),
      bytes(heads, tensor.head_stride), bytes(batch, tensor.batch_stride)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(panel_columns),
                            static_cast<cuuint32_t>(box_places), static_cast<cuuint32_t>(box_runs),
                            1, 1};
  const cuuint32_t steps[] = {1, 1, 1, 1, 1};
  char* base = static_cast<char*>(tensor.data) + int64_t{view.offset} * tensor.row_stride * 2;
  // L2 fetches the rows of a tile and not what stands beside them, which is wanted later. With 256
  // bytes at a time chunks in (batch, seq, heads, dim) memory took 11 % longer on an H100, two
  // branches of head dim 128 in one launch 5 %.
  const CUresult status =
      encoder()(&result.map,
                element == Element::float16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                            : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                5, base, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                panel_columns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
                CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) result.rows = -1;  // such as the stride 0 of an expanded tensor
  return result;
}

}  // namespace sparse_attn::sm90
