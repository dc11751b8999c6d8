# SPDX-License-Identifier: Apache-2.0
# The one list of native kernels. Each becomes a .cu file in the build folder and a line of
# instances.inc, from which the host table is made.

set(SPARSE_ATTN_ELEMENTS __half __nv_bfloat16)
# head_dim, head_dim_v
set(SPARSE_ATTN_sm80_HEAD_DIMS 32,32 64,64 64,128 96,96 128,128 256,256)
set(SPARSE_ATTN_sm90_HEAD_DIMS 32,32 64,64 64,128 128,128 256,256)
set(SPARSE_ATTN_sm90_backward_band_HEAD_DIMS 32,32 64,64 64,128 128,128)
set(SPARSE_ATTN_sm90_backward_ordered_HEAD_DIMS 64,64 64,128 128,128)

set(SPARSE_ATTN_INSTANCES_DIR "${CMAKE_CURRENT_BINARY_DIR}/instances")

# Writes <arch>/<direction>/*.cu and <arch>/<direction>/instances.inc; `sources` gets the .cu files.
function(write_instances arch direction sources)
  set(folder "${SPARSE_ATTN_INSTANCES_DIR}/${arch}/${direction}")
  string(REGEX REPLACE "_.*" "" word ${direction})  # backward_band: BackwardParams
  string(SUBSTRING ${word} 0 1 initial)
  string(SUBSTRING ${word} 1 -1 rest)
  string(TOUPPER ${initial} initial)
  set(params "${initial}${rest}Params")
  set(pairs ${SPARSE_ATTN_${arch}_HEAD_DIMS})
  if(DEFINED SPARSE_ATTN_${arch}_${direction}_HEAD_DIMS)
    set(pairs ${SPARSE_ATTN_${arch}_${direction}_HEAD_DIMS})
  endif()
  foreach(element IN LISTS SPARSE_ATTN_ELEMENTS)
    foreach(pair IN LISTS pairs)
      string(REPLACE "," ";" pair ${pair})
      list(GET pair 0 head_dim)
      list(GET pair 1 head_dim_v)
      string(REGEX REPLACE "^_+" "" name "${element}_${head_dim}_${head_dim_v}.cu")
      configure_file(cmake/instance.cu.in "${folder}/${name}" @ONLY)
      list(APPEND files "${folder}/${name}")
      string(APPEND table "INSTANCE(${element}, ${head_dim}, ${head_dim_v})\n")
    endforeach()
  endforeach()
  file(CONFIGURE OUTPUT "${folder}/instances.inc" CONTENT "${table}")
  set(${sources} ${files} PARENT_SCOPE)
endfunction()
