# SPDX-License-Identifier: Apache-2.0
"""Decoding: one to sixteen new queries against a cache that keeps what its pattern still reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import _ops
from .backends import cuda_decode, torch_decode
from .decode_plan import DecodePlan, decode_plan
from .dispatch import warn_once
from .functional import _inputs, checked_scale
from .patterns import Pattern, PerHead, check_size

MAX_NEW_TOKENS = 16
_DECODE = {"cuda": cuda_decode.decode, "torch": torch_decode.decode}


@dataclass(frozen=True)
class CachedHeads:
    """The query heads of one pattern, and the keys and values kept for them."""

    plan: DecodePlan
    heads: torch.Tensor  # query heads, int64 on the device of the cache
    kv_heads: torch.Tensor  # heads of k and v that serve them, likewise
    kv_of: torch.Tensor  # for each query head, the index of its head in kv_heads
    k: tuple[torch.Tensor, ...]  # for each store (batch, len(kv_heads), slots, head_dim)
    v: tuple[torch.Tensor, ...]  # for each store (batch, len(kv_heads), slots, head_dim_v)
    head_numbers: tuple[int, ...]  # heads and kv_heads on the host
    kv_head_numbers: tuple[int, ...]


class KVCache:
    """Keys and values of the tokens so far, as many as the pattern still reads.

    A `Local` or `Chunk` of l tokens keeps l of them, a `Summary` its ``columns`` in every
    ``length``, a `Dilated` or `Dense` all; `Strided` and `Fixed` what their members keep.

    Args:
        pattern: a causal pattern.
        batch, heads: of the queries.
        length: the greatest number of tokens, prompt and new ones.
        head_dim: of queries and keys.
        head_dim_v: of values; ``head_dim`` if None.
        kv_heads: heads of keys and values, divides ``heads``; equals it if None.
        dtype: float16, bfloat16, float32 or float64.
        device: where keys and values are kept.

    ``position`` is the number of tokens so far, one for the whole batch: an int64 tensor on the
    device, so that a step can be captured in a CUDA graph and replayed. Set it back with
    ``position.fill_()`` to drop the newest token: what it overwrote is no longer read.

    Under autocast, k and v are cast to its dtype, which then is that of the cache.

    Raises:
        ValueError: a pattern that is not causal, or sizes that do not fit.
        TypeError: arguments of the wrong type.
        NotImplementedError: a `BlockSparse`.

    >>> cache = KVCache(Local(128), batch=1, heads=8, length=100_000, head_dim=64)
    >>> cache.nbytes == 2 * 8 * 128 * 64 * 4
    True
    """

    def __init__(
        self,
        pattern: Pattern,
        batch: int,
        heads: int,
        length: int,
        head_dim: int,
        head_dim_v: int | None = None,
        kv_heads: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        head_dim_v = head_dim if head_dim_v is None else head_dim_v
        kv_heads = heads if kv_heads is None else kv_heads
        check_size("batch", batch, least=0)
        for name, size in (("heads", heads), ("length", length), ("kv_heads", kv_heads)):
            check_size(name, size)
        for name, size in (("head_dim", head_dim), ("head_dim_v", head_dim_v)):
            check_size(name, size)
            if size > _ops.MAX_HEAD_DIM:
                raise ValueError(f"{name} must be at most {_ops.MAX_HEAD_DIM}, got {size}")
        if heads % kv_heads:
            raise ValueError(f"kv_heads must divide heads, got kv_heads {kv_heads}, heads {heads}")
        if dtype not in _ops.DTYPES:
            raise TypeError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype}")
        _ops.check_pattern(pattern, heads)
        self.pattern, self.length = pattern, length
        self.batch, self.heads, self.kv_heads = batch, heads, kv_heads
        self.head_dim, self.head_dim_v, self.dtype = head_dim, head_dim_v, dtype
        self.position = torch.zeros((), dtype=torch.int64, device=device)
        self.device = self.position.device
        self.parts = tuple(
            self._part(head_pattern, numbers)
            for head_pattern, numbers in _heads_by_pattern(pattern, heads).items()
        )

    def _part(self, pattern: Pattern, heads: list[int]) -> CachedHeads:
        plan = decode_plan(pattern, self.length)
        kv_of = [head // (self.heads // self.kv_heads) for head in heads]
        kv_heads = sorted(set(kv_of))

        def empty(dim: int) -> tuple[torch.Tensor, ...]:
            sizes = ((self.batch, len(kv_heads), store.slots, dim) for store in plan.stores)
            return tuple(torch.empty(x, dtype=self.dtype, device=self.device) for x in sizes)

        return CachedHeads(
            plan,
            torch.tensor(heads, device=self.device),
            torch.tensor(kv_heads, device=self.device),
            torch.tensor([kv_heads.index(head) for head in kv_of], device=self.device),
            empty(self.head_dim),
            empty(self.head_dim_v),
            tuple(heads),
            tuple(kv_heads),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(x.nbytes for part in self.parts for x in (*part.k, *part.v))

    @torch.no_grad()
    def prefill(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Starts over with the keys and values of a prompt, as `attention` takes them.

        Args:
            k: ``(batch, kv_heads, seq, head_dim)``, seq from 0 to ``length``.
            v: ``(batch, kv_heads, seq, head_dim_v)``.

        Raises:
            TypeError: another dtype.
            ValueError: shapes that do not fit the cache.
            RuntimeError: another device.
        """
        _, k, v = _inputs(k, k, v, self.pattern)
        self.check(k, v)
        seq = k.shape[2]
        if seq > self.length:
            raise ValueError(f"the prompt has {seq} tokens, the cache holds {self.length}")
        for part in self.parts:
            for number, store in enumerate(part.plan.stores):
                count = int(store.tokens.rows_before(0, seq))
                rows = torch.arange(max(count - store.slots, 0), count, device=self.device)
                tokens, slots = store.tokens.position(0, rows), rows % store.slots
                for kept, x in ((part.k[number], k), (part.v[number], v)):
                    kept[:, :, slots] = x.index_select(1, part.kv_heads)[:, :, tokens]
        self.position.fill_(seq)

    def check(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Raises unless keys and values are of this cache's kind."""
        for name, x, dim in (("k", k, self.head_dim), ("v", v, self.head_dim_v)):
            if x.dtype != self.dtype:
                raise TypeError(f"the cache holds {self.dtype}, got {name} of {x.dtype}")
            if x.device != self.device:
                raise RuntimeError(f"the cache is on {self.device}, got {name} on {x.device}")
            wanted = (self.batch, self.kv_heads, dim)
            if x.dim() != 4 or (x.shape[0], x.shape[1], x.shape[3]) != wanted:
                raise ValueError(
                    f"the cache takes {name} of shape ({self.batch}, {self.kv_heads}, seq, {dim}), "
                    f"got {tuple(x.shape)}"
                )
        if k.shape[2] != v.shape[2]:
            raise ValueError(
                f"k and v must have one sequence length, got {k.shape[2]} and {v.shape[2]}"
            )


@torch.no_grad()
def decode(
    q: torch.Tensor,
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    cache: KVCache,
    scale: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Attention of the next tokens: what `attention` gives at their positions. Fills the cache.

    Args:
        q: ``(batch, heads, new, head_dim)``, new from 1 to 16.
        k_new: their keys ``(batch, kv_heads, new, head_dim)``.
        v_new: their values ``(batch, kv_heads, new, head_dim_v)``.
        cache: the tokens before; its position moves on by ``new``.
        scale: factor of the scores; ``1 / sqrt(head_dim)`` if None.
        backend: "cuda" (the native kernels) or "torch"; the fastest that can run if None.

    Returns:
        out ``(batch, heads, new, head_dim_v)``. Not differentiable.

    A call reads the keys of its queries and no more, and can be captured in a CUDA graph. On a GPU
    the caller sees to it that no more than ``cache.length`` tokens come; what follows is undefined.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes that do not fit the cache, or a full cache on the CPU.
        RuntimeError: mixed devices, or a forced backend that cannot run.

    >>> q, k, v = torch.randn(3, 1, 8, 1000, 64).unbind()
    >>> cache = KVCache(Strided(32), batch=1, heads=8, length=1000, head_dim=64)
    >>> cache.prefill(k[:, :, :999], v[:, :, :999])
    >>> out = decode(q[:, :, 999:], k[:, :, 999:], v[:, :, 999:], cache)
    >>> bool((out - attention(q, k, v, Strided(32))[:, :, 999:]).abs().max() < 1e-5)
    True
    """
    if not isinstance(cache, KVCache):
        raise TypeError(f"cache must be a KVCache, got {type(cache).__name__}")
    q, k_new, v_new = _inputs(q, k_new, v_new, cache.pattern)
    _ops.check(q, k_new, v_new, cache.pattern, None)
    cache.check(k_new, v_new)
    new = q.shape[2]
    if q.shape[1] != cache.heads:
        raise ValueError(f"the cache is for {cache.heads} heads, got {q.shape[1]}")
    if not 1 <= new <= MAX_NEW_TOKENS:
        raise ValueError(f"new tokens must be from 1 to {MAX_NEW_TOKENS}, got {new}")
    if not q.is_cuda and int(cache.position) + new > cache.length:
        raise ValueError(
            f"the cache holds {cache.length} tokens, got {new} after {int(cache.position)}"
        )
    scale = _ops._scale(checked_scale(scale), q)
    name = _choose_backend(q, k_new, v_new, cache, backend)
    out = q.new_empty((*q.shape[:3], cache.head_dim_v))
    if out.numel():
        with torch.autocast(q.device.type, enabled=False):
            _DECODE[name](q, k_new, v_new, cache, scale, out)
    cache.position.add_(new)
    return out


def _choose_backend(
    q: torch.Tensor,
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    cache: KVCache,
    backend: str | None,
) -> str:
    if backend not in (None, *_DECODE):
        raise ValueError(f"backend must be None, 'cuda' or 'torch', got {backend!r}")
    if backend == "torch" or (backend is None and not q.is_cuda):
        return "torch"
    reason = cuda_decode.unsupported(q, k_new, v_new, cache)
    if reason is None:
        return "cuda"
    if backend == "cuda":
        raise RuntimeError(f"backend='cuda' cannot run: {reason}")
    warn_once(reason)
    return "torch"


def _heads_by_pattern(pattern: Pattern, heads: int) -> dict[Pattern, list[int]]:
    """The distinct patterns, each with the heads it serves."""
    patterns = pattern.patterns if isinstance(pattern, PerHead) else (pattern,) * heads
    served: dict[Pattern, list[int]] = {}
    for head, head_pattern in enumerate(patterns):
        served.setdefault(head_pattern, []).append(head)
    return served
