# SPDX-License-Identifier: Apache-2.0
"""The three ways to compute a pattern: native kernels, PyTorch operations, and a plain reference.

Each module has ``forward(q, k, v, pattern, scale, out, lse)``, which fills ``out`` and ``lse``, and
``backward(dout, dlse, q, k, v, out, lse, pattern, scale, dq, dk, dv)``, which fills the last three.
"""
