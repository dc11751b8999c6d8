# SPDX-License-Identifier: Apache-2.0
# The native module (csrc/bindings.cpp). ``cover`` counts, for branches of one plan, how often each
# (query, key) pair is attended, uint8 (length, length), with the index arithmetic and in the tiles
# of the kernels; ``backends.cuda.native_plan(pattern, length)`` makes the branches.

max_chunks: int

class SequenceView:
    def __init__(
        self,
        *,
        length: int,
        groups: int,
        max_rows: int,
        offset: int,
        group_step: int,
        run: int,
        run_stride: int,
    ) -> None: ...

class Run:
    def __init__(
        self, *, length: int, window: int, chunks: list[int], past: bool, future: bool
    ) -> None: ...

class Branch:
    def __init__(
        self,
        queries: SequenceView,
        run: Run,
        segments: list[tuple[SequenceView, int]],  # 0 before, 1 inside, 2 after the run
        block: int,  # rows in a block; 0 without blocks
    ) -> None: ...
    # rows: address of 32-bit words (heads, blocks, words), a bit for each attended block.
    def with_blocks(self, *, rows: int, words: int, head_stride: int) -> Branch: ...
    # The same pairs; chunks and residues that are short for a tile are listed together.
    def with_short_groups_together(self, tile_rows: int) -> Branch: ...

def cover(branches: list[Branch], length: int, tile_queries: int, tile_keys: int) -> bytes: ...

# What the launches of neighbouring heads share; strides are of batch, head and row, in elements.
class CallParams:
    def __init__(
        self,
        *,
        q: tuple[int, int, int],
        k: tuple[int, int, int],
        v: tuple[int, int, int],
        out: tuple[int, int, int],
        batch: int,
        heads: int,
        first_head: int,
        head_count: int,
        kv_heads: int,
        seq: int,
        head_dim: int,
        head_dim_v: int,
        scale: float,
        bfloat16: bool,
        sm90: bool,
        device: int,
    ) -> None: ...

class BackwardParams:
    def __init__(
        self,
        call: CallParams,
        *,
        dout: tuple[int, int, int],
        dq: tuple[int, int, int],
        dk: tuple[int, int, int],
        dv: tuple[int, int, int],
        heads_together: int,  # of dk and dv
    ) -> None: ...

class GradientLaunch:
    first_head: int
    head_count: int
    owner: int  # 0 queries: dq; 1 keys: dk and dv; 2: all
    branch: Branch  # keys as queries unless queries own
    accumulate: bool
    finds_stats: bool  # of the queries, for itself and the launches after it
    workspace: int  # bytes
    writes_every_dq: bool  # else dq must be 0 before

# The launches for the gradients of a call, complete but for addresses.
class Gradients:
    launches: list[GradientLaunch]
    stats_before: bool  # a launch finds the statistics first
    keeps_stats: bool  # there must be memory for them
    workspace: int  # bytes, shared by the launches
    def __init__(
        self,
        ranges: list[tuple[BackwardParams, tuple[Branch, ...]]],  # of heads, with their plan
    ) -> None: ...

def build_info() -> dict[str, str]: ...

# Only in a build with CUDA kernels.
def head_dims() -> list[tuple[int, int]]: ...
def sm90_fits(head_dim: int, head_dim_v: int) -> bool: ...
def driver_version() -> int: ...

class ForwardParams:
    def __init__(self, call: CallParams, branches: tuple[Branch, ...]) -> None: ...  # at most 2

# The launches of a call; all arguments but the stream are addresses, 0 for none.
class ForwardCall:
    counters: int  # int32 numbers to overwrite: they hand out the work, and order it
    def __init__(self, launches: list[ForwardParams]) -> None: ...
    def __call__(
        self,
        q: int,
        k: int,
        v: int,
        out: int,
        lse: int,
        block_rows: int,
        counters: int,
        stream: int,
        /,
    ) -> None: ...

class BackwardCall:
    def __init__(self, gradients: Gradients) -> None: ...
    def __call__(
        self,
        dout: int,
        q: int,
        k: int,
        v: int,
        out: int,
        lse: int,
        dlse: int,
        stats: int,
        dq: int,
        dk: int,
        dv: int,
        query_block_rows: int,
        key_block_rows: int,
        workspace: int,  # overwritten
        stream: int,
        /,
    ) -> None: ...

class BlockRowsParams:
    def __init__(
        self,
        *,
        layout: tuple[int, int, int, int],  # address; stride of heads, of the rows' and other side
        rows: int,
        heads: int,
        blocks: int,
        words: int,
        past: bool,
        future: bool,
        device: int,
        stream: int,
    ) -> None: ...

def block_rows(params: BlockRowsParams) -> None: ...

# Keys of one segment of a branch, out of the store with that number.
class DecodeRead:
    def __init__(
        self,
        queries: SequenceView,
        run: Run,
        keys: SequenceView,
        part: int,  # 0 before, 1 inside the run
        store: int,
    ) -> None: ...

# Rows of the kv heads of a launch, as (address, batch, head and row stride).
class DecodeStore:
    def __init__(
        self,
        k: tuple[int, int, int, int],
        v: tuple[int, int, int, int],
        tokens: SequenceView,  # those that it lists
        slots: int,
    ) -> None: ...

class DecodeParams:
    def __init__(
        self,
        *,
        q: tuple[int, int, int, int],
        k_new: tuple[int, int, int, int],
        v_new: tuple[int, int, int, int],
        out: tuple[int, int, int, int],
        position: int,  # address of an int64
        parts: int,
        part_out: int,
        batch: int,
        heads: int,
        first_head: int,
        head_count: int,
        kv_heads: int,
        new_tokens: int,
        head_dim: int,
        head_dim_v: int,
        part_count: int,
        scale: float,
        bfloat16: bool,
        reads: list[DecodeRead],
        stores: list[DecodeStore],
        device: int,
        stream: int,
    ) -> None: ...

def decode_parts(params: DecodeParams) -> None: ...
def decode_finish(params: DecodeParams) -> None: ...
