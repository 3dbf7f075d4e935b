"""The examples run, on real data where they name public sets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
import yaml

from lightning_ft import cli
from lightning_ft.cli import FineTuningCLI
from tests.pretrained import pretrained

ROOT = Path(__file__).parents[1]
CLASSIFIER = hf.AutoModelForSequenceClassification
EXAMPLES: dict[str, tuple[Any, Any, str, str, dict[str, Any]]] = {
    "pairs": ("bert", CLASSIFIER, "mrpc", "val_mcc", {}),
    "regression": ("bert", CLASSIFIER, "stsb", "val_pearson", {"label": "score"}),
    "ner": ("roberta", hf.AutoModelForTokenClassification, "uner_ewt", "val_f1", {"tags": "tags"}),
    "qa": ("bert", hf.AutoModelForQuestionAnswering, "squad_v2", "val_f1", {"max_length": 128, "stride": 32}),
    "choice": ("bert", hf.AutoModelForMultipleChoice, "copa", "val_accuracy", {"choices": "choices"}),
    "mlm": ("roberta", hf.AutoModelForMaskedLM, "imdb_unlabelled", "val_perplexity", {"predict": "prompts"}),
    "clm": ("gpt2", hf.AutoModelForCausalLM, "wikitext2", "val_perplexity", {"predict": "prompts"}),
    "instructions": ("llama", hf.AutoModelForCausalLM, "self_instruct", "val_perplexity", {"max_length": 1024}),
    "qlora": ("llama", hf.AutoModelForCausalLM, "self_instruct", "val_perplexity", {"max_length": 1024}),
    "summarisation": (
        "t5",
        hf.AutoModelForSeq2SeqLM,
        "dialogsum",
        "val_rougeL",
        {"source": "source", "target": "target", "max_target_length": 16},
    ),
    "translation": (
        "bart",
        hf.AutoModelForSeq2SeqLM,
        "scitldr",
        "val_bleu",
        {"source": "source", "target": "target", "max_target_length": 16},
    ),
    "cloze": ("roberta", hf.AutoModelForMaskedLM, "sst2", "val_accuracy", {"max_length": 128}),
}
"""Family and Auto class of a tiny model, data set, metric, and the data's arguments where that set differs."""
MODEL = {
    "clm": {"max_new_tokens": 8},
    "instructions": {"max_new_tokens": 8},
    "qlora": {"max_new_tokens": 8},
    "summarisation": {"max_new_tokens": 8},
    "translation": {"max_new_tokens": 8, "allow_pickle": False},
    "cloze": {"patterns": ["{text} It was {mask}."], "verbalizer": {"0": ["a"], "1": ["s"]}},
}
"""The head's arguments that fit a tiny vocabulary."""


def run(folder: Path, *command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        # No tokens that another version of the code may have left on this machine.
        env={**os.environ, "OMP_NUM_THREADS": "2", "HF_DATASETS_CACHE": str(folder / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def head(source: Path, rows: int, target: Path) -> str:
    """The first rows of a file, as a file."""
    with source.open(encoding="utf-8") as file:
        target.write_text("".join(line for line, _ in zip(file, range(rows), strict=False)), encoding="utf-8")
    return str(target)


def train_and_predict(config: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> FineTuningCLI:
    """Fit a few batches by the command line, in a folder of its own; then predict from the last checkpoint.

    To predict, only the files of demonstrations are still there: labels come from the checkpoint.
    """
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1, "logger": True}
    short = {"max_epochs": 1, "limit_train_batches": 4, "limit_val_batches": 2, "accelerator": "cpu"}
    config["trainer"] |= {**quiet, **short, "accumulate_grad_batches": 2, "val_check_interval": 1.0}
    config["trainer"].pop("precision", None)
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["lightning-ft"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of calls that Lightning makes
    fitted = cli.run(["fit", "--config", "config.yaml"])
    assert fitted.trainer.global_step == 2
    if not config["data"]["init_args"].get("demonstrations"):
        for path in folder.glob("*train.jsonl"):
            path.unlink()
    cli.run(["predict", "--config", "config.yaml", "--ckpt_path", "last"])
    return fitted


# Predicting does without the callbacks of the fit; the command line says nothing of it.
@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
@pytest.mark.parametrize("example", EXAMPLES)
def test_configuration_trains_and_predicts_on_real_data(
    example: str, real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, auto_class, data_set, metric, columns = EXAMPLES[example]
    config = yaml.safe_load((ROOT / "examples" / f"{example}.yaml").read_text(encoding="utf-8"))
    assert config["data"]["init_args"]["train"].startswith("hub://")
    source = real_data / data_set
    rows = 20 if example == "clm" else 400
    train, dev = (head(source / f"{name}.jsonl", rows, tmp_path / f"{name}.jsonl") for name in ("train", "dev"))
    asked = ROOT / "tests" / "prompts.jsonl" if "predict" in columns else source / "dev.jsonl"
    files = {"train": train, "val": dev, "predict": head(asked, 5, tmp_path / "predict.jsonl")}
    config["data"]["init_args"] |= {"max_length": 64, "batch_size": 4, **columns, **files}
    config["data"]["init_args"].pop("val_fraction", None)
    wide = {"max_position_embeddings": 2048} if example in ("instructions", "qlora") else {}
    folder = pretrained(tmp_path / "model", kind, auto_class, **wide)
    config["model"]["init_args"] |= {"pretrained": folder, **MODEL.get(example, {})}
    fitted = train_and_predict(config, tmp_path, monkeypatch)
    assert metric in fitted.trainer.callback_metrics
    lines = (tmp_path / "runs" / "run_0" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["row"] for line in lines] == list(range(5))


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
def test_several_tasks_train_on_real_data(real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = yaml.safe_load((ROOT / "examples" / "multi_task.yaml").read_text(encoding="utf-8"))
    folder = pretrained(tmp_path / "model", "bert", CLASSIFIER)
    sets: dict[str, tuple[str, dict[str, Any]]] = {
        "paraphrase": ("mrpc", {}),
        "entailment": ("rte", {"text": "premise", "text_pair": "hypothesis"}),
        "cause": ("copa", {"choices": "choices"}),
    }
    assert config["data"]["init_args"]["tasks"].keys() == sets.keys()
    for task, (data_set, columns) in sets.items():
        config["model"]["init_args"]["heads"][task]["init_args"]["pretrained"] = folder
        files = {
            split: head(real_data / data_set / f"{name}.jsonl", count, tmp_path / f"{task}.{split}.jsonl")
            for split, name, count in (("train", "train", 40), ("val", "dev", 40), ("predict", "dev", 5))
        }
        config["data"]["init_args"]["tasks"][task]["init_args"] |= {
            "tokenizer": folder,
            "max_length": 64,
            **columns,
            **files,
        }
    fitted = train_and_predict(config, tmp_path, monkeypatch)
    assert {f"val_{task}_accuracy" for task in sets} <= fitted.trainer.callback_metrics.keys()
    lines = (tmp_path / "runs" / "run_0" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 15


def test_every_example_is_tested() -> None:
    assert {path.stem for path in (ROOT / "examples").glob("*.yaml")} == {*EXAMPLES, "multi_task", "demo"}


def test_own_module_runs(tmp_path: Path) -> None:
    output = run(tmp_path, str(ROOT / "examples" / "own_module.py"))
    assert "phase 3 of 3: stem, body, head train" in output


@pytest.mark.slow  # three minutes on two free cores
@pytest.mark.timeout(1800)
def test_demo_beats_frozen_features(tmp_path: Path) -> None:
    run(tmp_path, "-m", "lightning_ft", "demo", "A fine film.")
    folder = tmp_path / "runs" / "demo" / "run_0"
    results = json.loads((folder / "demo.json").read_text())
    assert results["accuracy"] > results["accuracy, frozen features"]
    assert results["ONNX, worst relative difference"] < 1e-5
    for name in ("confusion.png", "learning_curve.png"):
        assert (folder / name).stat().st_size > 10_000
