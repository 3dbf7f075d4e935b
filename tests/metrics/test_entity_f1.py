"""Entity F1 against seqeval, on random sequences with many invalid ones."""

from __future__ import annotations

import random
import warnings
from typing import Any

import pytest
import torch
from seqeval import scheme as schemes
from seqeval.metrics import accuracy_score
from seqeval.metrics.v1 import precision_recall_fscore_support
from torchmetrics import MetricCollection

from lightning_ft.metrics.entity_f1 import EntityF1, entity_spans, tag_table

PREFIXES = {"BIO": "BI", "BIOES": "BIES", "IO": "I"}
# IOB1 with I alone is IO.
REFERENCE = {"BIO": schemes.IOB2, "BIOES": schemes.IOBES, "IO": schemes.IOB1}
KINDS = ["LOC", "PER", "creative-work"]


def tags(scheme: str) -> list[str]:
    return ["O", *(f"{prefix}-{kind}" for kind in KINDS for prefix in PREFIXES[scheme])]


def sequences(names: list[str], seed: int, rows: int = 60) -> tuple[list[list[str]], list[list[str]]]:
    """True tags, and others that agree with them in two words of three."""
    draw = random.Random(seed)
    true = [[draw.choice(names) for _ in range(draw.randint(1, 12))] for _ in range(rows)]
    return true, [[tag if draw.random() < 0.67 else draw.choice(names) for tag in row] for row in true]


def numbers(names: list[str], rows: list[list[str]]) -> list[list[int]]:
    return [[names.index(tag) for tag in row] for row in rows]


def seqeval(true: list[list[str]], predicted: list[list[str]], scheme: str, average: str | None = "micro") -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return precision_recall_fscore_support(true, predicted, average=average, scheme=REFERENCE[scheme])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scheme", ["BIO", "BIOES", "IO"])
def test_equals_seqeval_strict(scheme: Any, seed: int) -> None:
    names = tags(scheme)
    true, predicted = sequences(names, seed)
    metric = EntityF1(names, scheme, per_type=True)
    for i in range(0, 60, 16):
        metric.update(numbers(names, predicted[i : i + 16]), numbers(names, true[i : i + 16]))
    values = {name: value.item() for name, value in metric.compute().items()}
    expected = dict(zip(("precision", "recall", "f1"), seqeval(true, predicted, scheme)[:3], strict=True))
    assert 0.05 < expected["f1"] < 0.9
    expected["accuracy"] = accuracy_score(true, predicted)
    for i, kind in enumerate(KINDS):
        each = [values[i] for values in seqeval(true, predicted, scheme, None)[:3]]
        expected |= dict(zip((f"precision_{kind}", f"recall_{kind}", f"f1_{kind}"), each, strict=True))
    assert values == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("scheme", "sequence", "expected"),
    [
        ("BIO", "O I-LOC O", []),
        ("BIO", "B-LOC I-PER I-PER", [(0, 1, "LOC")]),
        ("BIO", "B-LOC I-LOC B-LOC I-LOC I-LOC", [(0, 2, "LOC"), (2, 5, "LOC")]),
        ("BIO", "B-LOC O I-LOC", [(0, 1, "LOC")]),
        ("BIO", "I-LOC I-LOC B-creative-work", [(2, 3, "creative-work")]),
        ("BIOES", "S-LOC B-PER E-PER", [(0, 1, "LOC"), (1, 3, "PER")]),
        ("BIOES", "B-PER I-PER O E-PER", []),
        ("BIOES", "B-PER B-PER I-PER E-PER I-PER", [(1, 4, "PER")]),
        ("BIOES", "B-PER E-LOC S-PER B-LOC", [(2, 3, "PER")]),
        ("IO", "I-PER I-PER I-LOC O I-LOC", [(0, 2, "PER"), (2, 3, "LOC"), (4, 5, "LOC")]),
    ],
)
def test_entities_are_read_strictly(scheme: Any, sequence: str, expected: list[tuple[int, int, str]]) -> None:
    names = tags(scheme)
    types, table = tag_table(names, scheme)
    starts, ends, kinds = entity_spans(torch.tensor(numbers(names, [sequence.split()])), table)
    where = starts[0].nonzero().flatten().tolist()
    assert [(i, ends[0, i].item(), types[kinds[0, i]]) for i in where] == expected


def test_half_an_entity_is_none() -> None:
    metric = EntityF1(["O", "B-PER", "I-PER"])
    metric.update([[1, 0, 0]], [[1, 2, 0]])
    values = {name: value.item() for name, value in metric.compute().items()}
    assert values == pytest.approx({"precision": 0, "recall": 0, "f1": 0, "accuracy": 2 / 3})


def test_nothing_gives_zero_without_warnings() -> None:
    names = tags("BIO")
    for metric in (EntityF1(names), EntityF1(["O"])):
        metric.update([], [])
        metric.update([[]], [[]])
        metric.update(torch.zeros(3, 0, dtype=torch.int64), torch.zeros(3, 0, dtype=torch.int64))
        metric.update(torch.zeros(2, 3, dtype=torch.int64), torch.full((2, 3), -100))
        with warnings.catch_warnings():
            warnings.filterwarnings("error")
            assert {name: value.item() for name, value in metric.compute().items()} == dict.fromkeys(
                ("precision", "recall", "f1", "accuracy"), 0.0
            )
        metric.update([[0, 0]], [[0, 0]])
        assert [value.item() for value in metric.compute().values()] == [0, 0, 0, 1]


def test_left_out_words_are_as_if_absent() -> None:
    """Sub-tokens with -100 between the words, as in the batches of training."""
    names = tags("BIO")
    true, predicted = (torch.tensor(numbers(names, rows)) for rows in ([["B-LOC", "I-LOC", "O"]],) * 2)
    spread = torch.full((1, 8), -100)
    noise = torch.randint(0, len(names), (1, 8))
    spread[:, [1, 4, 6]], noise[:, [1, 4, 6]] = true, predicted
    metric = EntityF1(names)
    metric.update(noise, spread)
    assert [value.item() for value in metric.compute().values()] == [1, 1, 1, 1]
    noise[:, 4] = 0  # half of the entity
    metric.reset()
    metric.update(noise, spread)
    assert [value.item() for value in metric.compute().values()] == pytest.approx([0, 0, 0, 2 / 3])
    noise[:, 4] = -100  # a predicted tag is never left out
    with pytest.raises(ValueError, match="must hold numbers of tags, from 0 to 6"):
        metric.update(noise, spread)


def test_order_of_labels_does_not_matter() -> None:
    names = tags("BIO")
    true, predicted = sequences(names, 9)
    shuffled = names[::-1]
    first, second = EntityF1(names), EntityF1(shuffled)
    first.update(numbers(names, predicted), numbers(names, true))
    second.update(numbers(shuffled, predicted), numbers(shuffled, true))
    assert {k: v.item() for k, v in first.compute().items()} == {k: v.item() for k, v in second.compute().items()}


@pytest.mark.parametrize(
    ("labels", "scheme", "message"),
    [
        (["O", "X-PER"], "BIO", r"labels holds 'X-PER', but tags of scheme='BIO' are 'O' and B, I with a type"),
        (["O", "PER"], "BIO", r"labels holds 'PER'"),
        (["O", "B-"], "BIO", r"labels holds 'B-'"),
        (["O", "E-PER"], "BIO", r"labels holds 'E-PER'.*another scheme"),
        (["O", "B-PER"], "IO", r"such as 'I-PER'"),
        (["B-PER", "I-PER"], "BIO", r"one of them must be 'O'"),
        (["O", "B-PER", "B-PER"], "BIO", "must differ"),
        (["O"], "BILOU", r"scheme='BILOU' must be one of \['BIO', 'BIOES', 'IO'\]"),
    ],
)
def test_labels_that_are_no_tags_are_refused(labels: list[str], scheme: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EntityF1(labels, scheme)


def test_sequences_that_do_not_fit_are_refused() -> None:
    metric = EntityF1(["O", "B-PER", "I-PER"])
    with pytest.raises(ValueError, match=r"same lengths, got \[2\] and \[3\]"):
        metric.update([[0, 1]], [[0, 1, 2]])
    with pytest.raises(ValueError, match=r"preds \(2, 3\) and target \(2, 4\) must both be \(batch, words\)"):
        metric.update(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="from 0 to 2"):
        metric.update([[3]], [[0]])


def test_a_collection_logs_every_value() -> None:
    metrics = MetricCollection({"entities": EntityF1(["O", "B-PER", "I-PER"])}).clone(prefix="val_")
    metrics.update(torch.tensor([[1, 2]]), torch.tensor([[1, 2]]))
    assert set(metrics.compute()) == {"val_precision", "val_recall", "val_f1", "val_accuracy"}
    assert not metrics.state_dict()


def test_processes_count_together() -> None:
    """What is computed from the gathered states of two, with unequal shares, is what one computes from all rows."""
    names = tags("BIO")
    true, predicted = sequences(names, 3)
    first, second, whole = (EntityF1(names, per_type=True) for _ in range(3))
    for metric, part in ((first, slice(20)), (second, slice(20, None)), (whole, slice(None))):
        metric.update(numbers(names, predicted[part]), numbers(names, true[part]))
    states = iter([second.right, second.predicted, second.true, second.words])
    first.distributed_available_fn = lambda: True
    first.dist_sync_fn = lambda state, group: [state, next(states)]
    assert first.compute() == whole.compute()
    assert next(states, None) is None
