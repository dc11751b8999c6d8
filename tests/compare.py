# SPDX-License-Identifier: Apache-2.0
"""The tolerance rule, the only one.

max|x - ref| <= 2 * max|low - ref| + 2 * max|(ref + 0.3 - 0.3) - ref|, where ref is the fp64 oracle,
low the same maths rounded to the dtype under test, and the last term is evaluated in that dtype.
fp64: 1e-10 relative.
"""

from __future__ import annotations

import torch


def bound(reference: torch.Tensor, low: torch.Tensor | None, dtype: torch.dtype) -> float:
    """The largest error allowed for a result of ``dtype``; ``low`` is not used for fp64."""
    finite = reference.isfinite()
    reference = reference[finite].double()
    if reference.numel() == 0:
        return 0.0
    if dtype == torch.float64:
        return 1e-10 * max(reference.abs().max().item(), 1.0)
    assert low is not None, "a rounded reference is needed below fp64"
    low_error = (low[finite].double() - reference).abs().max().item()
    stored = reference.to(dtype)
    floor = (((stored + 0.3) - 0.3) - stored).double().abs().max().item()
    return 2 * low_error + 2 * floor


def error_share(
    actual: torch.Tensor, reference: torch.Tensor, low: torch.Tensor | None = None
) -> float:
    """Largest error as a share of what is allowed; for looking at margins."""
    finite = reference.isfinite()
    if not finite.any():
        return 0.0
    error = (actual.detach().double() - reference.double())[finite].abs().max().item()
    return error / max(bound(reference, low, actual.dtype), 1e-300)


def assert_close(
    name: str,
    actual: torch.Tensor | None,
    reference: torch.Tensor | None,
    low: torch.Tensor | None = None,
) -> None:
    """Raise unless ``actual`` keeps to the rule, with inf and NaN where the reference has them."""
    assert actual is not None, f"{name}: nothing came back"
    assert reference is not None, f"{name}: the reference holds nothing"
    assert actual.shape == reference.shape, (
        f"{name}: shape {tuple(actual.shape)}, wanted {tuple(reference.shape)}"
    )
    actual = actual.detach()
    if actual.numel() == 0:
        return
    if low is not None:
        _assert_same_places(f"{name} (rounded reference)", low, reference)
    _assert_same_places(name, actual, reference)
    allowed = bound(reference, low, actual.dtype)
    error = (actual.double() - reference.double()).abs()
    error = error.masked_fill(~reference.isfinite(), 0)
    passed = error <= allowed
    if passed.all():
        return
    worst = int(error.argmax())
    raise AssertionError(
        f"{name} ({actual.dtype}): {passed.double().mean().item():.2%} of {passed.numel()} elements"
        f" are within {allowed:.3e}; worst {_at(actual, reference, worst)},"
        f" off by {error.flatten()[worst].item():.3e};"
        f" first {_at(actual, reference, int((~passed).flatten().nonzero()[0]))}"
    )


def assert_same_bits(name: str, actual: torch.Tensor | None, other: torch.Tensor | None) -> None:
    """Raise unless both hold the same bits (so NaN equals NaN, and 0 differs from -0)."""
    assert actual is not None and other is not None, f"{name}: nothing came back"
    assert actual.dtype == other.dtype and actual.shape == other.shape, name
    word = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[actual.element_size()]
    a = actual.detach().contiguous().view(word)
    b = other.detach().contiguous().view(word)
    different = a != b
    if different.any():
        first = int(different.flatten().nonzero()[0])
        raise AssertionError(
            f"{name}: {int(different.sum())} of {a.numel()} elements differ in their bits;"
            f" first {_at(actual, other, first)}"
        )


def _assert_same_places(name: str, actual: torch.Tensor, reference: torch.Tensor) -> None:
    for kind, test in (("nan", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        different = test(actual) != test(reference)
        if different.any():
            first = int(different.flatten().nonzero()[0])
            share = 1 - different.double().mean().item()
            raise AssertionError(
                f"{name}: {kind} in other places than the reference at {int(different.sum())}"
                f" elements ({share:.2%} agree); first {_at(actual, reference, first)}"
            )


def _at(actual: torch.Tensor, reference: torch.Tensor, flat: int) -> str:
    position = tuple(int(x) for x in torch.unravel_index(torch.tensor(flat), actual.shape))
    return (
        f"at {position}: {actual.flatten()[flat].item():.9g},"
        f" wanted {reference.flatten()[flat].item():.9g}"
    )
