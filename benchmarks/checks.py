# SPDX-License-Identifier: Apache-2.0
"""Whether a result is right: sampled rows against the definition of the pattern, in fp64.

`relation` says in (i, j) what a pattern attends; it knows neither masks of n x n nor plans. A
result keeps to the tolerance rule of CONTRIBUTING.md or is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_attn import Chunk, Dense, Dilated, Local, Pattern, Summary
from sparse_attn.patterns import Union

from .cases import Case, layout_block

Relation = Callable[[Tensor, Tensor], Tensor]

SAMPLED_QUERIES = 32
SAMPLED_KEYS = 4
SAMPLED_HEADS = 2
# Scores at once, and scores in all for the keys' gradients.
STRIP = 1 << 26
MOST_SCORES = 1 << 31


def relation(pattern: Pattern) -> Relation:
    """Whether query i attends key j, for integer tensors i and j that broadcast."""
    if isinstance(pattern, Union):
        members = [relation(member) for member in pattern.members]

        def any_member(i: Tensor, j: Tensor) -> Tensor:
            seen = members[0](i, j)
            for member in members[1:]:
                seen = seen | member(i, j)
            return seen

        return any_member
    rule = _rule(pattern)
    if not getattr(pattern, "causal", True):
        return rule
    return lambda i, j: rule(i, j) & (j <= i)


def _rule(pattern: Pattern) -> Relation:
    """The relation without regard to direction."""
    if isinstance(pattern, Dense):
        return lambda i, j: (i >= 0) & (j >= 0)
    if isinstance(pattern, Local):
        window = pattern.window
        return lambda i, j: (i - j < window) & (j - i < window)
    if isinstance(pattern, Chunk):
        length = pattern.length
        return lambda i, j: i // length == j // length
    if isinstance(pattern, Dilated):
        stride = pattern.stride
        return lambda i, j: i % stride == j % stride
    if isinstance(pattern, Summary):
        length, first = pattern.length, pattern.offset
        end = first + pattern.columns
        return lambda i, j: (j % length >= first) & (j % length < end) & (i >= 0)
    layout = getattr(pattern, "layout", None)
    if isinstance(layout, Tensor) and layout.shape[0] == 1:
        block, blocks = layout_block(pattern), layout[0]
        return lambda i, j: blocks[i // block, j // block]
    raise NotImplementedError(f"no relation for {pattern!r}")


@dataclass(frozen=True)
class Rows:
    """Attention of some queries, with what their gradients need."""

    out: Tensor  # (rows, head_dim_v)
    weights: Tensor  # (rows, keys)
    dscores: Tensor  # (rows, keys)
    dq: Tensor  # (rows, head_dim)


def attend_rows(
    q: Tensor,  # (rows, head_dim)
    k: Tensor,  # (keys, head_dim)
    v: Tensor,  # (keys, head_dim_v)
    seen: Tensor,  # bool (rows, keys)
    dout: Tensor,  # (rows, head_dim_v)
    scale: float,
    rounding: torch.dtype | None,
) -> Rows:
    """In fp64; in fp32 with scores, weights and products rounded to a dtype if one is given."""
    work = torch.float64 if rounding is None else torch.float32
    q, k, v, dout = (x.to(work) for x in (q, k, v, dout))

    def rounded(x: Tensor) -> Tensor:
        return x if rounding is None else x.to(rounding).to(work)

    scores = rounded(q @ k.mT * scale).masked_fill(~seen, -math.inf)
    lse = torch.logsumexp(scores, -1, keepdim=True)
    weights = rounded(torch.exp(scores - lse.masked_fill(lse == -math.inf, 0)))
    out = rounded(weights @ v)
    delta = (dout * out).sum(-1, keepdim=True)
    dscores = rounded(weights * (rounded(dout @ v.mT) - delta))
    return Rows(out, weights, dscores, rounded(dscores @ k * scale))


class Reference:
    """Sampled rows of out and dq, and of dk and dv, exact and with what each may be off."""

    def __init__(
        self,
        case: Case,
        q: Tensor,  # (batch, heads, seq, head_dim)
        k: Tensor,
        v: Tensor,  # (batch, heads, seq, head_dim_v)
        dout: Tensor,  # like v
        backward: bool = True,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def some(count: int, below: int, start: int = 0) -> list[int]:
            chosen = torch.randint(start, below, (count,), generator=generator)
            return [int(x) for x in chosen]

        n, device = case.seq, q.device
        self.heads = list(
            zip(some(SAMPLED_HEADS, case.batch), some(SAMPLED_HEADS, case.heads), strict=True)
        )
        queries = sorted({0, n - 1, *some(SAMPLED_QUERIES, n)})
        # Late keys have few queries at any length.
        keys = sorted({n - 1, *some(1, n, max(n - 64, 0)), *some(SAMPLED_KEYS, n)})
        self.queries = torch.tensor(queries, device=device, dtype=torch.int32)
        self.seen = relation(case.on(device).pattern)
        self.keys = self._affordable(torch.tensor(keys, device=device, dtype=torch.int32), n)
        self.names = ("out", "dq", "dk", "dv") if backward else ("out",)
        samples = [self._sample(head, q, k, v, dout, case.dtype) for head in self.heads]
        exact, low = ([sample[which] for sample in samples] for which in (0, 1))
        self.exact = {name: torch.stack([x[name] for x in exact]) for name in self.names}
        self.allowed = {
            name: _allowed(self.exact[name], torch.stack([x[name] for x in low]), case.dtype)
            for name in self.names
        }

    def error_share(self, results: Mapping[str, Tensor]) -> float:
        """The largest error of the results, by name, as a share of what is allowed."""
        worst = 0.0
        for name, result in results.items():
            places = self.queries if name in ("out", "dq") else self.keys
            sampled = torch.stack([result.detach()[head][places] for head in self.heads]).double()
            error = (sampled - self.exact[name]).abs().max().item()
            worst = max(worst, error / self.allowed[name] if math.isfinite(error) else math.inf)
        return worst

    def _affordable(self, keys: Tensor, n: int) -> Tensor:
        """The keys with the fewest queries, until the queries' scores are too many."""
        everything = torch.arange(n, device=keys.device, dtype=torch.int32)[:, None]
        queries = self.seen(everything, keys[None]).sum(0)
        order = queries.argsort()
        kept = (queries[order].cumsum(0) * n <= MOST_SCORES).nonzero().flatten()
        return keys[order[kept]].sort().values

    def _sample(
        self,
        head: tuple[int, int],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dout: Tensor,
        dtype: torch.dtype,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The sampled rows of one head, exact and rounded."""
        q, k, v, dout = (x.detach()[head] for x in (q, k, v, dout))
        n, scale = q.shape[0], 1 / math.sqrt(q.shape[1])
        everything = torch.arange(n, device=q.device, dtype=torch.int32)
        precisions = ((torch.float64, None), (torch.float32, dtype))

        def rows(positions: Tensor) -> tuple[list[Rows], Tensor]:
            """Attention of the queries at some positions, and the keys it is over."""
            seen = self.seen(positions[:, None], everything[None])
            columns = seen.any(0).nonzero().flatten()
            args = q[positions], k[columns], v[columns], seen[:, columns], dout[positions]
            return [attend_rows(*args, scale, rounding) for _, rounding in precisions], columns

        strip = max(STRIP // n, 1)
        parts = [rows(positions)[0] for positions in self.queries.split(strip)]
        samples = [
            {
                "out": torch.cat([part[which].out for part in parts]),
                "dq": torch.cat([part[which].dq for part in parts]),
                "dk": q.new_zeros(len(self.keys), k.shape[1], dtype=work),
                "dv": q.new_zeros(len(self.keys), v.shape[1], dtype=work),
            }
            for which, (work, _) in enumerate(precisions)
        ]
        if "dk" in self.names:
            is_seeing = self.seen(everything[:, None], self.keys[None]).any(1)
            for positions in is_seeing.nonzero().flatten().int().split(strip):
                part, columns = rows(positions)
                # Keys that no query of the strip attends are not among its columns.
                place = torch.searchsorted(columns, self.keys.long()).clamp(max=len(columns) - 1)
                here = columns[place] == self.keys
                for of_part, sample, (work, _) in zip(part, samples, precisions, strict=True):
                    weights = of_part.weights[:, place] * here
                    dscores = of_part.dscores[:, place] * here
                    sample["dv"] += weights.mT @ dout[positions].to(work)
                    sample["dk"] += dscores.mT @ q[positions].to(work) * scale
            for name in ("dk", "dv"):
                samples[1][name] = samples[1][name].to(dtype)
        return samples[0], samples[1]


def _allowed(exact: Tensor, low: Tensor, dtype: torch.dtype) -> float:
    """2 max|low - exact| + 2 max|(exact + 0.3 - 0.3) - exact|, the last term in the dtype."""
    stored = exact.to(dtype)
    floor = (((stored + 0.3) - 0.3) - stored).double().abs().max().item()
    return 2 * (low.double() - exact).abs().max().item() + 2 * floor
