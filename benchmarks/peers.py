# SPDX-License-Identifier: Apache-2.0
"""Who competes: this package, SDPA, FlexAttention, FlashAttention 3 and 4, and what can be
composed of them.

A peer says which cases it serves and prepares a function of (q, k, v); `Unavailable` carries the
reason why it cannot. To add a peer, add a class and list it in `gpu_peers` or `cpu_peers`.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

import sparse_attn as sa
from sparse_attn import Chunk, Dense, Dilated, Local, Pattern, Summary
from sparse_attn.patterns import Union

from . import views
from .cases import Case, layout_block
from .checks import Relation, relation

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
FLEX_BLOCK = 128
STRIP = 1 << 26
# Bytes that a mask or the lists of a BlockMask may take.
MOST_MASK_BYTES = 16 << 30


class Unavailable(Exception):
    """A peer cannot run a case: "missing" (not installed) or "not run", with the reason."""

    def __init__(self, reason: str, status: str = "not run") -> None:
        super().__init__(reason)
        self.reason, self.status = reason, status


@dataclass(frozen=True)
class Prepared:
    """What a peer runs for a case."""

    attend: Attend  # (batch, heads, seq, head_dim) x 3 -> (batch, heads, seq, head_dim_v)
    case: Case  # what it computes; dense peers may compute another pattern at batch 1
    tokens_first: bool = False  # inputs in (batch, seq, heads, dim) memory
    times: int = 1  # the measured time counts so often
    note: str = ""
    block_mask_s: float | None = None
    has_forward: bool = True  # else it is another peer's
    has_backward: bool = True


class Peer(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def compiles(self) -> bool:
        """Whether preparing takes seconds of compilation."""
        ...

    def serves(self, case: Case) -> bool: ...
    def prepare(self, case: Case, device: torch.device) -> Prepared: ...


def gpu_peers() -> list[Peer]:
    return [
        Ours("cuda"),
        Kernel("sdpa flash", partial(_load_sdpa, SDPBackend.FLASH_ATTENTION)),
        Kernel("sdpa cudnn", partial(_load_sdpa, SDPBackend.CUDNN_ATTENTION)),
        Kernel("fa3", partial(_load_flash, "flash_attn_interface", False), has_window=True),
        Deterministic(
            "fa3 deterministic",
            partial(_load_flash, "flash_attn_interface", True),
            has_window=True,
        ),
        Kernel(
            "fa4",
            partial(_load_flash, "flash_attn.cute", False),
            has_window=True,
            compiles=True,
        ),
        Deterministic(
            "fa4 deterministic",
            partial(_load_flash, "flash_attn.cute", True),
            has_window=True,
            compiles=True,
        ),
        ComposedFlash(),
        Flex(),
        Flex("flex 128", block=FLEX_BLOCK),
        ComposedFlex(),
    ]


def cpu_peers() -> list[Peer]:
    return [Ours("torch"), Masked(), Flex(), ComposedFlex()]


@dataclass(frozen=True)
class Ours:
    """`sparse_attn.attention` on one backend."""

    backend: str
    name: str = "sparse_attn"
    compiles: bool = False

    def serves(self, case: Case) -> bool:
        return True

    def prepare(self, case: Case, device: torch.device) -> Prepared:
        pattern, backend = case.pattern, self.backend
        return Prepared(lambda q, k, v: sa.attention(q, k, v, pattern, backend=backend), case)


# Attention over all keys up to the query, or over a window of them.
CausalAttend = Callable[[Tensor, Tensor, Tensor, int | None], Tensor]


@dataclass(frozen=True)
class Kernel:
    """A dense causal kernel: whole, in a window where it has one, or on zero-copy views.

    For a merged head it computes what a user without sparsity would: dense attention.
    """

    name: str
    load: Callable[[], CausalAttend]
    has_window: bool = False
    compiles: bool = False

    def serves(self, case: Case) -> bool:
        windowed = isinstance(case.pattern, Local) and self.has_window
        return windowed or isinstance(case.pattern, Dense | Chunk | Dilated | Union)

    def prepare(self, case: Case, device: torch.device) -> Prepared:
        kernel, pattern = self.load(), case.pattern

        def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return kernel(q, k, v, None)

        if isinstance(pattern, Union):
            note = f"dense, {case.batch} x batch 1" if case.batch > 1 else "dense"
            return Prepared(whole, case.dense(), True, times=case.batch, note=note)
        if isinstance(pattern, Local):
            window = pattern.window
            return Prepared(lambda q, k, v: kernel(q, k, v, window), case, True, note="window")
        if isinstance(pattern, Chunk):
            length = _divisor(pattern.length, case)

            def chunked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                batch = q.shape[0]
                q, k, v = (views.chunks(x, length) for x in (q, k, v))
                return views.from_chunks(kernel(q, k, v, None), batch)

            return Prepared(chunked, case, True, note="view")
        if isinstance(pattern, Dilated):
            stride = _divisor(pattern.stride, case)

            def dilated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                q, k, v = (views.residues(x, stride) for x in (q, k, v))
                return views.from_residues(kernel(q, k, v, None), stride)

            return Prepared(dilated, case, True, note="view")
        return Prepared(whole, case, True)


@dataclass(frozen=True)
class Deterministic(Kernel):
    """The backward pass of a kernel that gives the same bits in every call.

    Only where that costs most: many blocks of keys add to the dq of a query.
    """

    def serves(self, case: Case) -> bool:
        return case.pattern in (Dense(), Local(1024))

    def prepare(self, case: Case, device: torch.device) -> Prepared:
        return replace(super().prepare(case, device), has_forward=False)


@dataclass(frozen=True)
class Masked:
    """SDPA with the whole mask."""

    name: str = "sdpa mask"
    compiles: bool = False

    def serves(self, case: Case) -> bool:
        return True

    def prepare(self, case: Case, device: torch.device) -> Prepared:
        # SDPA turns a bool mask into one of the inputs' dtype.
        needed = case.seq**2 * (1 + case.dtype.itemsize)
        if needed > MOST_MASK_BYTES:
            raise Unavailable(f"mask memory: {needed / 1e9:.0f} GB")
        token = torch.arange(case.seq, device=device, dtype=torch.int32)
        related, strip = relation(case.pattern), max(STRIP // case.seq, 1)
        mask = torch.cat([related(i[:, None], token[None]) for i in token.split(strip)])
        return Prepared(
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask), case
        )


@dataclass(frozen=True)
class Flex:
    """Compiled FlexAttention, in blocks of 128 or of the layout's size."""

    name: str = "flex"
    block: int | None = None
    compiles: bool = True

    def serves(self, case: Case) -> bool:
        # The second form is for layouts whose blocks FlexAttention's backward cannot take.
        return self.block is None or layout_size(case.pattern) not in (None, self.block)

    def prepare(self, case: Case, device: torch.device) -> Prepared:
        block = self.block or layout_size(case.pattern) or FLEX_BLOCK
        related = relation(case.pattern)
        begin = time.perf_counter()
        mask = block_mask(related, case.seq, case.seq, device, block)
        if layout_size(case.pattern) == block:
            mask.mask_mod = _mask_mod(relation(Dense()))  # partial blocks are on the diagonal
        _synchronize(device)
        seconds = time.perf_counter() - begin
        options: Any = {"fwd_BLOCK_M": block, "fwd_BLOCK_N": block} if block < FLEX_BLOCK else None

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = flex_attention(q, k, v, block_mask=mask, kernel_options=options)
            assert isinstance(out, Tensor)
            return out

        return Prepared(
            compiled(attend),
            case,
            block_mask_s=seconds,
            has_backward=device.type == "cuda",  # inference only on a CPU
            note="" if block == FLEX_BLOCK else f"blocks of {block}",
        )


@dataclass(frozen=True)
class ComposedFlex:
    """A merged head from two FlexAttention calls, on permuted or compacted tensors, merged by lse.

    All of it in one compiled graph.
    """

    name: str = "composed flex"
    compiles: bool = True

    def serves(self, case: Case) -> bool:
        return _merged(case.pattern) is not None

    def prepare(self, case: Case, device: torch.device) -> Prepared:
        if device.type == "cpu":
            raise Unavailable("FlexAttention gives no lse on a CPU")
        merged = _merged(case.pattern)
        assert merged is not None
        near, far = merged
        begin = time.perf_counter()
        if isinstance(near, Local) and isinstance(far, Dilated):
            parts = self._strided(near, far, case, device)
        else:
            assert isinstance(near, Chunk) and isinstance(far, Summary)
            parts = self._fixed(near, far, case, device)
        _synchronize(device)
        seconds = time.perf_counter() - begin
        near_part, far_part = parts

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return sa.merge(*near_part(q, k, v), *far_part(q, k, v))[0]

        return Prepared(compiled(attend), case, tokens_first=True, block_mask_s=seconds)

    def _strided(
        self, near: Local, far: Dilated, case: Case, device: torch.device
    ) -> tuple[PartialAttend, PartialAttend]:
        """The window in token order; earlier rows of the residue as a view."""
        stride = _divisor(far.stride, case)
        if near.window != stride:
            raise Unavailable("window and stride differ")
        rows = case.seq // stride
        window = block_mask(relation(near), case.seq, case.seq, device)
        # The query's own row is in the window, earlier rows are not.
        earlier = block_mask(lambda i, j: j < i, rows, rows, device)

        def dilated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            q, k, v = (views.residues(x, stride) for x in (q, k, v))
            out, lse = _flex_lse(q, k, v, earlier)
            return views.from_residues(out, stride), views.from_residues(lse, stride)

        return lambda q, k, v: _flex_lse(q, k, v, window), dilated

    def _fixed(
        self, near: Chunk, far: Summary, case: Case, device: torch.device
    ) -> tuple[PartialAttend, PartialAttend]:
        """The own chunk as a view; summary keys of earlier chunks, compacted."""
        length = _divisor(near.length, case)
        if far.length != length:
            raise Unavailable("lengths of chunk and summary differ")
        columns, offset = far.columns, far.offset
        own = block_mask(relation(Dense()), length, length, device)
        panel_keys = case.seq // length * columns
        before = block_mask(lambda i, j: j < i // length * columns, case.seq, panel_keys, device)

        def chunked(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            batch = q.shape[0]
            q, k, v = (views.chunks(x, length) for x in (q, k, v))
            out, lse = _flex_lse(q, k, v, own)
            return views.from_chunks(out, batch), views.from_chunks(lse, batch)

        def summary(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            k, v = (views.panel(x, length, columns, offset) for x in (k, v))
            return _flex_lse(q, k, v, before)

        return chunked, summary


# (q, k, v) -> out, lse
PartialAttend = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class ComposedFlash:
    """A strided head from two FlashAttention-4 calls, whose lse is differentiable.

    The window leaves out the query's own key, which its residue has; the merge is compiled.
    """

    name: str = "composed fa4"
    compiles: bool = True

    def serves(self, case: Case) -> bool:
        merged = _merged(case.pattern)
        return merged is not None and isinstance(merged[1], Dilated)

    def prepare(self, case: Case, device: torch.device) -> Prepared:
        module = _import("flash_attn.cute")
        merged = _merged(case.pattern)
        assert merged is not None
        near, far = merged
        assert isinstance(near, Local) and isinstance(far, Dilated)
        stride = _divisor(far.stride, case)
        if near.window != stride or stride < 2:
            raise Unavailable("window and stride differ")

        def flash(q: Tensor, k: Tensor, v: Tensor, left: int | None) -> tuple[Tensor, Tensor]:
            args = (x.transpose(1, 2) for x in (q, k, v))
            window = (left, 0 if left is not None else None)
            out, lse = module.flash_attn_func(
                *args, causal=True, window_size=window, return_lse=True
            )
            return out.transpose(1, 2), lse

        @compiled
        def join(out: Tensor, lse: Tensor, far_out: Tensor, far_lse: Tensor) -> Tensor:
            # The first query has no key before it.
            out, lse = F.pad(out, (0, 0, 1, 0)), F.pad(lse, (1, 0), value=float("-inf"))
            far_out = views.from_residues(far_out, stride)
            return sa.merge(far_out, views.from_residues(far_lse, stride), out, lse)[0]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            window = flash(q[:, :, 1:], k[:, :, :-1], v[:, :, :-1], stride - 2)
            q, k, v = (views.residues(x, stride) for x in (q, k, v))
            return join(*window, *flash(q, k, v, None))

        return Prepared(attend, case, tokens_first=True)


def block_mask(
    related: Relation, queries: int, keys: int, device: torch.device, block: int = FLEX_BLOCK
) -> BlockMask:
    """The BlockMask that `create_block_mask` would give, built in strips of query blocks.

    It never holds a mask of queries x keys, so that FlexAttention is not out of memory before its
    block lists are.
    """
    query_blocks, key_blocks = -(-queries // block), -(-keys // block)
    # Four lists of int32, and while they are made sorted copies in int64.
    needed = query_blocks * key_blocks * (4 * 4 + 2 * 8)
    if needed > MOST_MASK_BYTES:
        raise Unavailable(f"mask memory: {needed / 1e9:.0f} GB")
    some = torch.empty(query_blocks, key_blocks, dtype=torch.bool, device=device)
    every = torch.empty_like(some)
    j = torch.arange(key_blocks * block, device=device, dtype=torch.int32)[None]
    strip = max(STRIP // (block * block * key_blocks), 1)
    for first in range(0, query_blocks, strip):
        last = min(first + strip, query_blocks)
        i = torch.arange(first * block, last * block, device=device, dtype=torch.int32)[:, None]
        # Past the ends nothing is attended, and the clamps keep layouts inside their blocks.
        seen = related(i.clamp(max=queries - 1), j.clamp(max=keys - 1)) & (i < queries) & (j < keys)
        tiles = seen.view(last - first, block, key_blocks, block)
        some[first:last] = tiles.any(3).any(1)
        every[first:last] = tiles.all(3).all(1)
    counts, indices = _block_lists(some & ~every)
    full_counts, full_indices = _block_lists(every)
    return BlockMask.from_kv_blocks(
        counts,
        indices,
        full_counts,
        full_indices,
        BLOCK_SIZE=block,
        mask_mod=_mask_mod(related),
        seq_lengths=(queries, keys),
    )


def _block_lists(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Number and indices of the key blocks of each query block, as (1, 1, ...) int32."""
    counts = blocks.sum(-1, dtype=torch.int32)
    indices = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return counts[None, None], indices.to(torch.int32)[None, None]


def _mask_mod(related: Relation) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    return lambda batch, head, i, j: related(i, j)


def _flex_lse(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> tuple[Tensor, Tensor]:
    # Fewer rows than a block would go to the kernel for decoding.
    options: Any = {"FORCE_USE_FLEX_ATTENTION": True} if q.shape[2] < FLEX_BLOCK else None
    request = AuxRequest(lse=True)
    out, aux = flex_attention(q, k, v, block_mask=mask, kernel_options=options, return_aux=request)
    assert isinstance(out, Tensor) and isinstance(aux.lse, Tensor)
    return out, aux.lse


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """One static graph; an error where it would break or be compiled too often."""
    return torch.compile(function, dynamic=False, fullgraph=True)


def layout_size(pattern: Pattern) -> int | None:
    """Tokens in a block of a block layout; None for other patterns."""
    return layout_block(pattern) if hasattr(pattern, "layout") else None


def _merged(pattern: Pattern) -> tuple[Pattern, Pattern] | None:
    """(near, far) of a merged strided or fixed head."""
    if not isinstance(pattern, Union) or len(pattern.members) != 2:
        return None
    near, far = pattern.members
    is_strided = isinstance(near, Local) and isinstance(far, Dilated)
    is_fixed = isinstance(near, Chunk) and isinstance(far, Summary)
    return (near, far) if is_strided or is_fixed else None


def _divisor(length: int, case: Case) -> int:
    if case.seq % length:
        raise Unavailable(f"no view: n is no multiple of {length}")
    return length


def _load_sdpa(backend: SDPBackend) -> CausalAttend:
    def attend(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return attend


def _load_flash(module_name: str, deterministic: bool) -> CausalAttend:
    function = _import(module_name).flash_attn_func
    options = {"deterministic": True} if deterministic else {}

    def attend(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        # Theirs is (batch, seq, heads, dim) and counts the keys left of the query.
        local = {} if window is None else {"window_size": (window - 1, 0)}
        args = (x.transpose(1, 2) for x in (q, k, v))
        result = function(*args, causal=True, **local, **options)
        out = result[0] if isinstance(result, tuple) else result
        assert isinstance(out, Tensor)
        return out.transpose(1, 2)

    return attend


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise Unavailable(f"no module {error.name}", "missing") from error
    except (ImportError, OSError, RuntimeError) as error:
        raise Unavailable(f"{name} does not import: {error}", "missing") from error


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
