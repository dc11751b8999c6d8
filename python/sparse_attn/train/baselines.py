# SPDX-License-Identifier: Apache-2.0
"""What a trained model is compared with: byte counts of order 0 to 3 with backoff, and xz."""

import lzma
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray


def byte_probabilities(train: bytes, text: bytes, max_order: int) -> list[NDArray[np.float64]]:
    """Probability of every byte of `text` under count models of order 0 to `max_order`.

    The model of order k predicts a byte s from the k bytes c before it, by Witten-Bell
    interpolation with the next shorter context c':

        P_k(s | c) = (count(c s) + kinds(c) * P_{k-1}(s | c')) / (count(c) + kinds(c))

    where count is taken over `train`, kinds(c) is the number of different bytes seen after c, and
    P_{-1} = 1/256. A context never seen in training leaves P_{k-1} unchanged, and so do the first k
    bytes of `text`, which have no context of length k. Each P_k(. | c) sums to one.

    Returns one float64 array of shape (len(text),) for each order. Raises ValueError if `train` has
    no more than `max_order` bytes.
    """
    if not 0 <= max_order <= 3:
        raise ValueError(f"max_order is {max_order}, wanted 0 to 3")
    if len(train) <= max_order:
        raise ValueError(f"{len(train)} training bytes are too few for order {max_order}")
    probability = np.full(len(text), 1 / 256)
    result = []
    for order in range(max_order + 1):
        grams, gram_count = np.unique(_grams(train, order), return_counts=True)
        contexts, first = np.unique(grams >> 8, return_index=True)
        context_count = np.add.reduceat(gram_count, first)
        kinds = np.diff(first, append=len(grams))

        wanted = _grams(text, order)
        seen = _look_up(contexts, context_count, wanted >> 8)
        spread = _look_up(contexts, kinds, wanted >> 8)
        shorter = probability[order:]
        counted = _look_up(grams, gram_count, wanted) + spread * shorter
        probability = probability.copy()
        probability[order:] = np.divide(counted, seen + spread, out=shorter.copy(), where=seen > 0)
        result.append(probability)
    return result


def count_model_bits(train: bytes, text: bytes, max_order: int = 3) -> list[float]:
    """Bits per byte of `text` under the count models of order 0 to `max_order`."""
    return [float(-np.log2(p).mean()) for p in byte_probabilities(train, text, max_order)]


def xz_bits(train: bytes, text: bytes) -> float:
    """Bits per byte that xz needs for `text` once it has seen `train`.

    8 * (size of xz(train + text) - size of xz(train)) / len(text), at preset 6 with a dictionary
    that holds both, so that every match in the training text can be used.
    """
    dictionary = max(1 << 16, len(train) + len(text))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": dictionary}]

    def size(data: bytes) -> int:
        return len(lzma.compress(data, format=lzma.FORMAT_RAW, filters=filters))

    with ThreadPoolExecutor(2) as pool:
        alone, both = pool.map(size, (train, train + text))
    return 8 * (both - alone) / len(text)


def _grams(text: bytes, order: int) -> NDArray[Any]:
    """Every run of order + 1 bytes as one integer, the last byte lowest: (len(text) - order,)."""
    values = np.frombuffer(text, dtype=np.uint8)
    length = max(0, len(values) - order)
    grams: NDArray[Any] = np.zeros(length, dtype=np.uint32)
    for offset in range(order + 1):
        grams = (grams << 8) | values[offset : offset + length]
    return grams


def _look_up(keys: NDArray[Any], values: NDArray[Any], wanted: NDArray[Any]) -> NDArray[Any]:
    """Value of every wanted key in the sorted `keys`, 0 where it is missing."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)
