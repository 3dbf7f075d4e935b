"""Packs: every row once, none too full, few; the same for a seed and epoch, resumable, equal over ranks."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from datasets import Dataset

from lightning_ft.data import EncodedRows, Padding
from lightning_ft.data.packing import PackedRows, PackSampler

LENGTHS = (torch.randint(5, 400, (500,), generator=torch.Generator().manual_seed(0)) ** 2 // 400 + 3).tolist()


def epoch(sampler: PackSampler, number: int = 0) -> list[list[list[int]]]:
    sampler.set_epoch(number)
    return [list(batch) for batch in sampler]


def test_every_row_once_and_no_pack_too_full() -> None:
    sampler = PackSampler(LENGTHS, 4, 512)
    for number in range(3):
        packs = [pack for batch in epoch(sampler, number) for pack in batch]
        assert sorted(row for pack in packs for row in pack) == list(range(500))
        assert max(sum(LENGTHS[row] for row in pack) for pack in packs) <= 512
        assert len(packs) == sampler.packs <= 1.03 * sum(LENGTHS) / 512 + 1
        assert len(epoch(sampler, number)) == len(sampler)


def test_few_packs_by_hand() -> None:
    # 6+4, 5+5, 3+3+3 fill three packs; first come, first served would take four.
    assert PackSampler([3, 5, 6, 3, 5, 4, 3], 1, 10).packs == 3
    assert PackSampler([10, 10, 1], 1, 10).packs == 3
    # 14+6, 12+4+4: the 6 goes where it fits best, not where most room is.
    assert PackSampler([4, 12, 6, 14, 4], 1, 20).packs == 2


def test_order_is_a_function_of_seed_and_epoch_and_mixes_rows() -> None:
    same, other = PackSampler(LENGTHS, 4, 512), PackSampler(LENGTHS, 4, 512, seed=1)
    assert epoch(same, 1) == epoch(PackSampler(LENGTHS, 4, 512), 1)
    orders = [epoch(same, 0), epoch(same, 1), epoch(other, 0)]
    mates = [{frozenset(pack) for batch in order for pack in batch} for order in orders]
    assert len(mates[0] & mates[1]) < same.packs / 3
    assert len(mates[0] & mates[2]) < same.packs / 3


def test_ranks_share_an_epoch_evenly() -> None:
    ranks = [epoch(PackSampler(LENGTHS, 2, 512, num_replicas=4, rank=rank)) for rank in range(4)]
    assert len({len(batches) for batches in ranks}) == 1
    assert len({tuple(len(batch) for batch in batches) for batches in ranks}) == 1
    seen = Counter(row for batches in ranks for batch in batches for pack in batch for row in pack)
    assert set(seen) == set(range(500))
    alone = [pack for batch in epoch(PackSampler(LENGTHS, 8, 512)) for pack in batch]
    together = [pack for step in zip(*ranks, strict=True) for packs in zip(*step, strict=True) for pack in packs]
    assert together == [*alone, alone[-7]]  # 135 packs in steps of 8: the last step's first one comes again


def test_resumes_at_a_batch() -> None:
    whole, resumed = PackSampler(LENGTHS, 4, 512), PackSampler(LENGTHS, 4, 512)
    resumed.resume_at(1, 5)
    assert [list(batch) for batch in resumed] == epoch(whole, 1)[5:]
    assert [list(batch) for batch in resumed] == epoch(whole, 1)
    assert whole.identity() == resumed.identity()
    for changed in (PackSampler(LENGTHS, 4, 511), PackSampler(LENGTHS, 4, 512, seed=1), PackSampler(LENGTHS, 5, 512)):
        assert changed.identity() != whole.identity()
    assert all(type(value) is int for value in whole.identity().values())


def test_a_row_longer_than_a_pack_is_refused() -> None:
    with pytest.raises(ValueError, match="a row of 11 tokens does not fit into packs of 10"):
        PackSampler([3, 11], 1, 10)
    with pytest.raises(ValueError, match="batch_size must be 1 or more, got 0"):
        PackSampler([3], 0, 10)


@pytest.mark.parametrize("left", [False, True])
def test_batch_layout(left: bool) -> None:
    table = Dataset.from_dict(
        {
            "input_ids": [[0], [11, 12, 13], [21, 22], [31], [41, 42]],
            "labels": [[0], [-100, 12, 13], [21, 22], [31], [-100, 42]],
            "truncated": [False] * 5,
        }
    )
    rows = PackedRows(EncodedRows(table, Padding(9, left=left, multiple=4), rows=torch.tensor([1, 2, 3, 4])))
    assert (len(rows), rows.lengths.tolist()) == (4, [3, 2, 1, 2])
    batch = rows[[[0, 1], [3, 2]]]
    assert {name: values.tolist() for name, values in batch.items()} == {
        "input_ids": [[11, 12, 13, 21, 22, 9, 9, 9], [41, 42, 31, 9, 9, 9, 9, 9]],
        "labels": [[-100, 12, 13, -100, 22, -100, -100, -100], [-100, 42, -100, -100, -100, -100, -100, -100]],
        "position_ids": [[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 0, 0, 1, 2, 3, 4]],
        "row": [1, 2, 4, 3],
    }
    assert rows[[1, 0]]["input_ids"].tolist() == [[21, 22, 9, 9], [11, 12, 13, 9]]
