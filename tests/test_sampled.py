# SPDX-License-Identifier: Apache-2.0
"""The oracle on sampled rows against the whole oracle."""

from __future__ import annotations

import pytest
import torch

import oracle
import sampled
from cases import Case, a_case, make_inputs
from compare import assert_close
from test_attention import assert_all_close, fixed_case, run

CASES = [
    a_case(dtype=torch.float64),
    fixed_case(dtype=torch.float64),
    fixed_case(dtype=torch.float64, causal=False, heads=(3, 3)),
    a_case(kind="summary", columns="1", offset="default", dtype=torch.float64),
    a_case(kind="local+chunk+dilated", n=100, causal=False, dtype=torch.bfloat16),
    fixed_case(dtype=torch.float16),
]


def samples_of(case: Case) -> dict[str, torch.Tensor]:
    return {"first": torch.arange(20), "random": torch.randperm(case.n)[:50]}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_mask_of_sampled_rows(case: Case) -> None:
    mask, everything = case.masks[0], torch.arange(case.n)
    members, rows = case.head_members[0], torch.randperm(case.n)[:40]
    assert sampled.attended(members, case.causal, rows, everything).equal(mask[rows])
    assert sampled.attended(members, case.causal, everything, rows).equal(mask[:, rows])


@pytest.mark.parametrize("queries_at_once", [16, 1 << 16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sampled_oracle_is_the_oracle(
    case: Case, queries_at_once: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampled, "QUERIES_AT_ONCE", queries_at_once)
    x = make_inputs(case, seed)
    exact = oracle.attention(x.q, x.k, x.v, case.masks, None, x.dout, x.dlse)
    actual = vars(exact)
    members, rows = case.head_members[0], torch.randperm(case.n)[:50]
    call = (members, case.causal, 1, case.heads[1] - 1, rows)
    for name, value in sampled.query_results(x, *call).items():
        assert_close(name, value, actual[name][1, call[3], rows])
    for name, value in sampled.key_gradients(x, exact.out, exact.lse, *call).items():
        assert_close(name, value, actual[name][1, call[3], rows])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_samples_of_a_call(case: Case, seed: int) -> None:
    """Passes on a right call, and fails on each result with one row off."""
    x = make_inputs(case, seed)
    actual = run(x, case.pattern, "torch")
    members, samples = case.head_members[0], samples_of(case)
    heads = [(0, 0), (1, case.heads[0] - 1)]
    sampled.assert_samples_close(x, actual, members, case.causal, samples, heads)
    for name, tensor in actual.items():
        assert tensor is not None
        wrong = tensor.detach().clone()
        wrong[1, -1, 17] += 1 if name == "lse" else 0.5
        planted = {**actual, name: wrong}
        with pytest.raises(AssertionError, match=rf"^{name} of batch 1, .*first positions"):
            sampled.assert_samples_close(x, planted, members, case.causal, samples, heads)


@pytest.mark.parametrize("case", [c for c in CASES if c.dtype != torch.float64], ids=str)
def test_rounding_is_that_of_the_oracle(case: Case, seed: int) -> None:
    """The errors that the tolerance rule allows are as large as the whole oracle's."""
    x = make_inputs(case, seed)
    arguments = (x.q, x.k, x.v, case.masks, None, x.dout, x.dlse)
    exact, low = oracle.attention(*arguments), oracle.attention(*arguments, rounding=case.dtype)
    call = (case.head_members[0], case.causal, 0, 0, torch.arange(case.n), None, case.dtype)
    results = sampled.query_results(x, *call)
    results |= sampled.key_gradients(x, low.out, low.lse, *call)
    assert_all_close(
        {name: low_part.to(case.dtype) for name, low_part in results.items() if name != "lse"},
        head_of(exact),
        head_of(low),
    )
    for name, value in results.items():
        reference = vars(head_of(exact))[name]
        error = (value.double() - reference)[reference.isfinite()].abs().max()
        allowed = (vars(head_of(low))[name].double() - reference)[reference.isfinite()].abs().max()
        assert allowed / 3 < error < allowed * 3, name


def head_of(result: oracle.Result) -> oracle.Result:
    """Batch entry 0 and head 0."""
    return oracle.Result(*(tensor[0, 0] for tensor in vars(result).values()))
