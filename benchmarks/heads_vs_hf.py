"""Four heads against ``transformers``: losses step by step, final metric over seeds, step time. On the CPU.

Losses: against a plain loop over ``AutoModelFor…`` (its own loss, fused AdamW, its linear schedule, clipping), dropout
off, same weights (head included), same batches. The two must agree at every step to 1e-5, else this script fails.

Metric: fine-tuned by us and by the HF Trainer with the example scripts' preprocessing, dropout on, each with its own
batches (ours by length, theirs at random, their default), three seeds for head and order, same number of steps. Both
results are measured by our validation, whose metrics have tests of their own against seqeval, scikit-learn and the
official SQuAD definitions.

Step time: from one step's end to the next one's, inside each trainer's own loop, on the same module and batches,
interleaved; the A/A rows say how much identical code differs.

The rows are the first ones of each set's train and dev files; for SQuAD the first whose context has at most 600
characters, so that an epoch takes a minute.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from _hf import CLIP, WARMUP, Batch, rival, rival_on_batches
from _timing import DATA, Row, arguments, compare, fit, interleave, loader, publish, start, trainer
from datasets import Dataset
from lightning import seed_everything
from lightning.pytorch.callbacks import LambdaCallback
from transformers import (
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForMultipleChoice,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    default_data_collator,
    get_linear_schedule_with_warmup,
)

from lightning_ft.data import (
    ClassificationData,
    MultipleChoiceData,
    QuestionAnsweringData,
    TextData,
    TokenClassificationData,
)
from lightning_ft.demo import prepare_model
from lightning_ft.modules import (
    MultipleChoice,
    QuestionAnswering,
    SequenceClassification,
    TokenClassification,
    TransformerModule,
)

OURS, THEIRS = "lightning_ft", "HF Trainer"
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Task:
    """A head, its data both ways, and how long it trains."""

    data_set: str
    metric: str
    model_class: Any
    module: Callable[..., TransformerModule]
    data: Callable[..., TextData]
    preprocess: Callable[[PreTrainedTokenizerBase, Dataset, list[str]], Dataset]
    collator: Callable[[PreTrainedTokenizerBase], Any]
    rows: int = 2000
    batch: int = 32
    epochs: int = 3
    learning_rate: float = 5e-5
    keep: Callable[[dict[str, Any]], bool] = lambda row: True


# ---- the example scripts' preprocessing, for the rival


def classify(tokenizer: PreTrainedTokenizerBase, rows: Dataset, labels: list[str]) -> Dataset:
    def encode(part: Mapping[str, Any]) -> dict[str, Any]:
        return {
            **tokenizer(part["text"], truncation=True, max_length=128),
            "label": [*map(labels.index, part["label"])],
        }

    return rows.map(encode, batched=True, remove_columns=rows.column_names)


def tag(tokenizer: PreTrainedTokenizerBase, rows: Dataset, labels: list[str]) -> Dataset:
    def encode(part: Mapping[str, Any]) -> dict[str, Any]:
        encoded = tokenizer(part["tokens"], truncation=True, max_length=128, is_split_into_words=True)
        encoded["labels"] = []
        for row, tags in enumerate(part["tags"]):
            words = encoded.word_ids(row)
            first = [word if word != before else None for word, before in zip(words, [None, *words], strict=False)]
            encoded["labels"].append([-100 if word is None else labels.index(tags[word]) for word in first])
        return dict(encoded)

    return rows.map(encode, batched=True, remove_columns=rows.column_names)


def answer(tokenizer: PreTrainedTokenizerBase, rows: Dataset, labels: list[str]) -> Dataset:
    def encode(part: Mapping[str, Any]) -> dict[str, Any]:
        encoded = tokenizer(
            [question.lstrip() for question in part["question"]],
            part["context"],
            truncation="only_second",
            max_length=192,
            stride=48,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            padding="max_length",
        )
        source, offsets = encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping")
        spans = [span(encoded, i, offsets[i], part["answers"][source[i]]) for i in range(len(source))]
        return {**encoded, "start_positions": [s for s, _ in spans], "end_positions": [e for _, e in spans]}

    def span(encoded: Any, i: int, offsets: Any, answers: Mapping[str, Any]) -> tuple[int, int]:
        begin = answers["answer_start"][0]
        end = begin + len(answers["text"][0])
        inside = [t for t, s in enumerate(encoded.sequence_ids(i)) if s == 1]
        if offsets[inside[0]][0] > begin or offsets[inside[-1]][1] < end:
            return 0, 0
        return (
            max(t for t in inside if offsets[t][0] <= begin),
            min(t for t in inside if offsets[t][1] >= end),
        )

    return rows.map(encode, batched=True, remove_columns=rows.column_names)


def choose(tokenizer: PreTrainedTokenizerBase, rows: Dataset, labels: list[str]) -> Dataset:
    def encode(part: Mapping[str, Any]) -> dict[str, Any]:
        counts = [len(choices) for choices in part["choices"]]
        contexts = chain.from_iterable([c] * n for c, n in zip(part["context"], counts, strict=True))
        flat = tokenizer([*contexts], [*chain.from_iterable(part["choices"])], truncation="only_first", max_length=64)
        step = counts[0]
        return {
            **{name: [v[i : i + step] for i in range(0, len(v), step)] for name, v in flat.items()},
            "labels": part["label"],
        }

    return rows.map(encode, batched=True, remove_columns=rows.column_names)


TASKS = {
    "classification": Task(
        "trec6",
        "val_accuracy",
        AutoModelForSequenceClassification,
        SequenceClassification,
        ClassificationData,
        classify,
        DataCollatorWithPadding,
    ),
    "tagging": Task(
        "uner_ewt",
        "val_f1",
        AutoModelForTokenClassification,
        TokenClassification,
        TokenClassificationData,
        tag,
        DataCollatorForTokenClassification,
    ),
    "question answering": Task(
        "squad",
        "val_f1",
        AutoModelForQuestionAnswering,
        QuestionAnswering,
        lambda *args, **options: QuestionAnsweringData(*args, max_length=192, stride=48, **options),
        answer,
        lambda tokenizer: default_data_collator,
        rows=1000,
        batch=16,
        epochs=2,
        keep=lambda row: len(row["context"]) <= 600,
    ),
    "multiple choice": Task(
        "hellaswag",
        "val_accuracy",
        AutoModelForMultipleChoice,
        MultipleChoice,
        lambda *args, **options: MultipleChoiceData(*args, max_length=64, **options),
        choose,
        DataCollatorForMultipleChoice,
        rows=500,
        batch=16,
        epochs=2,
        keep=lambda row: max(map(len, row["choices"])) <= 160,
    ),
}


# ---- what is measured


def make(task: Task, folder: Path, labels: list[str], **options: Any) -> TransformerModule:
    return task.module(str(folder), **named(labels), learning_rate=task.learning_rate, warmup=WARMUP, **options)


def compare_losses(task: Task, folder: Path, labels: list[str], batches: Sequence[Batch]) -> Row:
    """Train once by our module under Lightning, once by a plain loop, from the same weights; dropout off."""
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(0)
    count = {"num_labels": len(labels)} if labels else {}
    theirs = task.model_class.from_pretrained(folder, **off, **count)
    with tempfile.TemporaryDirectory() as begin:
        theirs.save_pretrained(begin)
        ours = make(task, Path(begin), labels)
    ours.model.load_state_dict(theirs.state_dict())

    losses: list[float] = []
    keep = LambdaCallback(on_train_batch_end=lambda *hook: losses.append(hook[2]["loss"].item()))
    trainer(keep, clip=CLIP).fit(ours, loader(batches))
    expected = plain_loop(theirs, batches, task.learning_rate)
    return {
        "steps": len(losses),
        "first loss": losses[0],
        "last loss": losses[-1],
        "worst difference": max(abs(a - b) for a, b in zip(losses, expected, strict=True)),
        "tolerance": TOLERANCE,
    }


def plain_loop(model: Any, batches: Sequence[Batch], learning_rate: float) -> list[float]:
    """The losses of the loop that the documentation of transformers shows."""
    model.train()
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, round(WARMUP * len(batches)), len(batches))
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return losses


def train_ours(task: Task, folder: Path, labels: list[str], data: TextData, seed: int) -> float:
    seed_everything(seed, verbose=False)
    module = make(task, folder, labels, head_seed=seed)
    runner = trainer(clip=CLIP)
    runner.fit_loop.max_epochs = task.epochs
    runner.fit(module, data)
    return validate(task, module, data)


def train_theirs(task: Task, folder: Path, labels: list[str], data: TextData, rows: Dataset, seed: int) -> float:
    # The head's weights are those of our run; order and dropout are theirs.
    module = make(task, folder, labels, head_seed=seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = task.preprocess(tokenizer, rows, labels)
    hf, _ = rival(
        module.model,
        tokens,
        steps=task.epochs * -(-len(tokens) // task.batch),
        collate=task.collator(tokenizer),
        epochs=task.epochs,
        learning_rate=task.learning_rate,
        seed=seed,
        per_device_train_batch_size=task.batch,
    )
    hf.train()
    return validate(task, module, data)


def validate(task: Task, module: TransformerModule, data: TextData) -> float:
    runner = trainer()
    runner.limit_val_batches = 1.0
    (metrics,) = runner.validate(module, data, verbose=False)
    return metrics[task.metric]


def time_steps(task: Task, module: TransformerModule, batches: Sequence[Batch], rounds: int, dropped: int) -> Any:
    def theirs() -> float:
        hf, clock = rival_on_batches(module.model, batches)
        hf.train()
        return clock.step(dropped)

    return interleave({OURS: lambda: fit(module, loader(batches), clip=CLIP).step(dropped), THEIRS: theirs}, rounds)


# ---- one task from end to end


def rows_of(task: Task, count: int) -> dict[str, Dataset]:
    """The first rows of train and dev."""
    files = {name: str(DATA / task.data_set / f"{split}.jsonl") for name, split in (("train", "train"), ("val", "dev"))}
    parts = {name: Dataset.from_json(file).filter(task.keep) for name, file in files.items()}
    return {name: part.select(range(min(count, len(part)))) for name, part in parts.items()}


def run(name: str, options: Any, folder: Path) -> bool:
    """Measure one head and write its files; whether the losses agree."""
    task = TASKS[name]
    began = time.perf_counter()
    rows = rows_of(task, task.rows)
    # The labels of all rows, so that the few of a trial know those of its dev set.
    labels = list(getattr(task.data(str(folder), **rows), "labels", []))
    if options.quick:
        task, rows = replace(task, batch=4, epochs=1), rows_of(task, 16)
    keep = partial(write, name, task, options)
    agree = True
    if "time" in options.measure:
        drawn = draw(task, folder, rows, labels, options.steps)
        losses = compare_losses(task, folder, labels, drawn)
        agree = losses["worst difference"] <= TOLERANCE
        seconds = time_steps(task, make(task, folder, labels), drawn[: options.timed], options.rounds, 2)
        steps = compare(seconds, OURS, {THEIRS: 1.0})
        keep("time", {"Losses, step by step": [losses], "Step time, identical batches": steps}, seconds=seconds)
    if "metric" in options.measure:
        scores = fine_tune(task, folder, rows, labels, options.seeds)
        hours = (time.perf_counter() - began) / 3600
        keep("metric", {"Dev metric": [summarise(task, scores, len(rows["train"]), hours)]}, scores=scores)
    return agree


def write(
    name: str, task: Task, options: Any, measure: str, tables: Mapping[str, Sequence[Row]], **details: Any
) -> None:
    publish(
        f"heads_{measure}_{name.replace(' ', '_')}",
        options.results,
        setting=f"{name}: all-MiniLM-L6-v2 on {task.data_set}, batch {task.batch}, {task.epochs} epochs at "
        f"{task.learning_rate:g}, clipping {CLIP:g}, {options.seeds} seeds; losses of {options.steps} steps; "
        f"step time: {2 * options.rounds} segments of {options.timed} steps each, the first two left out.",
        tables=tables,
        **{"seconds": {}, **details},
    )


def draw(task: Task, folder: Path, rows: Mapping[str, Dataset], labels: list[str], steps: int) -> list[Batch]:
    """The first training batches, over as many epochs as it takes."""
    data = task.data(str(folder), **rows, **named(labels), batch_size=task.batch)
    data.setup("fit")
    accepted = {"input_ids", "attention_mask", "token_type_ids", "labels", "start_positions", "end_positions"}
    epochs = chain.from_iterable(data.train_dataloader() for _ in range(steps))
    return [{key: batch[key] for key in batch if key in accepted} for batch in islice(epochs, steps)]


def named(labels: list[str]) -> dict[str, Any]:
    return {"labels": labels} if labels else {}


def fine_tune(
    task: Task, folder: Path, rows: Mapping[str, Dataset], labels: list[str], seeds: int
) -> dict[str, list[float]]:
    """The dev metric after fine-tuning by each of the two, for every seed."""
    scores: dict[str, list[float]] = {OURS: [], THEIRS: []}
    for seed in range(seeds):
        data = task.data(str(folder), **rows, **named(labels), batch_size=task.batch, seed=seed)
        scores[OURS].append(train_ours(task, folder, labels, data, seed))
        scores[THEIRS].append(train_theirs(task, folder, labels, data, rows["train"], seed))
        print(f"seed {seed}: {[round(values[-1], 4) for values in scores.values()]}", flush=True)
    return scores


def summarise(task: Task, scores: Mapping[str, Sequence[float]], rows: int, hours: float) -> Row:
    ours, theirs = scores[OURS], scores[THEIRS]
    return {
        "data": f"{task.data_set}, {rows} rows",
        "metric": task.metric.removeprefix("val_"),
        OURS: mean(ours),
        f"{OURS}, standard deviation": stdev(ours) if len(ours) > 1 else 0.0,
        THEIRS: mean(theirs),
        f"{THEIRS}, standard deviation": stdev(theirs) if len(theirs) > 1 else 0.0,
        "difference": mean(ours) - mean(theirs),
        "seeds": len(ours),
        "hours": hours,
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--heads", nargs="*", default=list(TASKS), choices=list(TASKS), help="which heads")
    parser.add_argument("--measure", nargs="*", default=["time", "metric"], choices=["time", "metric"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=50, help="steps whose losses are compared")
    parser.add_argument("--timed", type=int, default=20, help="steps of a timed segment, the first two left out")
    options = start(parser)
    if options.quick:
        options.seeds, options.steps, options.timed, options.rounds = 1, 5, 5, 1
    if missing := [t.data_set for n, t in TASKS.items() if n in options.heads and not (DATA / t.data_set).is_dir()]:
        sys.exit(f"{DATA} lacks {missing}: set LIGHTNING_FT_DATA to a folder with a folder for each set")
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "model"
        prepare_model(folder)
        if apart := [name for name in options.heads if not run(name, options, folder)]:
            sys.exit(f"ours and transformers do not train alike: {apart}, see their losses")


if __name__ == "__main__":
    main()
