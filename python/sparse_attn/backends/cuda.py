# SPDX-License-Identifier: Apache-2.0
"""The cuda backend: the native kernels. The only module that imports the extension ``_C``."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import torch

from ..patterns import BlockSparse, Pattern, PerHead
from ..plan import Branch, Run, SequenceView, plan

if TYPE_CHECKING:
    from .. import _C

_PARTS = {"before": 0, "inside": 1, "after": 2}
_LEAST_CAPABILITY = (8, 0)
_HOPPER = (9, 0)
_LEAST_BLOCK_SM90 = 64  # the queries of a warpgroup
_LEAST_DRIVER = 13000  # CUDA 13.0
# Key rows, tile ends and the stride between tokens are 32-bit integers.
_MOST_TOKENS = 1 << 30
_MOST_ROW_STRIDE = (1 << 31) - 1


def native() -> Any:
    """The extension module; ImportError if the package was not built."""
    from .. import _C

    return _C


@cache
def driver_version() -> int:
    """CUDA version that the driver supports, 13000 for 13.0; 0 without a driver."""
    return int(native().driver_version())


def unsupported(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Pattern) -> str | None:
    """Why the kernels cannot run these inputs, in words; None if they can."""
    if not q.is_cuda:
        return f"the inputs are on {q.device}, the kernels need a CUDA device"
    return _no_kernels(q.device) or _no_kernel(
        q.dtype, q.shape[2], q.shape[3], v.shape[3], pattern.rule
    )


def _no_kernels(device: torch.device) -> str | None:
    """Why a device has no kernels."""
    try:
        architectures = native().build_info()["architectures"]
    except ImportError as error:
        return f"the native module is missing ({error})"
    if not architectures:
        return "this build has no CUDA kernels"
    driver = driver_version()
    if driver < _LEAST_DRIVER:
        return (
            f"the driver supports CUDA {driver // 1000}.{driver % 1000 // 10}, "
            "the kernels need 13.0 (driver 580 or newer)"
        )
    capability = _capability(device)
    if capability < _LEAST_CAPABILITY:
        return "the GPU has compute capability {}.{}, the kernels need 8.0".format(*capability)
    return None


@lru_cache(maxsize=1024)
def _no_kernel(
    dtype: torch.dtype, seq: int, head_dim: int, head_dim_v: int, pattern: Pattern
) -> str | None:
    """Why no kernel takes these sizes."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"the dtype is {dtype}, the kernels take float16 and bfloat16"
    pairs = native().head_dims()
    fits = any(head_dim <= qk and head_dim_v <= value for qk, value in pairs)
    if head_dim % 8 or head_dim_v % 8 or not fits:
        return (
            f"head_dim is {head_dim} and head_dim_v {head_dim_v}, "
            f"the kernels take multiples of 8 within one of {pairs}"
        )
    if seq > _MOST_TOKENS:
        return f"the sequence has {seq} tokens, the kernels take {_MOST_TOKENS}"
    patterns = pattern.patterns if isinstance(pattern, PerHead) else (pattern,)
    for part in patterns if seq else ():
        chunks = max(len(branch.run.chunks) for branch in plan(part, seq))
        if chunks > native().max_chunks:
            return f"a union of {chunks} chunk lengths, the kernels take {native().max_chunks}"
    return None


def unsupported_by_sm90(q: torch.Tensor, v: torch.Tensor, pattern: Pattern) -> str | None:
    """Why Hopper's own kernels do not run inputs that the others can; None if they do."""
    capability = _capability(q.device)
    if capability != _HOPPER:
        return "the GPU has compute capability {}.{}, they need 9.0".format(*capability)
    if not native().sm90_fits(q.shape[3], v.shape[3]):
        return f"they have no pair as close to head_dim {q.shape[3]}, head_dim_v {v.shape[3]}"
    if isinstance(pattern, BlockSparse) and pattern.block < _LEAST_BLOCK_SM90:
        return f"the blocks are of {pattern.block} tokens, they take {_LEAST_BLOCK_SM90} or more"
    return None


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    sm90: bool,
) -> None:
    q, k, v = _aligned(q), _aligned(k), _aligned(v)
    call = {
        "q": _argument(q),
        "k": _argument(k),
        "v": _argument(v),
        "out": _argument(out),
        "lse": lse.data_ptr(),
        "scale": scale,
        "sm90": sm90,
        **_sizes(q, k, v),
        **_launch(q),
    }
    for heads, head_pattern in _head_ranges(pattern, q.shape[1]):
        blocks = _block_rows(head_pattern, q, keys_own=False)
        branches = native_plan(head_pattern, q.shape[2])
        # Of this call alone: calls on other streams, or in a graph, run at the same time.
        counters = lse.new_empty(1 + q.shape[0] * len(heads), dtype=torch.int32)
        native().forward(
            branches=[_with_blocks(branch, blocks) for branch in branches],
            counters=counters.data_ptr() if len(branches) > 1 else 0,
            first_head=heads.start,
            head_count=len(heads),
            **call,
        )


def backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    pattern: Pattern,
    scale: float,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    *,
    sm90: bool,
) -> None:
    group = q.shape[1] // k.shape[1]
    ranges = _head_ranges(pattern, q.shape[1])
    kv_dk, kv_dv = dk, dv
    if any(heads.start % group or heads.stop % group for heads, _ in ranges):
        # Heads of one kv head differ: each has a dk and dv of its own, summed in the end.
        group = 1
        dk, dv = (x.new_empty((*q.shape[:3], x.shape[3])) for x in (k, v))
    q, k, v, dout, out = (_aligned(x) for x in (q, k, v, dout, out))
    stats = lse.new_empty((*lse.shape, 2))
    sizes, launch = _sizes(q, k, v), _launch(q)
    native().row_stats(
        out=_argument(out),
        dout=_argument(dout),
        lse=lse.data_ptr(),
        dlse=0 if dlse is None else dlse.contiguous().data_ptr(),
        stats=stats.data_ptr(),
        **{name: sizes[name] for name in ("batch", "heads", "seq", "head_dim_v")},
        **launch,
    )
    call = {
        "q": _argument(q),
        "k": _argument(k),
        "v": _argument(v),
        "dout": _argument(dout),
        "dq": _argument(dq),
        "dk": _argument(dk),
        "dv": _argument(dv),
        "stats": stats.data_ptr(),
        "scale": scale,
        "sm90": sm90,
        **sizes,
        **launch,
    }
    for heads, head_pattern in ranges:
        if not plan(head_pattern, q.shape[2])[0].segments[0].keys.lists_every_token:
            # The launches write only the keys that a segment lists.
            dk[:, heads.start // group : heads.stop // group].zero_()
            dv[:, heads.start // group : heads.stop // group].zero_()
        for keys_own in (False, True):
            blocks = _block_rows(head_pattern, q, keys_own)
            branches = native_plan(head_pattern, q.shape[2], transposed=keys_own)
            for number, branch in enumerate(branches):
                native().backward(
                    keys_own=keys_own,
                    branch=_with_blocks(branch, blocks),
                    accumulate=number > 0,
                    first_head=heads.start,
                    head_count=len(heads),
                    heads_together=group if keys_own else 1,
                    **call,
                )
    if dk is not kv_dk:
        kv_dk.copy_(dk.unflatten(1, (k.shape[1], -1)).sum(2, dtype=torch.float32))
        kv_dv.copy_(dv.unflatten(1, (k.shape[1], -1)).sum(2, dtype=torch.float32))


def _block_rows(pattern: Pattern, q: torch.Tensor, keys_own: bool) -> torch.Tensor | None:
    """The blocks that each block of queries, or of keys if they own, attends, a bit each.

    int32 (heads or 1, blocks, words), made on the GPU: the layout never comes to the host.
    """
    if not isinstance(pattern, BlockSparse):
        return None
    layout = pattern.layout.mT if keys_own else pattern.layout
    heads, count, _ = layout.shape
    rows = layout.new_empty((heads, count, -(-count // 32)), dtype=torch.int32)
    native().block_rows(
        layout=(layout.data_ptr(), *layout.stride()),
        rows=rows.data_ptr(),
        heads=heads,
        blocks=count,
        words=rows.shape[2],
        past=not pattern.causal or not keys_own,
        future=not pattern.causal or keys_own,
        **_device(q),
    )
    return rows


def _with_blocks(branch: _C.Branch, rows: torch.Tensor | None) -> _C.Branch:
    if rows is None:
        return branch
    return branch.with_blocks(
        rows=rows.data_ptr(),
        words=rows.shape[2],
        head_stride=rows.stride(0) if rows.shape[0] > 1 else 0,
    )


def _sizes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, int]:
    batch, heads, seq, head_dim = q.shape
    return {
        "batch": batch,
        "heads": heads,
        "kv_heads": k.shape[1],
        "seq": seq,
        "head_dim": head_dim,
        "head_dim_v": v.shape[3],
    }


def _launch(q: torch.Tensor) -> dict[str, int]:
    """Element type, device and current stream."""
    return {"bfloat16": q.dtype == torch.bfloat16, **_device(q)}


def _device(q: torch.Tensor) -> dict[str, int]:
    return {
        "device": q.device.index,
        "stream": torch.cuda.current_stream(q.device).cuda_stream,
    }


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy whose rows are contiguous and start on 16 bytes (8 elements)."""
    steps = [stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True) if size > 1]
    contiguous_rows = x.stride(3) == 1 or x.shape[3] == 1
    near = x.shape[2] <= 1 or x.stride(2) <= _MOST_ROW_STRIDE
    if contiguous_rows and near and x.data_ptr() % 16 == 0 and all(step % 8 == 0 for step in steps):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _argument(x: torch.Tensor) -> tuple[int, int, int, int]:
    batch_stride, head_stride, row_stride, _ = x.stride()
    return x.data_ptr(), batch_stride, head_stride, row_stride


def _head_ranges(pattern: Pattern, heads: int) -> list[tuple[range, Pattern]]:
    """Neighbouring heads of one pattern, which share a launch."""
    if not isinstance(pattern, PerHead):
        return [(range(heads), pattern)]
    ranges: list[tuple[range, Pattern]] = []
    for head, head_pattern in enumerate(pattern.patterns):
        if ranges and ranges[-1][1] == head_pattern:
            ranges[-1] = (range(ranges[-1][0].start, head + 1), head_pattern)
        else:
            ranges.append((range(head, head + 1), head_pattern))
    return ranges


def native_plan(pattern: Pattern, length: int, transposed: bool = False) -> tuple[_C.Branch, ...]:
    """The plan, or its transposed branches, in the kernels' structs."""
    return _native_plan(pattern.rule, length, transposed)


@lru_cache(maxsize=1024)
def _native_plan(rule: Pattern, length: int, transposed: bool) -> tuple[_C.Branch, ...]:
    branches = plan(rule, length)
    if transposed:
        branches = tuple(part for branch in branches for part in branch.transposed())
    return tuple(_native_branch(branch) for branch in branches)


def _native_branch(branch: Branch) -> _C.Branch:
    run = _native_run(branch.run)
    segments = [(_native_view(s.keys), _PARTS[s.part]) for s in branch.segments]
    return native().Branch(_native_view(branch.queries), run, segments, branch.block)


def _native_run(run: Run) -> _C.Run:
    return native().Run(
        length=run.length,
        window=run.window,
        chunks=list(run.chunks),
        past=run.past,
        future=run.future,
    )


def _native_view(view: SequenceView) -> _C.SequenceView:
    return native().SequenceView(
        length=view.length,
        groups=view.groups,
        max_rows=view.max_rows,
        offset=view.offset,
        group_step=view.group_step,
        run=view.run,
        run_stride=view.run_stride,
    )
