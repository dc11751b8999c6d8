# SPDX-License-Identifier: Apache-2.0
"""The cuda backend: the native kernels. The only module that imports the extension ``_C``."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..patterns import BlockSparse, Pattern, PerHead
from ..plan import Branch, Run, SequenceView, plan
from ..tensor_meta import AnyTensor, TensorMeta

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
_ALIGNMENT = 16  # bytes


def native() -> Any:
    """The extension module; ImportError if the package was not built."""
    from .. import _C

    return _C


@cache
def driver_version() -> int:
    """CUDA version that the driver supports, 13000 for 13.0; 0 without a driver."""
    return int(native().driver_version())


def unsupported(q: AnyTensor, k: AnyTensor, v: AnyTensor, pattern: Pattern) -> str | None:
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


def unsupported_by_sm90(q: AnyTensor, v: AnyTensor, pattern: Pattern) -> str | None:
    """Why Hopper's own kernels do not run inputs that the others can; None if they do."""
    capability = _capability(q.device)
    if capability != _HOPPER:
        return "the GPU has compute capability {}.{}, they need 9.0".format(*capability)
    if not native().sm90_fits(q.shape[3], v.shape[3]):
        return f"they have no pair for head_dim {q.shape[3]}, head_dim_v {v.shape[3]}"
    if isinstance(pattern, BlockSparse) and pattern.block < _LEAST_BLOCK_SM90:
        return f"the blocks are of {pattern.block} tokens, they take {_LEAST_BLOCK_SM90} or more"
    return None


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


class ForwardCall:
    """A forward call, prepared for tensors of some shapes and strides: all but their addresses."""

    def __init__(
        self,
        pattern: Pattern,
        scale: float,
        q: TensorMeta,
        k: TensorMeta,
        v: TensorMeta,
        out: TensorMeta,
        *,
        sm90: bool,
    ) -> None:
        self._pattern, self._scale, self._sm90 = pattern, scale, sm90
        self._device: int = q.device.index
        self._aligned = all(map(_has_aligned_rows, (q, k, v)))
        if self._aligned:
            self._launch = _forward_launches(
                q, k, v, out, pattern.rule, _layout_heads(pattern), scale, sm90
            )

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: torch.Tensor | None,
        out: torch.Tensor,
        lse: torch.Tensor,
    ) -> None:
        q_address, k_address, v_address = q.data_ptr(), k.data_ptr(), v.data_ptr()
        if not self._aligned or (q_address | k_address | v_address) % _ALIGNMENT:
            q, k, v = map(_aligned, (q, k, v))
            metas = (TensorMeta.of(x) for x in (q, k, v, out))
            call = ForwardCall(self._pattern, self._scale, *metas, sm90=self._sm90)
            return call(q, k, v, layout, out, lse)
        rows = _block_rows(self._pattern, layout, keys_own=False)
        # Of this call alone: calls on other streams, or in a graph, run at the same time.
        size = self._launch.counters
        counters = lse.new_empty(size, dtype=torch.int32) if size else None
        self._launch(
            q_address,
            k_address,
            v_address,
            out.data_ptr(),
            lse.data_ptr(),
            _address(rows),
            _address(counters),
            _stream(self._device),
        )


class BackwardCall:
    """A backward call, prepared for tensors of some shapes and strides: all but their addresses."""

    def __init__(
        self,
        pattern: Pattern,
        scale: float,
        dout: TensorMeta,
        q: TensorMeta,
        k: TensorMeta,
        v: TensorMeta,
        out: TensorMeta,
        dq: TensorMeta,
        dk: TensorMeta,
        dv: TensorMeta,
        *,
        sm90: bool,
    ) -> None:
        self._pattern, self._scale, self._sm90 = pattern, scale, sm90
        self._device: int = q.device.index
        self._aligned = all(map(_has_aligned_rows, (dout, q, k, v, out)))
        group = q.shape[1] // k.shape[1]
        ranges = _head_ranges(pattern.rule, q.shape[1])
        # Heads of one kv head that differ: each has a dk and dv of its own, summed in the end.
        self._summed = None
        if any(heads.start % group or heads.stop % group for heads, _ in ranges):
            group = 1
            dk, dv = (_contiguous(x, q.shape[1]) for x in (k, v))
            self._summed = dk, dv
        # The launches write only the keys that a segment lists.
        self._zeroed = [
            slice(heads.start // group, heads.stop // group)
            for heads, head_pattern in ranges
            if not plan(head_pattern, q.shape[2])[0].segments[0].keys.lists_every_token
        ]
        if self._aligned:
            self._launches = _backward_launches(
                dout,
                q,
                k,
                v,
                out,
                dq,
                dk,
                dv,
                group,
                pattern.rule,
                _layout_heads(pattern),
                scale,
                sm90,
            )

    def __call__(
        self,
        dout: torch.Tensor,
        dlse: torch.Tensor | None,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        layout: torch.Tensor | None,
        dq: torch.Tensor,
        dk: torch.Tensor,
        dv: torch.Tensor,
    ) -> None:
        addresses = dout.data_ptr(), q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()
        if not self._aligned or any(address % _ALIGNMENT for address in addresses):
            dout, q, k, v, out = map(_aligned, (dout, q, k, v, out))
            metas = (TensorMeta.of(x) for x in (dout, q, k, v, out, dq, dk, dv))
            call = BackwardCall(self._pattern, self._scale, *metas, sm90=self._sm90)
            return call(dout, dlse, q, k, v, out, lse, layout, dq, dk, dv)
        kv_dk, kv_dv = dk, dv
        if self._summed is not None:
            dk, dv = (meta.empty() for meta in self._summed)
        for heads in self._zeroed:
            dk[:, heads].zero_()
            dv[:, heads].zero_()
        launches = self._launches
        for heads in launches.zeroed_queries:
            dq[:, heads].zero_()
        dlse = None if dlse is None else dlse.contiguous()
        stats = lse.new_empty((*lse.shape, 2)) if launches.keeps_stats else None
        query_rows = _block_rows(self._pattern, layout, keys_own=False)
        key_rows = _block_rows(self._pattern, layout, keys_own=True)
        # Of this call alone, as the counters of a forward call.
        workspace = None
        if launches.workspace:
            workspace = lse.new_empty(launches.workspace, dtype=torch.uint8)
        launches.launch(
            *addresses,
            lse.data_ptr(),
            _address(dlse),
            _address(stats),
            dq.data_ptr(),
            dk.data_ptr(),
            dv.data_ptr(),
            _address(query_rows),
            _address(key_rows),
            _address(workspace),
            _stream(self._device),
        )
        if self._summed is not None:
            kv_dk.copy_(dk.unflatten(1, (k.shape[1], -1)).sum(2, dtype=torch.float32))
            kv_dv.copy_(dv.unflatten(1, (k.shape[1], -1)).sum(2, dtype=torch.float32))


@lru_cache(maxsize=1024)
def _forward_launches(
    q: TensorMeta,
    k: TensorMeta,
    v: TensorMeta,
    out: TensorMeta,
    rule: Pattern,
    layout_heads: int,
    scale: float,
    sm90: bool,
) -> _C.ForwardCall:
    """One for each range of heads."""
    launches = [
        native().ForwardParams(
            _call_params(q, k, v, out, scale, sm90, heads),
            _branches(pattern, q.shape[2], layout_heads),
        )
        for heads, pattern in _head_ranges(rule, q.shape[1])
    ]
    return native().ForwardCall(launches)


@lru_cache(maxsize=1024)
def _backward_launches(
    dout: TensorMeta,
    q: TensorMeta,
    k: TensorMeta,
    v: TensorMeta,
    out: TensorMeta,
    dq: TensorMeta,
    dk: TensorMeta,
    dv: TensorMeta,
    group: int,
    rule: Pattern,
    layout_heads: int,
    scale: float,
    sm90: bool,
) -> _BackwardLaunches:
    """The statistics of the queries; then dq, dk and dv for each range of heads and each branch."""
    strides = _strides(dout=dout, dq=dq, dk=dk, dv=dv)
    ranges = []
    for heads, pattern in _head_ranges(rule, q.shape[1]):
        call = _call_params(q, k, v, out, scale, sm90, heads)
        params = native().BackwardParams(call, **strides, heads_together=group)
        ranges.append((params, _branches(pattern, q.shape[2], layout_heads)))
    gradients = native().Gradients(ranges)
    return _BackwardLaunches(
        native().BackwardCall(gradients),
        keeps_stats=gradients.keeps_stats,
        workspace=gradients.workspace,
        zeroed_queries=[
            slice(launch.first_head, launch.first_head + launch.head_count)
            for launch in gradients.launches
            if not launch.accumulate and not launch.writes_every_dq
        ],
    )


class _BackwardLaunches(NamedTuple):
    launch: _C.BackwardCall
    keeps_stats: bool  # whether there must be memory for the statistics
    workspace: int  # bytes
    zeroed_queries: list[slice]  # heads whose dq must be zero before


def _block_rows(
    pattern: Pattern, layout: torch.Tensor | None, keys_own: bool
) -> torch.Tensor | None:
    """The blocks that each block of queries, or of keys if they own, attends, a bit each.

    int32 (heads or 1, blocks, words), made on the GPU: the layout never comes to the host.
    """
    if layout is None or not isinstance(pattern, BlockSparse):
        return None
    layout = layout.mT if keys_own else layout
    heads, count, _ = layout.shape
    rows = layout.new_empty((heads, count, _words(count)), dtype=torch.int32)
    native().block_rows(
        native().BlockRowsParams(
            layout=(layout.data_ptr(), *layout.stride()),
            rows=rows.data_ptr(),
            heads=heads,
            blocks=count,
            words=rows.shape[2],
            past=not pattern.causal or not keys_own,
            future=not pattern.causal or keys_own,
            **_device(layout),
        )
    )
    return rows


def _branches(pattern: Pattern, seq: int, layout_heads: int) -> tuple[_C.Branch, ...]:
    """The plan, with the sizes of a layout's block rows; their address comes later."""
    branches = native_plan(pattern, seq)
    if not isinstance(pattern, BlockSparse):
        return branches
    count = -(-seq // pattern.block)
    stride = count * _words(count) if layout_heads > 1 else 0
    return tuple(
        branch.with_blocks(rows=0, words=_words(count), head_stride=stride) for branch in branches
    )


def _layout_heads(pattern: Pattern) -> int:
    """0 without a layout."""
    return len(pattern.layout) if isinstance(pattern, BlockSparse) else 0


def _words(blocks: int) -> int:
    """Of 32 bits, one for each block."""
    return -(-blocks // 32)


def _call_params(
    q: TensorMeta,
    k: TensorMeta,
    v: TensorMeta,
    out: TensorMeta,
    scale: float,
    sm90: bool,
    heads: range,
) -> _C.CallParams:
    """What the launches of some heads share."""
    batch, all_heads, seq, head_dim = q.shape
    return native().CallParams(
        **_strides(q=q, k=k, v=v, out=out),
        batch=batch,
        heads=all_heads,
        first_head=heads.start,
        head_count=len(heads),
        kv_heads=k.shape[1],
        seq=seq,
        head_dim=head_dim,
        head_dim_v=v.shape[3],
        scale=scale,
        bfloat16=q.dtype == torch.bfloat16,
        sm90=sm90,
        device=q.device.index,
    )


def _strides(**metas: TensorMeta) -> dict[str, tuple[int, ...]]:
    """Of batch, head and row."""
    return {name: meta.strides[:3] for name, meta in metas.items()}


def _device(x: torch.Tensor) -> dict[str, int]:
    return {"device": x.device.index, "stream": _stream(x.device.index)}


def _address(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _stream(device: int) -> int:
    """Address of the current stream: torch.cuda.current_stream, which makes an object, is slow."""
    return torch._C._cuda_getCurrentRawStream(device)


def _has_aligned_rows(x: TensorMeta) -> bool:
    """Whether rows are contiguous and start on 16 bytes, if the first one does."""
    steps = [stride for size, stride in zip(x.shape[:3], x.strides[:3], strict=True) if size > 1]
    contiguous_rows = x.strides[3] == 1 or x.shape[3] == 1
    near = x.shape[2] <= 1 or x.strides[2] <= _MOST_ROW_STRIDE
    return contiguous_rows and near and all(step % 8 == 0 for step in steps)


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy whose rows are contiguous and start on 16 bytes (8 elements)."""
    if _has_aligned_rows(TensorMeta.of(x)) and x.data_ptr() % _ALIGNMENT == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _contiguous(x: TensorMeta, heads: int) -> TensorMeta:
    """Like x, contiguous, with another number of heads."""
    batch, _, seq, head_dim = x.shape
    strides = heads * seq * head_dim, seq * head_dim, head_dim, 1
    return TensorMeta(torch.Size((batch, heads, seq, head_dim)), strides, x.dtype, x.device)


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


def native_plan(pattern: Pattern, length: int) -> tuple[_C.Branch, ...]:
    """The plan in the kernels' structs."""
    return _native_plan(pattern.rule, length)


@lru_cache(maxsize=1024)
def _native_plan(rule: Pattern, length: int) -> tuple[_C.Branch, ...]:
    return tuple(_native_branch(branch) for branch in plan(rule, length))


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
