"""Random numbers that are a function of what they are for: the same in any order, on any process, after any resume."""

from __future__ import annotations

from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def random_key(*parts: int) -> int:
    """A 64-bit key (as a signed integer) from integers of up to 64 bits, such as a seed, an epoch and a row.

    Each part is mixed in by the output function of SplitMix64, so that (1, 0) and (0, 1) are unrelated.

    Example:
        >>> random_key(1, 0) != random_key(0, 1)
        True

    Reference:
        Steele, Lea and Flood 2014, "Fast Splittable Pseudorandom Number Generators".
    """
    state = 0
    for part in parts:
        state = _mix((state + _GOLDEN ^ part) & _MASK)
    return _signed(state)


def random_bits(key: int | Tensor, counters: Tensor) -> Tensor:
    """64 random bits for each counter, as signed integers: SplitMix64 with the counter in place of its sequence.

    Args:
        key: From :func:`random_key`; or a tensor of keys, which broadcasts with the counters.
        counters: 64-bit integers of any shape.

    Example:
        >>> import torch
        >>> random_bits(0, torch.tensor([0])).item() & (1 << 64) - 1 == 0xE220A8397B1DCDAF  # SplitMix64's first output
        True
    """
    # Integer tensors wrap around, as the algorithm wants it.
    state = (counters + 1) * _signed(_GOLDEN) + key
    state = (state ^ _shift(state, 30)) * _signed(_FIRST)
    state = (state ^ _shift(state, 27)) * _signed(_SECOND)
    return state ^ _shift(state, 31)


def uniform(bits: Tensor) -> Tensor:
    """Numbers in [0, 1), in double precision, from the upper 53 of 64 random bits.

    Example:
        >>> import torch
        >>> uniform(torch.tensor([-1, 0])).tolist()
        [0.9999999999999999, 0.0]
    """
    return _shift(bits, 11).double() * 2.0**-53


def below(bits: Tensor, limit: int) -> Tensor:
    """Integers in [0, limit) from the lower 32 of 64 random bits; ``limit`` may be at most 2³¹.

    Example:
        >>> import torch
        >>> below(torch.tensor([0, (1 << 32) - 1]), 10).tolist()
        [0, 9]
    """
    return ((bits & 0xFFFFFFFF) * limit) >> 32


def _mix(state: int) -> int:
    state = ((state ^ state >> 30) * _FIRST) & _MASK
    state = ((state ^ state >> 27) * _SECOND) & _MASK
    return state ^ state >> 31


def _shift(values: Tensor, bits: int) -> Tensor:
    """Shift right, zeros following: ``>>`` would repeat the sign."""
    return (values >> bits) & ((1 << 64 - bits) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
