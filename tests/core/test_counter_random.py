"""Counter-based random numbers: SplitMix64's own outputs, and what chance looks like."""

from __future__ import annotations

import torch

from lightning_ft.core.counter_random import below, random_bits, random_key, uniform


def test_equals_splitmix64() -> None:
    # First outputs for the seed 1234567, as published with the algorithm (Rosetta Code, "Pseudo-random numbers").
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    bits = random_bits(1234567, torch.arange(5))
    assert [value % 2**64 for value in bits.tolist()] == expected


def test_keys_depend_on_every_part_and_their_order() -> None:
    keys = {random_key(*parts) for a in range(-3, 10) for b in range(10) for parts in ((a, b), (a, b, 0), (a,))}
    assert len(keys) == 13 * 10 * 2 + 13
    assert all(-(2**63) <= key < 2**63 for key in keys)


def test_uniform_numbers_are_uniform_and_unrelated() -> None:
    count = 200_000
    counters = torch.arange(count)
    first, second = (uniform(random_bits(random_key(0, epoch), counters)) for epoch in (0, 1))
    for values in (first, second):
        assert 0 <= values.min() < values.max() < 1
        cells = torch.bincount((values * 100).long(), minlength=100).double()
        chi_squared = float(((cells - count / 100) ** 2 / (count / 100)).sum())
        assert 50 < chi_squared < 160  # 99 degrees of freedom: 4.3 sigma to either side
        assert abs(float(torch.corrcoef(torch.stack([values[1:], values[:-1]]))[0, 1])) < 4 / count**0.5
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 4 / count**0.5


def test_below_reaches_every_number() -> None:
    numbers = below(random_bits(random_key(3), torch.arange(100_000)), 7)
    counts = torch.bincount(numbers)
    assert len(counts) == 7
    assert float((counts / 100_000 - 1 / 7).abs().max()) < 4 * (1 / 7 * 6 / 7 / 100_000) ** 0.5
    assert int(below(torch.tensor([-1]), 2**31).item()) == 2**31 - 1
