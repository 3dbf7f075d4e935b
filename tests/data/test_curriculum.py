"""Curriculum: the competence, the pool of rows, and the same batches on any number of processes and after a resume."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch
import transformers as hf
from datasets import Dataset

from lightning_ft.data import (
    ClassificationData,
    ClozeData,
    InstructionData,
    LanguageModelingData,
    LengthBucketSampler,
    MultipleChoiceData,
    QuestionAnsweringData,
    Seq2SeqData,
    TextData,
    TokenClassificationData,
)
from lightning_ft.data.curriculum import Curriculum, CurriculumSampler, competence, rarity
from lightning_ft.modules import SequenceClassification
from tests.data.test_multiple_choice_data import rows as choice_rows
from tests.pretrained import CORPUS, Kind, check_head, pretrained, tokenizer

ROWS = 1000
LENGTHS = 1 + torch.arange(ROWS) * 7 % 31
DIFFICULTY = torch.arange(ROWS).flip(0).double()


def sampler(
    curriculum: Curriculum | None = None, trainer: Any = None, batch_size: int = 10, **options: Any
) -> CurriculumSampler:
    curriculum = curriculum or Curriculum(until="100 steps")
    options = {"difficulty": DIFFICULTY, **options}
    return CurriculumSampler(LENGTHS, batch_size, curriculum=curriculum, trainer=trainer, **options)


def trainer(**options: Any) -> Any:
    defaults = {"accumulate_grad_batches": 1, "limit_train_batches": 1.0, "max_epochs": 2, "max_steps": -1}
    return SimpleNamespace(**{**defaults, **options})


def test_competence_of_the_paper() -> None:
    values = [competence(t, duration=100) for t in (0, 25, 50, 100, 1000)]
    assert [round(value, 4) for value in values] == [0.01, 0.5001, 0.7071, 1.0, 1.0]
    assert competence(25, duration=100, start=0.2, power=1) == pytest.approx(0.4)
    assert competence(0, duration=0.5, start=0.3) == 0.3
    curve = [competence(t, duration=77, start=0.05, power=3) for t in range(90)]
    assert curve == sorted(curve)


def test_each_batch_is_drawn_from_the_easiest_rows() -> None:
    made = sampler()
    easiest = DIFFICULTY.argsort()
    sizes = []
    for number, batch in enumerate(made):
        size = max(math.ceil(competence(number, duration=100) * ROWS - 1e-9), 10)
        assert len(set(batch)) == 10
        assert set(batch) <= set(easiest[:size].tolist())
        assert torch.equal(made.pool(number), easiest[:size])
        sizes.append(size)
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[50], len(sizes), len(made)) == (10, 708, 100, 100)
    # c(0) is ten rows, and a batch has twenty.
    assert set(next(iter(sampler(batch_size=20)))) == set(easiest[:20].tolist())


def test_draws_are_uniform_over_the_pool() -> None:
    made = sampler(Curriculum(until="1000000 steps", start=0.1))
    drawn: Counter[int] = Counter()
    for epoch in range(40):
        made.set_epoch(epoch)
        drawn.update(row for batch in made for row in batch)
    pool = made.pool(0).tolist()
    assert sum(drawn[row] for row in pool) >= 0.9 * 40_000
    counts = torch.tensor([drawn[row] for row in pool[:100]]).double()
    expected = counts.mean()
    assert float(((counts - expected) ** 2 / expected).sum()) < 149  # 99.9 % of χ² with 99 degrees of freedom
    assert sampler(Curriculum(until="1000000 steps", start=0.1)).__iter__().__next__() != next(
        iter(sampler(Curriculum(until="1000000 steps", start=0.1), seed=1))
    )


def test_classes_keep_their_shares() -> None:
    """The hardest rows are all of class 1, three rows are of class 2."""
    classes = (DIFFICULTY > 700).long()
    classes[torch.tensor([5, 6, 7])] = 2
    made = sampler(Curriculum(until="90 steps"), classes=classes)
    counts = torch.bincount(classes)
    for number in range(len(made)):
        pool = made.pool(number)
        of = torch.bincount(classes[pool], minlength=3)
        share = competence(number, duration=90)
        assert bool((of >= 1).all())
        if share * ROWS > 12:
            assert torch.equal(of, torch.ceil(share * counts.double() - 1e-9).long())
        for label in range(3):
            members = torch.nonzero(classes == label).flatten()
            easiest = members[DIFFICULTY[members].argsort()][: of[label]]
            assert set(pool[classes[pool] == label].tolist()) == set(easiest.tolist())


def test_ranks_share_each_global_batch() -> None:
    whole = list(sampler(batch_size=12))
    parts = [list(sampler(batch_size=4, num_replicas=3, rank=rank)) for rank in range(3)]
    for batch, *slices in zip(whole, *parts, strict=True):
        assert sorted(row for part in slices for row in part) == sorted(batch)
        assert batch[1::3] == slices[1]


def test_resumes_at_any_batch_and_refuses_another_curriculum() -> None:
    made = sampler(Curriculum(until="150 steps"))
    made.set_epoch(1)
    whole = [list(batch) for batch in made]
    other = sampler(Curriculum(until="150 steps"))
    other.resume_at(1, 37)
    assert [list(batch) for batch in other] == whole[37:]
    assert [list(batch) for batch in other] == whole
    assert whole[0] != next(iter(sampler(Curriculum(until="150 steps"))))
    identities = [
        made.identity(),
        sampler(Curriculum(until="151 steps")).identity(),
        sampler(Curriculum(until="150 steps", start=0.02)).identity(),
        sampler(Curriculum(until="150 steps"), difficulty=LENGTHS).identity(),
        sampler(Curriculum(until="150 steps"), trainer(accumulate_grad_batches=2)).identity(),
        LengthBucketSampler(LENGTHS, 10).identity(),
    ]
    assert other.identity() == identities[0]
    assert all(type(value) is int for value in identities[0].values())
    assert len({tuple(sorted(identity.items())) for identity in identities}) == len(identities)


def test_time_is_counted_in_optimiser_steps() -> None:
    """With 4 batches to a step, 100 batches are 25 steps; the last step of 101 batches has one."""
    made = sampler(Curriculum(until="2 epochs"), trainer(accumulate_grad_batches=4))
    assert (made.clock.steps_per_epoch, made.duration) == (25, 50)
    assert made.competence_at(3) == made.competence_at(0) < made.competence_at(4)
    made.set_epoch(1)
    assert made.competence_at(0) == competence(25, duration=50)
    assert sampler(Curriculum(until="2 epochs"), trainer(limit_train_batches=7)).duration == 14
    assert sampler(Curriculum(until="2 epochs"), trainer(limit_train_batches=0.5)).duration == 100
    assert sampler(Curriculum(until=0.25), trainer(max_epochs=3)).duration == 75
    assert sampler(Curriculum(until=0.25), trainer(max_steps=40)).duration == 10


def test_whole_epochs_follow_the_curriculum() -> None:
    made, plain = sampler(Curriculum(until="1 epoch")), LengthBucketSampler(LENGTHS, 10)
    made.resume_at(1, 3)
    plain.resume_at(1, 3)
    assert [list(batch) for batch in made] == [list(batch) for batch in plain]
    made.set_epoch(0)
    assert len({row for batch in made for row in batch}) < ROWS


def test_fewer_rows_than_a_batch() -> None:
    options = {"difficulty": torch.zeros(3), "curriculum": Curriculum(until="9 steps")}
    parts = [list(CurriculumSampler(torch.ones(3), 4, num_replicas=2, rank=r, **options)) for r in range(2)]
    assert [len(part) for part in parts] == [1, 1]
    assert len(parts[0][0]) == len(parts[1][0]) == 2
    assert set(parts[0][0]) | set(parts[1][0]) == {0, 1, 2}


def test_rarity_by_hand() -> None:
    lists = pa.chunked_array([[[1, 1, 2]], [[3], [1]]])
    p = {1: 3 / 5, 2: 1 / 5, 3: 1 / 5}
    expected = [-sum(math.log(p[token]) for token in row) for row in lists.to_pylist()]
    torch.testing.assert_close(rarity(lists), torch.tensor(expected, dtype=torch.float64))
    assert rarity(lists.slice(1)).tolist() == pytest.approx([math.log(2)] * 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 0.0}, r"start=0\.0 must be a share of the rows in \(0, 1\]"),
        ({"start": 1.5}, r"start=1\.5"),
        ({"power": 0}, r"power=0 must be above 0"),
        ({"until": 3}, r"until=3 has no unit"),
        ({"until": "3 days"}, r"until='3 days' is not a stretch of training"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Curriculum(**options)


def test_bad_difficulties() -> None:
    with pytest.raises(ValueError, match=r"difficulty must be 1000 finite numbers"):
        sampler(difficulty=torch.full((ROWS,), math.nan))
    with pytest.raises(ValueError, match=r"difficulty must be 1000 finite numbers"):
        sampler(difficulty=torch.ones(3))
    with pytest.raises(ValueError, match=r"until=0\.5 is a fraction of a training that has no end"):
        sampler(Curriculum(until=0.5), trainer(max_epochs=-1))


# ---- through data modules


def rows(count: int, **columns: list[Any]) -> Dataset:
    words = " ".join(CORPUS).split()
    texts = [" ".join(words[i % 40 : i % 40 + 1 + i * 5 % 9]) for i in range(count)]
    return Dataset.from_dict({"text": texts, "label": [i % 3 % 2 for i in range(count)], **columns})


def first_batch(data: ClassificationData) -> Any:
    data.setup("fit")
    return next(iter(data.train_dataloader()))


@pytest.fixture
def bert(tmp_path: Path) -> str:
    tokenizer("bert").save_pretrained(tmp_path / "bert")
    return str(tmp_path / "bert")


@pytest.mark.parametrize("difficulty", ["length", "rarity", "grade"])
@pytest.mark.parametrize("grades", [list(range(60, 0, -1)), [f"{i}.5" for i in range(60, 0, -1)]])
def test_classification_data(difficulty: str, grades: list[Any], bert: str) -> None:
    data = ClassificationData(
        bert,
        rows(60, grade=grades),
        val_fraction=0.2,
        batch_size=4,
        curriculum=Curriculum(difficulty, until="10 steps", start=0.2),
    )
    batch = first_batch(data)
    encoded = data.need("train")
    chosen = [int(torch.nonzero(encoded.rows == row)) for row in batch["row"]]
    lists = encoded.tokens.data["input_ids"].to_pylist()
    used = [lists[row] for row in encoded.rows.tolist()]
    counts = Counter(token for row in used for token in row)
    total = sum(counts.values())
    values = {
        "length": [float(len(row)) for row in used],
        "rarity": [-sum(math.log(counts[token] / total) for token in row) for row in used],
        "grade": [float(grades[row]) for row in encoded.rows.tolist()],
    }[difficulty]
    labels = data.strata()[encoded.rows]
    for label in (0, 1):
        of = [value for value, other in zip(values, labels.tolist(), strict=True) if other == label]
        limit = sorted(of)[math.ceil(0.2 * len(of)) - 1]
        assert all(values[i] <= limit + 1e-9 for i in chosen if labels[i] == label)
    assert len(data.val_dataloader().dataset) == 12
    assert data.describe().rows[0]["padding"] >= 0


def test_multiple_choice_data_knows_the_rarity_of_its_rows(bert: str) -> None:
    data = MultipleChoiceData(bert, choice_rows(20), batch_size=2, curriculum=Curriculum("rarity"), val_fraction=0.1)
    data.setup("fit")
    encoded = data.need("train")
    lists = encoded.pairs.tokens.data["input_ids"].to_pylist()
    counts = Counter(token for row in lists for token in row)
    total = sum(counts.values())
    of = [-sum(math.log(counts[t] / total) for pair in lists[3 * i : 3 * i + 3] for t in pair) for i in range(20)]
    expected = torch.tensor(of, dtype=torch.float64)[encoded.rows]
    torch.testing.assert_close(data.rarity(encoded), expected)
    easiest = int(encoded.rows[expected.argmin()])
    assert easiest in next(iter(data.train_dataloader()))["row"].tolist()


TEXTS = [" ".join((CORPUS * 3)[i % len(CORPUS)].split()[: 3 + i % 5]) for i in range(24)]
TASKS: dict[str, tuple[Kind, type[TextData], dict[str, list[Any]], dict[str, Any]]] = {
    "classification": ("bert", ClassificationData, {"text": TEXTS, "label": [0, 1] * 12}, {}),
    "choice": ("bert", MultipleChoiceData, {"context": TEXTS, "choices": [["a", "b"]] * 24, "label": [0] * 24}, {}),
    "tokens": (
        "bert",
        TokenClassificationData,
        {"tokens": [text.split() for text in TEXTS], "tags": [["O"] * len(text.split()) for text in TEXTS]},
        {},
    ),
    "answers": (
        "bert",
        QuestionAnsweringData,
        {
            "question": ["who ?"] * 24,
            "context": TEXTS,
            "answers": [{"text": [text.split()[0]], "answer_start": [0]} for text in TEXTS],
        },
        {},
    ),
    "mlm": ("bert", LanguageModelingData, {"text": TEXTS}, {"rows": "documents"}),
    "clm": ("gpt2", LanguageModelingData, {"text": TEXTS}, {"rows": "documents", "objective": "clm"}),
    "instructions": ("gpt2", InstructionData, {"instruction": TEXTS, "output": ["a film"] * 24}, {"input": None}),
    "seq2seq": ("t5", Seq2SeqData, {"source": TEXTS, "target": ["a film"] * 24}, {}),
    "cloze": (
        "bert",
        ClozeData,
        {"text": TEXTS, "label": ["a", "b"] * 12},
        {"patterns": ["{text} {mask}", "{mask} {text}"], "verbalizer": {"a": "film", "b": "story"}},
    ),
}


@pytest.mark.parametrize("difficulty", ["length", "rarity", "grade"])
@pytest.mark.parametrize("task", TASKS)
def test_every_data_module_begins_with_the_easiest_rows(task: str, difficulty: str, tmp_path: Path) -> None:
    kind, data_class, columns, options = TASKS[task]
    tokenizer(kind).save_pretrained(tmp_path)
    table = Dataset.from_dict({**columns, "grade": list(range(24, 0, -1))})
    curriculum = Curriculum(difficulty, until="1000 steps", start=0.25)
    data = data_class(str(tmp_path), table, max_length=256, batch_size=2, curriculum=curriculum, **options)  # type: ignore[call-arg]
    data.setup("fit")
    rows = [row for batch in list(data.train_dataloader())[:3] for row in batch["row"].tolist()]
    assert len(rows) >= 6
    grades = range(24, 0, -1)
    # By length and rarity some rows tie, and rarity follows length nearly.
    hard = {"grade": lambda row: grades[row] > 8, "length": longest, "rarity": longest}[difficulty]
    assert not any(hard(row) for row in rows)


def longest(row: int) -> bool:
    return len(TEXTS[row].split()) == 7


def test_chunks_and_streams_refuse_what_they_cannot_sort(bert: str) -> None:
    table = Dataset.from_dict({"text": TEXTS, "grade": list(range(24))})
    with pytest.raises(ValueError, match=r"a chunk holds parts of several texts, so the column 'grade'"):
        LanguageModelingData(bert, table, curriculum=Curriculum("grade"))
    with pytest.raises(ValueError, match=r"streaming=True never has them all"):
        LanguageModelingData(bert, table, streaming=True, curriculum=Curriculum())


@pytest.mark.parametrize(
    ("grades", "kind", "message"),
    [
        ([1.0, None], ValueError, r"row 1 \(from 0\): column 'grade' holds None: a difficulty is a finite number"),
        ([1.0, math.inf], ValueError, r"row 1 \(from 0\): column 'grade' holds inf"),
        (["1", "hard"], ValueError, r"row 1 \(from 0\): column 'grade' holds 'hard'"),
        ([[1], [2]], TypeError, r"column 'grade' must hold numbers to be a difficulty, got \[1\]"),
        (None, ValueError, r"has no column 'grade'"),
    ],
)
def test_bad_columns(grades: Any, kind: type[Exception], message: str, bert: str) -> None:
    table = rows(2) if grades is None else rows(2, grade=grades)
    data = ClassificationData(bert, table, labels=["0", "1"], curriculum=Curriculum("grade"))
    with pytest.raises(kind, match=message):
        first_batch(data)


def test_a_head_trains_and_resumes_exactly(tmp_path: Path) -> None:
    folder = pretrained(tmp_path / "model", "bert", hf.AutoModelForSequenceClassification)
    check_head(
        lambda: SequenceClassification(folder, labels=["0", "1"], learning_rate=1e-3),
        lambda: ClassificationData(
            folder, rows(48), rows(7), predict=rows(5), batch_size=8, curriculum=Curriculum(until=0.8, start=0.1)
        ),
        hf.AutoModelForSequenceClassification,
        tmp_path,
    )
