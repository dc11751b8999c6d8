# SPDX-License-Identifier: Apache-2.0
# Chooses the CUDA compiler, before enable_language(CUDA): CMAKE_CUDA_COMPILER or CUDACXX if given,
# else the one that pip installed for the Python that CMake was given. nvcc on PATH is not used.
#
# SPARSE_ATTN_CUDA_ORIGIN: "PyPI wheel" or "explicit". Cached, since CMake caches its choice too.

if(NOT SPARSE_ATTN_CUDA_ORIGIN)
  if(CMAKE_CUDA_COMPILER OR NOT "$ENV{CUDACXX}" STREQUAL "")
    set(SPARSE_ATTN_CUDA_ORIGIN "explicit" CACHE INTERNAL "")
  else()
    execute_process(
      COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/find_pip_cuda.py"
      OUTPUT_VARIABLE cuda_root
      ERROR_VARIABLE cuda_error
      RESULT_VARIABLE cuda_result
      OUTPUT_STRIP_TRAILING_WHITESPACE)
    if(NOT cuda_result EQUAL 0)
      message(FATAL_ERROR "${cuda_error}")
    endif()
    set(CMAKE_CUDA_COMPILER "${cuda_root}/bin/nvcc" CACHE FILEPATH "CUDA compiler")
    set(SPARSE_ATTN_CUDA_ORIGIN "PyPI wheel" CACHE INTERNAL "")
    # nvcc looks for the runtime in lib64, the wheels have lib: LIBRARY_PATH serves CMake's check of
    # the compiler, SPARSE_ATTN_CUDA_LIB what is linked later.
    set(SPARSE_ATTN_CUDA_LIB "${cuda_root}/lib" CACHE INTERNAL "")
    set(ENV{LIBRARY_PATH} "${SPARSE_ATTN_CUDA_LIB}:$ENV{LIBRARY_PATH}")
  endif()
endif()

if(NOT CMAKE_CUDA_HOST_COMPILER AND "$ENV{CUDAHOSTCXX}" STREQUAL "")
  set(CMAKE_CUDA_HOST_COMPILER "${CMAKE_CXX_COMPILER}")
endif()
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
