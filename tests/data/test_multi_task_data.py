"""Several tasks: shares, order, ranks and resuming of their batches."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_ft.data import ClassificationData, LengthBucketSampler
from lightning_ft.data.curriculum import Curriculum, CurriculumSampler, competence
from lightning_ft.data.multi_task import MultiTaskData, TaskPositions, TaskSampler, mixing_shares
from lightning_ft.data.multiple_choice import MultipleChoiceData
from tests.data.test_classification_data import BAD
from tests.data.test_curriculum import rows
from tests.data.test_multiple_choice_data import rows as choice_rows
from tests.pretrained import tokenizer


@pytest.fixture
def bert(tmp_path: Path) -> str:
    tokenizer("bert").save_pretrained(tmp_path / "bert")
    return str(tmp_path / "bert")


def data(folder: str, **options: Any) -> MultiTaskData:
    return MultiTaskData(
        {
            "mood": ClassificationData(folder, rows(40), rows(7), batch_size=4),
            "ends": MultipleChoiceData(folder, choice_rows(12), choice_rows(5), predict=choice_rows(3), batch_size=2),
            "tone": ClassificationData(
                folder, rows(24), predict=rows(4), batch_size=8, curriculum=Curriculum(until="9 steps")
            ),
        },
        **options,
    )


def sampler(
    sizes: dict[str, int], *, rank: int = 0, ranks: int = 1, seed: int = 0, batch_size: int = 4, **options: Any
) -> TaskSampler:
    inner = {
        task: LengthBucketSampler(torch.arange(1, n + 1), batch_size // ranks, num_replicas=ranks, rank=rank)
        for task, n in sizes.items()
    }
    return TaskSampler(inner, **{"temperature": 1.0, "cap": None, **options}, seed=seed)


def epoch(made: TaskSampler, number: int = 0) -> list[tuple[str, list[int]]]:
    made.set_epoch(number)
    return [(batch.task, list(batch)) for batch in made if isinstance(batch, TaskPositions)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.01, 0.09, 0.9]),
        ({"cap": 300}, [10 / 400, 90 / 400, 300 / 400]),
        # √10 : √90 : √900
        ({"temperature": 2.0}, [3.16227766 / 42.64911064, 9.48683298 / 42.64911064, 30 / 42.64911064]),
        ({"temperature": 1e9}, [1 / 3] * 3),
        ({"cap": 1}, [1 / 3] * 3),
    ],
)
def test_shares(options: dict[str, Any], expected: list[float]) -> None:
    assert mixing_shares([10, 90, 900], **options).tolist() == pytest.approx(expected, rel=1e-6)


def test_an_epoch_in_proportion_is_an_epoch_of_each_task() -> None:
    made = sampler({"a": 40, "b": 120, "c": 400})
    for number in (0, 1):
        batches = epoch(made, number)
        assert len(batches) == len(made) == 140
        assert Counter(task for task, _ in batches) == {"a": 10, "b": 30, "c": 100}
        for task, inner in made.samplers.items():
            inner.set_epoch(number)
            assert [positions for name, positions in batches if name == task] == [list(batch) for batch in inner]


def test_tasks_are_spread_evenly() -> None:
    made = sampler({"a": 40, "b": 120, "c": 400})
    seen = set()
    for number in range(20):
        made.set_epoch(number)
        order = made.order()
        seen.add(tuple(order))
        for start in range(0, 140, 14):
            counts = Counter(order[start : start + 14])
            # A stretch of 14 holds 1, 3 and 10 in proportion; each batch may fall up to one share beside its place.
            assert abs(counts[0] - 1) <= 1
            assert abs(counts[1] - 3) <= 2
            assert abs(counts[2] - 10) <= 2
    assert len(seen) == 20
    assert seen.isdisjoint({tuple(sampler({"a": 40, "b": 120, "c": 400}, seed=1).order())})


def test_a_task_goes_on_where_it_stopped() -> None:
    """Even shares of tasks of 10 and 30 batches: the smaller one is gone through twice in an epoch."""
    made = sampler({"a": 40, "b": 120}, temperature=1e9)
    batches = [positions for number in range(3) for task, positions in epoch(made, number) if task == "a"]
    assert made.counts == [20, 20]
    for number in range(6):
        own = LengthBucketSampler(torch.arange(1, 41), 4)
        own.set_epoch(number)
        assert batches[10 * number : 10 * (number + 1)] == [list(batch) for batch in own]
    large = [positions for number in range(3) for task, positions in epoch(made, number) if task == "b"]
    assert sorted(row for batch in large[:30] for row in batch) == list(range(120))


def test_no_task_is_left_out() -> None:
    made = sampler({"tiny": 2, "small": 3, "huge": 4000}, batch_size=4)
    assert made.counts == [1, 1, 1000]
    assert sum(made.counts) == len(made) == 1002


def test_ranks_have_the_same_task_and_share_its_batch() -> None:
    sizes = {"a": 40, "b": 120}
    whole = epoch(sampler(sizes), 1)
    parts = [epoch(sampler(sizes, rank=rank, ranks=2), 1) for rank in range(2)]
    for (task, batch), *of_ranks in zip(whole, *parts, strict=True):
        assert {name for name, _ in of_ranks} == {task}
        assert sorted(row for _, part in of_ranks for row in part) == sorted(batch)


def test_resumes_at_any_batch_and_knows_what_fixes_the_order() -> None:
    sizes = {"a": 40, "b": 120}
    whole = epoch(sampler(sizes, temperature=3.0), 2)
    other = sampler(sizes, temperature=3.0)
    other.resume_at(2, 17)
    assert [(batch.task, list(batch)) for batch in other] == whole[17:]
    made = [
        sampler(sizes),
        sampler(sizes, seed=1),
        sampler(sizes, temperature=3.0),
        sampler(sizes, batch_size=8),
        sampler({"a": 40, "c": 120}),
        sampler({"a": 40, "b": 121}),
    ]
    assert len({tuple(sorted(each.identity().items())) for each in made}) == len(made)
    assert made[0].identity() == sampler(sizes).identity()
    assert all(type(value) is int for value in made[0].identity().values())


def test_batches_of_each_split(bert: str) -> None:
    made = data(bert)
    made.setup()
    train = list(made.train_dataloader())
    assert Counter(batch["task"] for batch in train) == Counter({"mood": 10, "ends": 3, "tone": 6})
    for batch in train:
        assert batch["input_ids"].ndim == (3 if batch["task"] == "ends" else 2)
    assert sorted(row for batch in train if batch["task"] == "mood" for row in batch["row"].tolist()) == list(range(40))
    val = {loader.collate_fn.task: torch.cat([batch["row"] for batch in loader]) for loader in made.val_dataloader()}
    assert {task: sorted(found.tolist()) for task, found in val.items()} == {
        "mood": list(range(7)),
        "ends": list(range(5)),
    }
    predict = [[(batch["task"], batch["row"].tolist()) for batch in loader] for loader in made.predict_dataloader()]
    assert predict == [[("ends", [0, 1]), ("ends", [2])], [("tone", [0, 1, 2, 3])]]
    with pytest.raises(ValueError, match=r"test rows are needed, and none of the tasks \['mood', 'ends', 'tone'\]"):
        made.test_dataloader()
    report = made.describe()
    assert report.facts["shares"] == {"mood": 0.5263, "ends": 0.1579, "tone": 0.3158}
    assert [(row["task"], row["split"]) for row in report.rows][:3] == [
        ("mood", "train"),
        ("mood", "val"),
        ("ends", "train"),
    ]
    assert "mood" in str(report)


def test_workers_give_the_same_batches(bert: str) -> None:
    def batches(workers: int) -> list[Any]:
        made = data(bert)
        made.tasks["mood"].num_workers = workers
        made.setup("fit")
        loader = made.train_dataloader()
        loader.sampler.resume_at(1, 5)
        return [(batch["task"], batch["row"].tolist()) for batch in loader]

    assert batches(0) == batches(2)
    assert len(batches(0)) == 14


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, r"temperature=0\.0 must be above 0"),
        ({"temperature": float("nan")}, r"temperature=nan must be above 0"),
        ({"cap": 0}, r"cap=0 must be 1 row or more"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str, bert: str) -> None:
    with pytest.raises(ValueError, match=message):
        data(bert, **options)


def test_bad_tasks(bert: str) -> None:
    with pytest.raises(ValueError, match=r"tasks must name one task or more, got none"):
        MultiTaskData({})
    with pytest.raises(ValueError, match=r"need one tokenizer, got \{'a': .*'b': 'other'\}"):
        MultiTaskData({"a": ClassificationData(bert, rows(4)), "b": ClassificationData("other", rows(4))})
    made = MultiTaskData(
        {"a": ClassificationData(bert, rows(4)), "b": ClassificationData(bert, val=rows(4), labels=["0", "1"])}
    )
    made.setup("fit")
    with pytest.raises(ValueError, match=r"^task 'b': train rows are needed: give train="):
        made.train_dataloader()


@pytest.mark.parametrize("fault", BAD)
def test_faulty_tables_are_named_with_their_task(fault: str, bert: str, tmp_path: Path) -> None:
    name, content, kind, message = BAD[fault]
    (tmp_path / name).write_bytes(content)
    poor = ClassificationData(bert, str(tmp_path / name), labels=["no", "yes"])
    tasks = {"good": ClassificationData(bert, rows(9)), "poor": poor}
    with pytest.raises(kind, match=f"^task 'poor': .*{message}") as caught:
        MultiTaskData(tasks).setup("fit")
    assert caught.value.__cause__ is not None
    if not fault.endswith("label"):  # which are read later
        with pytest.raises(kind, match=f"^task 'poor': .*{message}"):
            MultiTaskData(tasks).prepare_data()


def test_other_faults_are_named_with_their_task(bert: str) -> None:
    good = ClassificationData(bert, rows(9))
    made = MultiTaskData({"good": good, "poor": ClassificationData(bert, "gone.jsonl")})
    with pytest.raises(FileNotFoundError, match=r"^task 'poor': gone\.jsonl does not exist"):
        made.setup("fit")
    with pytest.raises(RuntimeError, match=r"^task 'a': there is nothing to describe before setup"):
        MultiTaskData({"a": ClassificationData(bert, rows(9))}).describe()
    odd = ClassificationData(bert, rows(9))
    odd.setup = lambda stage: b"\xff".decode()  # type: ignore[method-assign,assignment,return-value]
    with pytest.raises(ValueError, match=r"^task 'poor': 'utf-8' codec can't decode"):
        MultiTaskData({"good": good, "poor": odd}).setup("fit")


def curricula(until: str | float, temperature: float = 1.0, **options: Any) -> TaskSampler:
    """Tasks of 10 and 30 batches; the smaller one has a curriculum."""
    defaults = {"accumulate_grad_batches": 4, "limit_train_batches": 1.0, "max_epochs": 5, "max_steps": -1}
    trainer: Any = SimpleNamespace(**{**defaults, **options})
    inner = {
        "a": CurriculumSampler(
            torch.arange(1, 41), 4, difficulty=torch.arange(40), curriculum=Curriculum(until=until), trainer=trainer
        ),
        "b": LengthBucketSampler(torch.arange(1, 121), 4),
    }
    return TaskSampler(inner, temperature=temperature, cap=None, seed=0, trainer=trainer)


@pytest.mark.parametrize("temperature", [1.0, 1e9, 0.5])
def test_a_curriculum_counts_the_steps_of_the_whole_training(temperature: float) -> None:
    """Forty batches an epoch, four of them a step: rows of the pool of the step at hand, wherever the batch stands."""
    made = curricula("30 steps", temperature)
    sizes = []
    for number in range(4):
        for place, (task, positions) in enumerate(epoch(made, number)):
            if task == "a" and number * 10 + place // 4 < 30:
                pool = max(math.ceil(competence(number * 10 + place // 4, duration=30) * 40 - 1e-9), 4)
                assert max(positions) < pool, (number, place)
                sizes.append(max(positions) - pool)
    assert max(sizes) == -1  # the pools are used up to their end
    assert len(set(sizes)) > 1
    own: Any = made.samplers["a"]
    steps = [
        number * 10 + place // 4 for number in range(4) for place, task in enumerate(made._order(number)) if not task
    ]
    for nth, step in enumerate(steps):
        own.set_epoch(nth // len(own))
        assert own.competence_at(nth % len(own)) == competence(step, duration=30)


def test_a_curriculum_lasts_as_long_as_the_training_says() -> None:
    durations = {until: curricula(until).samplers["a"].duration for until in ("7 steps", "2 epochs", 0.5)}  # type: ignore[attr-defined]
    assert durations == {"7 steps": 7, "2 epochs": 20, 0.5: 25}
    assert curricula("2 epochs", limit_train_batches=12).samplers["a"].duration == 6  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"until=0\.5 is a fraction of a training that has no end"):
        curricula(0.5, max_epochs=-1)


@pytest.mark.parametrize("temperature", [1.0, 1e9, 0.5])
def test_a_curriculum_resumes_at_any_batch(temperature: float) -> None:
    # A batch a step: a place that is one off gives another pool.
    made = partial(curricula, temperature=temperature, accumulate_grad_batches=1)
    whole = [batch for number in range(4) for batch in epoch(made("120 steps"), number)]
    one = made("120 steps")
    assert [batch for number in range(4) for batch in epoch(one, number)] == whole
    for number, first in ((0, 7), (2, 0), (2, 33), (3, 39)):
        other = made("120 steps")
        other.resume_at(number, first)
        found = [(batch.task, list(batch)) for batch in other]  # type: ignore[attr-defined]
        assert found == whole[number * 40 + first : number * 40 + 40]
    assert one.identity() != made("121 steps").identity()
