# SPDX-License-Identifier: Apache-2.0
"""A plan as text, for programs without Python: ``csrc/kernel_bench/plan_file.h`` reads it.

One fact a line, every number behind its name, in a fixed order; ``branches`` is followed by that
many branches. The name of the pattern is there for reports alone.
"""

from __future__ import annotations

from .patterns import Pattern, PerHead, check_size
from .plan import Branch, SequenceView, keys_per_query, plan

VERSION = 2


def plan_text(pattern: Pattern, length: int) -> str:
    """The plan of a pattern at ``length`` >= 1 tokens.

    >>> from sparse_attn import Local
    >>> print(plan_text(Local(2), 3).splitlines()[3])
    pairs 5
    """
    if isinstance(pattern, PerHead):
        raise ValueError("each head of a PerHead has its own plan: write that of one of its heads")
    check_size("n", length)
    branches = plan(pattern, length)
    if any(branch.block for branch in branches):
        raise ValueError("a plan file holds no layout of blocks")
    every_key = branches[0].segments[0].keys.lists_every_token
    lines = [
        f"sparse_attn plan {VERSION}",
        f"name {pattern.spec}",
        f"length {length}",
        f"pairs {int(keys_per_query(pattern, length).sum())}",
        f"zero_key_gradients {int(not every_key)}",
        f"branches {len(branches)}",
        *(line for branch in branches for line in _branch_lines(branch)),
        "end",
    ]
    return "\n".join(lines) + "\n"


def _branch_lines(branch: Branch) -> list[str]:
    run = branch.run
    chunks = " ".join(map(str, (len(run.chunks), *run.chunks)))
    return [
        f"queries {_view(branch.queries)}",
        f"run window {run.window} past {int(run.past)} future {int(run.future)} chunks {chunks}",
        f"segments {len(branch.segments)}",
        *(f"keys {segment.part} {_view(segment.keys)}" for segment in branch.segments),
    ]


def _view(view: SequenceView) -> str:
    return (
        f"groups {view.groups} max_rows {view.max_rows} offset {view.offset} "
        f"group_step {view.group_step} run {view.run} run_stride {view.run_stride}"
    )
