"""The three ways to compute a pattern: native kernels, PyTorch operations, and a plain reference.

Each backend module has ``forward(q, k, v, pattern, scale, out, lse)``, which fills ``out`` and ``lse``,
and the torch and reference backends have ``backward(...)``, which returns dq, dk and dv.
"""
