import time
from collections import Counter

import pytest
import torch

from lightning_ft.data import LengthBucketSampler, padding_waste
from lightning_ft.data.multi_task import TaskSampler
from lightning_ft.data.packing import PackSampler


def lengths_of(seed: int, rows: int, longest: int = 60) -> torch.Tensor:
    return torch.randint(1, longest, (rows,), generator=torch.Generator().manual_seed(seed))


def ranks(lengths: torch.Tensor, batch_size: int, world: int, **kwargs) -> list[list[list[int]]]:
    samplers = [LengthBucketSampler(lengths, batch_size, num_replicas=world, rank=r, **kwargs) for r in range(world)]
    for sampler in samplers:
        sampler.set_epoch(3)
    drawn = [list(sampler) for sampler in samplers]
    assert [len(sampler) for sampler in samplers] == [len(batches) for batches in drawn]
    return drawn


SHAPES = [
    (1, 1, 1),
    (5, 2, 1),
    (64, 8, 2),
    (65, 8, 2),
    (127, 4, 4),
    (333, 7, 3),
    (1000, 32, 1),
    (1001, 16, 5),
    (3, 2, 4),
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("rows", "batch_size", "world"), SHAPES)
def test_training_covers_every_row_in_equal_batches(rows: int, batch_size: int, world: int, seed: int) -> None:
    lengths = lengths_of(seed, rows)
    drawn = ranks(lengths, batch_size, world, seed=seed, megabatch=3)
    assert len({tuple(map(len, batches)) for batches in drawn}) == 1
    counts = Counter(row for batches in drawn for batch in batches for row in batch)
    assert set(counts) == set(range(rows))
    assert counts.total() - rows < world  # only as many repeats as make the last batch even
    assert all(len(batch) <= batch_size for batches in drawn for batch in batches)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("rows", "batch_size", "world"), SHAPES)
def test_ranks_together_draw_the_batches_of_one_process(rows: int, batch_size: int, world: int, seed: int) -> None:
    lengths = lengths_of(seed, rows)
    drawn = ranks(lengths, batch_size, world, seed=seed)
    [single] = ranks(lengths, batch_size * world, 1, seed=seed)
    for parts, whole in zip(zip(*drawn, strict=True), single, strict=True):
        together = [row for part in parts for row in part]
        assert set(together) == set(whole)
        assert len(together) == -(-len(whole) // world) * world


def test_ranks_draw_rows_of_like_length() -> None:
    lengths = lengths_of(0, 4000, longest=200)
    drawn = ranks(lengths, 8, 4)
    means = torch.tensor([[lengths[batch].double().mean() for batch in batches] for batches in drawn])
    assert (means.amax(0) - means.amin(0)).max() < 3


def test_order_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        sampler = LengthBucketSampler(lengths_of(0, 200), 8, seed=seed)
        sampler.set_epoch(epoch)
        torch.manual_seed(epoch)  # of no influence
        return list(sampler)

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2)
    assert order(0, 1) != order(1, 0)  # not a function of the sum
    assert order(0, 1) != order(2**32, 1)  # nor of the seed's lower half


def test_costliest_batch_comes_first_and_ties_are_shuffled() -> None:
    lengths = lengths_of(1, 500)
    for seed in range(5):
        batches = list(LengthBucketSampler(lengths, 16, seed=seed, megabatch=4))
        cost = [len(batch) * int(lengths[batch].max()) for batch in batches]
        assert cost[0] == max(cost)
        assert cost != sorted(cost, reverse=True)
    equal = torch.ones(64, dtype=torch.int64)
    assert len({tuple(map(tuple, LengthBucketSampler(equal, 8, seed=seed))) for seed in range(5)}) == 5


@pytest.mark.parametrize(
    ("rows", "batch_size", "world"), [s for s in SHAPES if s[0] >= s[2]] + [(33, 32, 2), (3, 1, 2)]
)
def test_evaluation_repeats_and_omits_nothing(rows: int, batch_size: int, world: int) -> None:
    lengths = lengths_of(2, rows)
    drawn = ranks(lengths, batch_size, world, shuffle=False)
    assert sorted(row for batches in drawn for batch in batches for row in batch) == list(range(rows))
    assert len({len(batches) for batches in drawn}) == 1
    largest = max(batch_size, 2 if rows % world else 1)  # one row more where batch_size=1 cannot be even
    assert all(0 < len(batch) <= largest for batches in drawn for batch in batches)
    for batches in drawn:
        found = [int(lengths[row]) for batch in batches for row in batch]
        assert found == sorted(found, reverse=True)


def test_resume_at_begins_one_iteration_in_the_middle() -> None:
    sampler = LengthBucketSampler(lengths_of(3, 100), 8, seed=5)
    sampler.set_epoch(2)
    whole = list(sampler)
    sampler.set_epoch(0)
    sampler.resume_at(2, 4)
    assert sampler.epoch == 2
    assert len(sampler) == len(whole) == 13
    assert list(sampler) == whole[4:]
    assert list(sampler) == whole
    sampler.resume_at(2, 13)
    assert list(sampler) == whole
    sampler.resume_at(1, 4)
    sampler.set_epoch(2)
    assert list(sampler) == whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": [], "batch_size": 2}, "0 rows cannot be split over 1"),
        (
            {"lengths": [3, 4], "batch_size": 2, "num_replicas": 3, "shuffle": False},
            "2 rows cannot .* 3 processes.*fewer dev",
        ),
        ({"lengths": [3], "batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"lengths": [3], "batch_size": 1, "megabatch": 0}, "megabatch must be 1 or more, got 0"),
        ({"lengths": [3], "batch_size": 1, "rank": 1}, "Invalid rank 1"),
    ],
)
def test_refusals(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LengthBucketSampler(**arguments)


def test_the_order_of_the_lengths_is_part_of_the_identity() -> None:
    lengths = torch.tensor([5, 9, 1, 7])
    whole = LengthBucketSampler(lengths, 2).identity()
    assert whole == LengthBucketSampler(lengths.tolist(), 2).identity()
    assert whole != LengthBucketSampler(lengths.flip(0), 2).identity()
    assert whole != LengthBucketSampler([5, 9, 2, 6], 2).identity()
    assert PackSampler(lengths, 2, 10).identity() != PackSampler(lengths.flip(0), 2, 10).identity()
    tasks = [
        TaskSampler({"a": LengthBucketSampler(given, 2)}, temperature=1.0, cap=None, seed=0).identity()
        for given in (lengths, lengths.flip(0))
    ]
    assert tasks[0] != tasks[1]


def test_negative_position_is_refused() -> None:
    with pytest.raises(ValueError, match="0 or more, got 0 and -1"):
        LengthBucketSampler([1], 1).resume_at(0, -1)


def test_pads_no_more_than_transformers() -> None:
    from transformers.trainer_pt_utils import get_length_grouped_indices

    lengths = (torch.randn(4000, generator=torch.Generator().manual_seed(0)).exp() * 20).long() + 3
    order = get_length_grouped_indices(lengths.tolist(), 32, generator=torch.Generator().manual_seed(0))
    theirs = padding_waste(lengths, [order[i : i + 32] for i in range(0, len(order), 32)])
    ours = padding_waste(lengths, list(LengthBucketSampler(lengths, 32)))
    random = padding_waste(lengths, list(LengthBucketSampler(lengths, 32, megabatch=1)))
    assert ours < theirs < random / 5


def test_a_million_rows_take_no_loop() -> None:
    sampler = LengthBucketSampler(lengths_of(0, 1_000_000, longest=512), 32)
    start = time.perf_counter()
    assert len(next(iter(sampler))) == 32
    assert time.perf_counter() - start < 5  # 0.5 s on an idle core
