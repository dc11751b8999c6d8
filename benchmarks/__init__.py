# SPDX-License-Identifier: Apache-2.0
"""Where the kernels stand: beside their floors and beside every peer. `python -m benchmarks`."""
