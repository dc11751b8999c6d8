# SPDX-License-Identifier: Apache-2.0
"""Which pattern each head of each block uses (paper, section 5.1).

The factorised patterns have two members, a near and a far one:

| pattern | near          | far                              |
|---------|---------------|----------------------------------|
| fixed   | Chunk(stride) | Summary(stride, columns, offset) |
| strided | Local(stride) | Dilated(stride)                  |

- "merged": every head attends to the union of both.
- "multihead": the first half of the heads is near, the second far; an odd head is near.
- "interleaved": blocks 0, 2, 4, ... are near, blocks 1, 3, 5, ... far.

"dense" and "local" have one member, so all compositions agree.
"""

from __future__ import annotations

from ..patterns import Chunk, Dense, Dilated, Local, Pattern, PerHead, Summary
from .config import SparseTransformerConfig


def head_patterns(config: SparseTransformerConfig, layer: int) -> tuple[Pattern, ...]:
    """The pattern of each head of block ``layer``."""
    heads = config.heads
    if config.pattern == "dense":
        return (Dense(),) * heads
    if config.pattern == "local":
        return (Local(config.stride),) * heads
    near = Chunk(config.stride) if config.pattern == "fixed" else Local(config.stride)
    if config.composition == "merged":
        return tuple(near | far_member(config, index) for index in range(heads))
    if config.composition == "multihead":
        near_heads, far_heads = heads - heads // 2, heads // 2
    else:
        near_heads, far_heads = (heads, 0) if layer % 2 == 0 else (0, heads)
    return (near,) * near_heads + tuple(far_member(config, index) for index in range(far_heads))


def far_member(config: SparseTransformerConfig, index: int) -> Pattern:
    """The far member of the head number ``index`` among those that have one.

    Blocks of summary columns are dealt in turn, the last block of a stride first.
    """
    if config.pattern == "strided":
        return Dilated(config.stride)
    block = 1 + index % config.summary_blocks
    return Summary(config.stride, config.columns, config.stride - block * config.columns)


def layer_pattern(config: SparseTransformerConfig, layer: int) -> Pattern:
    """The pattern of block ``layer``: one for all heads, or `PerHead` where they differ."""
    patterns = head_patterns(config, layer)
    return patterns[0] if len(set(patterns)) == 1 else PerHead(patterns)
