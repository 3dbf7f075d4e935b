"""Masks: the rates, whole words, what they depend on and what they do not, and the time they take."""

from __future__ import annotations

import pickle
import time
from typing import Any

import pytest
import torch
import transformers as hf
from datasets import Dataset
from torch import Tensor

from lightning_ft.data.encoding import EncodedRows, Padding
from lightning_ft.data.masking import WORD_START, LabelledRows, Masking, next_token_labels
from lightning_ft.data.sampler import LengthBucketSampler, Positions
from tests.pretrained import tokenizer

BERT = tokenizer("bert")
SPECIAL = torch.tensor(BERT.all_special_ids)


def drawn(
    rows: int = 64,
    width: int = 128,
    *,
    keys: Tensor | None = None,
    draw: int = 0,
    starts: Tensor | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    ids = torch.randint(5, len(BERT), (rows, width), generator=torch.Generator().manual_seed(1))
    ids[:, 0], ids[:, -1] = BERT.cls_token_id, BERT.sep_token_id
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if starts is not None:
        batch[WORD_START] = starts
    masked = Masking(BERT, **options)(batch, torch.arange(rows) if keys is None else keys, draw)
    assert WORD_START not in masked
    return {**masked, "ids": ids}


def shares(batch: dict[str, Tensor]) -> tuple[int, dict[str, float]]:
    """How many tokens are chosen, and what became of them."""
    chosen = batch["labels"] != -100
    new, old = batch["input_ids"][chosen], batch["ids"][chosen]
    count = int(chosen.sum())
    hidden, kept = (new == BERT.mask_token_id).sum(), (new == old).sum()
    return count, {"mask": hidden.item() / count, "keep": kept.item() / count}


def within(share: float, expected: float, count: int) -> None:
    assert abs(share - expected) < 4 * (expected * (1 - expected) / count) ** 0.5, (share, expected)


def test_rates() -> None:
    batch = drawn(800)
    count, fates = shares(batch)
    ordinary = 800 * 126
    within(count / ordinary, 0.15, ordinary)
    within(fates["mask"], 0.8, count)
    random_is_same = 0.1 / (len(BERT) - len(SPECIAL))
    within(fates["keep"], 0.1 + random_is_same, count)
    chosen = batch["labels"] != -100
    assert torch.equal(batch["labels"][chosen], batch["ids"][chosen])
    assert torch.equal(batch["input_ids"][~chosen], batch["ids"][~chosen])
    assert not torch.isin(batch["labels"], SPECIAL).any()


def test_rates_are_those_of_transformers_collator() -> None:
    collate = hf.DataCollatorForLanguageModeling(BERT, seed=0)
    ours = drawn(400)
    theirs = collate([{"input_ids": row} for row in ours["ids"]])
    count, fates = shares(ours)
    their_count, their_fates = shares({**theirs, "ids": ours["ids"]})
    for share, other in ((count / 50400, their_count / 50400), *zip(fates.values(), their_fates.values(), strict=True)):
        tokens = 50400 if share == count / 50400 else count
        assert abs(share - other) < 4 * (2 * other * (1 - other) / tokens) ** 0.5


def test_other_shares() -> None:
    count, fates = shares(drawn(200, probability=0.4, mask_share=0.5, random_share=0.5))
    within(count / (200 * 126), 0.4, 200 * 126)
    within(fates["mask"], 0.5, count)
    assert fates["keep"] < 0.02
    assert shares(drawn(20, mask_share=0.0, random_share=0.0))[1] == {"mask": 0.0, "keep": 1.0}
    assert shares(drawn(20, mask_share=1.0, random_share=0.0))[1] == {"mask": 1.0, "keep": 0.0}


def test_random_tokens_are_ordinary_ones_and_all_of_them() -> None:
    batch = drawn(400, mask_share=0.0, random_share=1.0)
    new = batch["input_ids"][batch["labels"] != -100]
    assert not torch.isin(new, SPECIAL).any()
    counts = torch.bincount(new, minlength=len(BERT))[5:]
    assert (counts > 0).all()
    mean = counts.double().mean()
    assert float((counts - mean).abs().max()) < 5 * mean.sqrt()


def test_draws_and_rows_and_seeds_are_independent() -> None:
    first = drawn(400)["labels"][:, 1:-1] != -100
    for other in (drawn(400, draw=1), drawn(400, seed=1), drawn(400, keys=torch.arange(400) + 400)):
        both = ((other["labels"][:, 1:-1] != -100) & first).sum().item()
        within(both / first.numel(), 0.15**2, first.numel())
    # Neighbouring rows, and neighbouring tokens.
    for one, two in ((first[1:], first[:-1]), (first[:, 1:], first[:, :-1])):
        within((one & two).double().mean().item(), 0.15**2, one.numel())


def test_a_mask_depends_on_nothing_but_seed_draw_row_and_place() -> None:
    tokens = Dataset.from_dict({"input_ids": [[2, *range(5, 5 + n), 3] for n in (3, 9, 30, 17, 5)]})
    masking = Masking(BERT)
    whole: dict[int, tuple[list[int], list[int]]] = {}
    for left in (False, True):
        for positions in ([0], [4, 3, 2, 1, 0], [1, 0], [2, 4], [3]):
            rows = LabelledRows(EncodedRows(tokens, Padding(0, left=left, multiple=8)), masking, redraw=True)
            batch = rows[Positions(positions, 3)]
            for index, row in enumerate(batch["row"].tolist()):
                real = batch["attention_mask"][index] == 1
                mine = batch["input_ids"][index][real].tolist(), batch["labels"][index][real].tolist()
                assert whole.setdefault(row, mine) == mine
                assert (batch["labels"][index][~real] == -100).all()
    assert whole.keys() == set(range(5))


def test_every_row_has_a_mask_where_it_has_a_token() -> None:
    masking = Masking(BERT, probability=1e-9)
    ids = torch.tensor([[2, 9, 3, 0], [2, 9, 8, 3], [2, 1, 3, 0], [2, 3, 0, 0]])
    real = (ids != 0).long()
    for draw in range(20):
        labels = masking({"input_ids": ids, "attention_mask": real}, torch.arange(4), draw)["labels"]
        # The third row holds only an unknown token, the fourth nothing.
        assert (labels != -100).sum(1).tolist() == [1, 1, 0, 0]
        assert labels[0, 1] == 9
    forced = [
        int((masking({"input_ids": ids, "attention_mask": real}, torch.arange(4), draw)["labels"][1] == 9).sum())
        for draw in range(400)
    ]
    within(sum(forced) / 400, 0.5, 400)


def test_padding_that_is_an_ordinary_token_is_not_masked() -> None:
    ids = torch.full((50, 20), 9)
    real = (torch.arange(20) < 10).long().expand(50, 20)
    labels = Masking(BERT, probability=0.9)({"input_ids": ids, "attention_mask": real}, torch.arange(50), 0)["labels"]
    assert (labels[:, 10:] == -100).all()
    assert (labels[:, :10] != -100).any()


def test_whole_words_are_chosen_whole_and_keep_the_shares() -> None:
    starts = (torch.rand(400, 128, generator=torch.Generator().manual_seed(2)) < 0.6).long()
    starts[:, 0] = starts[:, 1] = starts[:, -1] = 1
    batch = drawn(400, starts=starts)
    chosen = (batch["labels"] != -100)[:, 1:-1]
    words = starts.cumsum(1)[:, 1:-1]
    inside = (words[:, 1:] == words[:, :-1]).nonzero(as_tuple=True)
    assert torch.equal(chosen[:, 1:][inside], chosen[:, :-1][inside])
    across = (words[:, 1:] != words[:, :-1]).nonzero(as_tuple=True)
    assert not torch.equal(chosen[:, 1:][across], chosen[:, :-1][across])
    begin = starts[:, 1:-1] == 1
    within(chosen[begin].double().mean().item(), 0.15, int(begin.sum()))
    count, fates = shares(batch)
    within(fates["mask"], 0.8, count)
    assert 0.06 < fates["keep"] < 0.14
    # One decision for each token, as BERT does it: a word is not all of one kind.
    hidden = (batch["input_ids"] == BERT.mask_token_id)[:, 1:-1]
    both = chosen[:, 1:][inside] & chosen[:, :-1][inside]
    unlike = (hidden[:, 1:][inside] != hidden[:, :-1][inside])[both]
    within(unlike.double().mean().item(), 2 * 0.8 * 0.2, int(both.sum()))


def test_next_token_labels_learn_the_end_even_where_it_pads() -> None:
    ids = torch.tensor([[5, 0, 6, 0], [7, 0, 0, 0]])
    real = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    labels = next_token_labels({"input_ids": ids, "attention_mask": real}, torch.arange(2), 0)["labels"]
    assert labels.tolist() == [[5, 0, 6, 0], [7, 0, -100, -100]]


def test_positions_reach_workers_with_their_epoch() -> None:
    positions = pickle.loads(pickle.dumps(Positions([3, 1], 7)))
    assert (list(positions), positions.epoch) == ([3, 1], 7)
    sampler = LengthBucketSampler([3, 4, 5], 2)
    sampler.set_epoch(5)
    assert [batch.epoch for batch in sampler] == [5, 5]
    sampler.resume_at(2, 1)
    assert [batch.epoch for batch in sampler] == [2]


def test_fixed_masks_do_not_know_epochs() -> None:
    tokens = Dataset.from_dict({"input_ids": [[2, *range(5, 60), 3]] * 4})
    rows = EncodedRows(tokens, Padding(0))
    fixed, redrawn = (LabelledRows(rows, Masking(BERT), redraw=redraw) for redraw in (False, True))
    labels = [[part[Positions([0, 1], epoch)]["labels"] for epoch in (0, 1)] for part in (fixed, redrawn)]
    assert torch.equal(*labels[0])
    assert not torch.equal(*labels[1])
    assert torch.equal(redrawn[[0, 1]]["labels"], labels[1][0])
    assert not torch.equal(labels[0][0], labels[1][0])


def test_masking_a_batch_takes_less_than_a_millisecond() -> None:
    masking = Masking(BERT)
    ids = torch.randint(5, len(BERT), (32, 128))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    times = []
    for draw in range(50):
        start = time.perf_counter()
        masking(batch, torch.arange(32), draw)
        times.append(time.perf_counter() - start)
    assert min(times) < 1e-3


def test_a_tokenizer_without_mask_token_is_refused() -> None:
    with pytest.raises(ValueError, match=r"has no mask token, which objective='mlm' needs.*or objective='clm'"):
        Masking(tokenizer("gpt2"))
