"""Counter-based random numbers: Philox-4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011).

A number depends only on (seed, offset), so every rank, every device and every implementation draws the same one.
The words equal those of Triton's `tl.randint(seed, offset)`.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator
from inspect import signature
from typing import Any, TypeVar

import numpy as np
import torch

Word = TypeVar("Word", int, "np.ndarray[Any, Any]", torch.Tensor)  # 32-bit words, held in Python ints or in int64

_LOW32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_BLOCK = 1 << 16  # offsets per pass, so that the temporaries stay in cache


def _multiply(constant: int, word: Word) -> tuple[Word, Word]:
    """Return the high and low 32 bits of a 32 x 32 bit product, from halves, so that int64 never overflows."""
    low = constant * (word & 0xFFFF)  # < 2^48
    high = constant * (word >> 16) + (low >> 16)  # < 2^48 + 2^32
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(c0: Word, c1: Word, c2: Word, c3: Word, k0: Word | int, k1: Word | int) -> tuple[Word, Word, Word, Word]:
    """Do ten rounds of Philox-4x32 on the counter (c0, c1, c2, c3) under the key (k0, k1)."""
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _LOW32, (k1 + _WEYL[1]) & _LOW32
    return c0, c1, c2, c3


def random_bits(seed: int, start: int, count: int, device: torch.device | str | None = None) -> torch.Tensor:
    """Return words start .. start + count - 1 of the stream `seed`: (count,) int64, uniform in [0, 2^32).

    The key is the low and high half of the 64-bit seed, the counter is (offset low, offset high, 0, 0), and the first
    output word is taken. These are the words of Triton's `tl.randint(seed, offset)`, read as unsigned.
    """
    words = torch.empty(count, dtype=torch.int64, device=device)
    for a in range(0, count, _BLOCK):
        b = min(a + _BLOCK, count)
        offset = torch.arange(start + a, start + b, dtype=torch.int64, device=device)
        zero = torch.zeros_like(offset)
        words[a:b] = philox(offset & _LOW32, offset >> 32, zero, zero, seed & _LOW32, (seed >> 32) & _LOW32)[0]
    return words


def derive_seed(seed: int, *ints: int) -> int:
    """Return a 63-bit seed for the stream named by `ints` (epoch, layer, ...); their order counts."""
    for position, value in enumerate(ints):
        seed = _derived(seed, value, position)
    return seed


def derive_seeds(seed: int, epoch: int, layers: int, streams: int) -> np.ndarray[Any, Any]:
    """Return derive_seed(seed, epoch, layer, stream) for all layers and streams: (layers, streams) int64."""
    of_layer = _derived(np.array(_derived(seed, epoch, 0)), np.arange(layers), 1)
    return _derived(of_layer[:, None], np.arange(streams)[None, :], 2)


@contextlib.contextmanager
def kept(devices: Iterable[torch.device]) -> Iterator[None]:
    """Put the global generators back afterwards: torch's of the CPU and of these devices, NumPy's and Python's."""
    own, numpys, pythons = torch.get_rng_state(), np.random.get_state(), random.getstate()
    others = {device: torch.get_device_module(device) for device in set(devices) if device.type != "cpu"}
    # There is one MPS device, and its functions take none.
    where = {device: (device,) * len(signature(module.get_rng_state).parameters) for device, module in others.items()}
    states = {device: module.get_rng_state(*where[device]) for device, module in others.items()}
    try:
        yield
    finally:
        for device, module in others.items():
            module.set_rng_state(states[device], *where[device])
        torch.set_rng_state(own)
        np.random.set_state(numpys)
        random.setstate(pythons)


def _derived(seed: Word, value: Word, position: int) -> Word:
    first, second = value * 0 + position, value * 0 + 1  # of the type of the others
    key = seed & _LOW32, (seed >> 32) & _LOW32
    low, high, _, _ = philox(value & _LOW32, (value >> 32) & _LOW32, first, second, *key)
    return (high & 0x7FFFFFFF) << 32 | low
