# SPDX-License-Identifier: Apache-2.0
"""Decoding on the native kernels: the parts of every query's keys, then their sum."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache as remember
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from ..decode_plan import DecodePlan, Read
from . import cuda

if TYPE_CHECKING:
    from ..decode import CachedHeads, KVCache

# Keys that a CTA has in flight at head dim 64; with less, parts cost more than they hide.
_LEAST_PART = 128
_CTAS_PER_MULTIPROCESSOR = 4
_MOST_PARTS = 256  # kMaxParts in csrc/decode/decode_params.h


def unsupported(
    q: torch.Tensor, k_new: torch.Tensor, v_new: torch.Tensor, cache: KVCache
) -> str | None:
    """Why the kernels cannot decode these inputs, in words; None if they can."""
    reason = cuda.unsupported(q, k_new, v_new, cache.pattern)
    if reason is not None:
        return reason
    if cache.length > cuda._MOST_TOKENS:
        return f"the cache is for {cache.length} tokens, the kernels take {cuda._MOST_TOKENS}"
    most = cuda.native().max_chunks
    for part in cache.parts:
        chunks = max((len(read.run.chunks) for read in part.plan.reads), default=0)
        if chunks > most:
            return f"a union of {chunks} chunk lengths, the kernels take {most}"
    return None


def decode(
    q: torch.Tensor,
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    cache: KVCache,
    scale: float,
    out: torch.Tensor,
) -> None:
    q, k_new, v_new = cuda._aligned(q), cuda._aligned(k_new), cuda._aligned(v_new)
    native = cuda.native()
    calls, workspaces = [], []
    for part in cache.parts:
        for heads in _ranges(part.head_numbers):
            workspace = _workspace(q, v_new, len(heads), part.plan, cache)
            workspaces.append(workspace)  # alive until all is launched
            calls.append(
                native.DecodeParams(
                    q=cuda._argument(q),
                    k_new=cuda._argument(k_new),
                    v_new=cuda._argument(v_new),
                    out=cuda._argument(out),
                    position=cache.position.data_ptr(),
                    parts=workspace[0].data_ptr(),
                    part_out=workspace[1].data_ptr(),
                    batch=cache.batch,
                    heads=cache.heads,
                    first_head=heads.start,
                    head_count=len(heads),
                    kv_heads=cache.kv_heads,
                    new_tokens=q.shape[2],
                    head_dim=cache.head_dim,
                    head_dim_v=cache.head_dim_v,
                    part_count=workspace[0].shape[3],
                    scale=scale,
                    reads=_native_reads(part.plan),
                    stores=list(_native_stores(part, heads.start, cache)),
                    bfloat16=q.dtype == torch.bfloat16,
                    **cuda._device(q),
                )
            )
    # New keys take the place of old ones that other heads may read: only after all parts.
    for call in calls:
        native.decode_parts(call)
    for call in calls:
        native.decode_finish(call)


def _workspace(
    q: torch.Tensor, v_new: torch.Tensor, heads: int, plan: DecodePlan, cache: KVCache
) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 (batch, heads, new, parts, ...): greatest score and sum of each part; its output."""
    batch, _, new, _ = q.shape
    group = cache.heads // cache.kv_heads
    ctas = batch * max(heads // group, 1) * new
    wanted = _CTAS_PER_MULTIPROCESSOR * _multiprocessors(q.device) // ctas
    parts = max(1, min(-(-plan.most_keys // _LEAST_PART), wanted, _MOST_PARTS))
    shape = (batch, heads, new, parts)
    stats = torch.empty((*shape, 2), dtype=torch.float32, device=q.device)
    return stats, torch.empty((*shape, v_new.shape[3]), dtype=torch.float32, device=q.device)


@remember
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _ranges(heads: tuple[int, ...]) -> Iterator[range]:
    """Runs of neighbouring heads."""
    start = 0
    for end in range(1, len(heads) + 1):
        if end == len(heads) or heads[end] != heads[end - 1] + 1:
            yield range(heads[start], heads[end - 1] + 1)
            start = end


@lru_cache(maxsize=256)
def _native_reads(plan: DecodePlan) -> list[Any]:
    return [_native_read(read) for read in plan.reads]


def _native_read(read: Read) -> Any:
    return cuda.native().DecodeRead(
        cuda._native_view(read.queries),
        cuda._native_run(read.run),
        cuda._native_view(read.segment.keys),
        cuda._PARTS[read.segment.part],
        read.store,
    )


def _native_stores(part: CachedHeads, first_head: int, cache: KVCache) -> Iterator[Any]:
    """The stores from the kv head of ``first_head`` on."""
    kv_head = first_head // (cache.heads // cache.kv_heads)
    skip = part.kv_head_numbers.index(kv_head)
    for store, k, v in zip(part.plan.stores, part.k, part.v, strict=True):
        yield cuda.native().DecodeStore(
            cuda._argument(k[:, skip:]),
            cuda._argument(v[:, skip:]),
            cuda._native_view(store.tokens),
            store.slots,
        )
