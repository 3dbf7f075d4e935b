"""The command line: links, run folders, plan, resume after SIGKILL, predict, export."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from lightning_ft import cli
from lightning_ft.callbacks import TrainingModeCheck
from lightning_ft.cli import FineTuningCLI, checkpoint_labels, last_checkpoint, run_folder
from lightning_ft.demo import CONFIG
from lightning_ft.functional.learning_rates import slanted_triangular, warmup_then
from lightning_ft.plan import _first
from tests.warm import ended, start

WORDS = ["good", "bad", "fine", "poor", "film", "plot", "the", "a", "very", "not"]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a tiny model with dropout, three files of data and a configuration with all callbacks."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = BertTokenizerFast(str(tmp_path / "vocab.txt"))
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    BertForSequenceClassification(config).base_model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    generator = torch.Generator().manual_seed(0)
    for name, rows in {"train": 75, "val": 20, "test": 20}.items():
        lines = []
        for i in range(rows):
            length = int(torch.randint(1, 12, (), generator=generator))
            words = [WORDS[j] for j in torch.randint(0, len(WORDS), (length,), generator=generator)]
            label = ["negative", "positive"][i % 2]
            lines.append(json.dumps({"text": " ".join([["bad", "good"][i % 2], *words]), "label": label}))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    # The demo's own configuration, with a small model, small data, and every trap of resuming switched on.
    settings = yaml.safe_load(CONFIG.read_text())
    settings["seed_everything"] = 1
    settings["model"]["init_args"] |= {"pretrained": "model", "learning_rate": 0.01}
    files = {"train": "train.jsonl", "val": "val.jsonl", "test": "test.jsonl", "predict": "test.jsonl"}
    settings["data"]["init_args"] |= {**files, "batch_size": 4}
    settings["trainer"] |= {
        "default_root_dir": "runs",
        "max_epochs": 3,
        "accumulate_grad_batches": 2,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    callbacks = {callback["class_path"]: callback["init_args"] for callback in settings["trainer"]["callbacks"]}
    assert settings["trainer"]["val_check_interval"] == 0.5
    callbacks["GradualUnfreezing"]["every"] = 0.15
    callbacks["DiscriminativeLR"]["decay"] = 0.8
    callbacks["ExactResume"]["every"] = "1 steps"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def environment(project: Path) -> dict[str, str]:
    """One thread, and no tokens that another version of the code may have left on this machine."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(project / "cache")}


def lightning_ft(project: Path, *arguments: str, code: int = 0) -> str:
    """What the command prints, in the project's folder and a process of its own."""
    log = project.with_name(f"{project.name}.log")
    found = ended(start(command, arguments, cwd=project, environment=environment(project), log=log))
    output = log.read_text()
    assert found == [code], output
    return output


def command(arguments: Sequence[str]) -> None:
    datasets.config.HF_DATASETS_CACHE = Path(os.environ["HF_DATASETS_CACHE"])  # read where this process was forked
    sys.argv, sys.path = ["lightning-ft", *arguments], [os.getcwd(), *sys.path]  # as `python -m` does
    cli.main()


def weights(path: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return state


def assert_equal_runs(one: Path, other: Path) -> None:
    """Bit-equal weights, optimiser, schedulers and callbacks."""
    states = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (one, other)]
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        torch.testing.assert_close(states[0][key], states[1][key], rtol=0, atol=0, msg=lambda m, key=key: f"{key}: {m}")
    stages = [s["callbacks"]["GradualUnfreezing"] for s in states]
    assert stages[0] == stages[1]
    assert stages[0]["stage"] == 4


def kill_at(project: Path, hook: str, call: int) -> None:
    """Run a fit and kill it with SIGKILL in the given call of a hook, in training."""
    killer = f"""
import os, signal, sys
from lightning.pytorch import Callback
from lightning_ft import cli
calls = 0
class Killer(Callback):
    def {hook}(self, trainer, *args):
        global calls
        calls += not trainer.sanity_checking
        if calls == {call}:
            os.kill(os.getpid(), signal.SIGKILL)
original = cli.FineTuningCLI._fit_settings
def with_killer(self, settings, callbacks):
    callbacks.append(Killer())
    return original(self, settings, callbacks)
cli.FineTuningCLI._fit_settings = with_killer
sys.argv = ["lightning-ft", "fit", "--config", "config.yaml"]
cli.main()
"""
    done = subprocess.run(
        [sys.executable, "-c", killer],
        cwd=project,
        env=environment(project),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr


# 75 rows in batches of 4: 19 batches an epoch, 10 optimiser steps; validation after batches 9 and 18, in 5 batches.
@pytest.mark.parametrize(
    ("hook", "call"),
    [
        pytest.param("on_train_batch_end", 38, id="an epoch's last batch"),
        pytest.param("on_train_batch_end", 7, id="first epoch", marks=pytest.mark.kill),
        pytest.param("on_train_batch_end", 28, id="before a validation", marks=pytest.mark.kill),
        pytest.param("on_validation_batch_end", 12, id="inside a validation", marks=pytest.mark.kill),
        pytest.param("on_train_batch_end", 45, id="inside a window", marks=pytest.mark.kill),
        pytest.param("on_save_checkpoint", 12, id="while saving", marks=pytest.mark.kill),
    ],
)
def test_killed_and_resumed_run_equals_the_uninterrupted_one(project: Path, hook: str, call: int) -> None:
    lightning_ft(project, "fit", "--config", "config.yaml")
    kill_at(project, hook, call)
    output = lightning_ft(project, "fit", "--config", "config.yaml", "--ckpt_path", "last")
    assert "--ckpt_path last: runs/run_1/checkpoints/last.ckpt" in output
    runs = [project / "runs" / "run_0", project / "runs" / "run_1"]
    assert sorted((project / "runs").iterdir()) == runs
    assert_equal_runs(*runs)
    for run in runs:
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    torch.testing.assert_close(*(weights(run / "checkpoints" / "best.ckpt") for run in runs), rtol=0, atol=0)


def test_configuration_names_the_model_once_and_labels_come_from_the_data(project: Path) -> None:
    output = lightning_ft(project, "fit", "--config", "config.yaml", "--trainer.max_epochs", "1")
    assert "phase 1 of 5: tail, head train" in output
    run = project / "runs" / "run_0"
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    stored = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["lightning_ft"]
    assert stored["arguments"]["labels"] == ["negative", "positive"]
    assert set(stored["tokenizer"]) >= {"tokenizer.json", "tokenizer_config.json"}
    assert (run / "logs" / "version_0" / "config.yaml").is_file()

    # The checkpoint's arguments do not override the command line's.
    output = lightning_ft(
        project,
        *("fit", "--config", "config.yaml", "--ckpt_path", "last"),
        *("--trainer.max_epochs", "2", "--model.init_args.label_smoothing", "0.2"),
    )
    stored = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert stored["lightning_ft"]["arguments"]["label_smoothing"] == 0.2
    assert stored["global_step"] == 20
    assert sorted(p.name for p in (run / "logs").iterdir()) == ["version_0", "version_1"]

    output = lightning_ft(project, "test", "--config", "config.yaml", "--ckpt_path", "last")
    assert "test_accuracy" in output
    output = lightning_ft(project, "predict", "--config", "config.yaml", "--ckpt_path", "last")
    predictions = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert [row["row"] for row in predictions] == list(range(20))
    assert {row["label"] for row in predictions} <= {"negative", "positive"}

    # Prediction and evaluation need no training data: the labels are in the checkpoint. Export does without the
    # pretrained folder, too.
    for name in ("train.jsonl", "val.jsonl"):
        (project / name).rename(project / f"{name}.away")
    (run / "predictions.jsonl").unlink()
    lightning_ft(project, "predict", "--config", "config.yaml", "--ckpt_path", "last")
    assert [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()] == predictions
    output = lightning_ft(project, "test", "--config", "config.yaml", "--ckpt_path", "last")
    assert "test_accuracy" in output
    (project / "model").rename(project / "model.away")
    checkpoint = str(run / "checkpoints" / "last.ckpt")
    output = lightning_ft(project, "export", checkpoint, "served", "--to", "onnx", "--max_length", "32")
    assert "worst relative difference" in output
    assert (project / "served" / "model.onnx").is_file()
    judged = ("--precision", "int8", "--data", "config.yaml", "--max_drop", "0.5", "--max_length", "32")
    (project / "val.jsonl.away").rename(project / "val.jsonl")
    (project / "model.away").rename(project / "model")
    output = lightning_ft(project, "export", checkpoint, "small", *judged)
    assert "agreement" in output
    assert (project / "small" / "model.onnx").stat().st_size < (project / "served" / "model.onnx").stat().st_size
    (project / "model").rename(project / "model.away")
    lightning_ft(project, "export", checkpoint, "folder", "--to", "hf")
    output = lightning_ft(project, "export", "folder", "again", "--max_length", "32")
    assert "BertForSequenceClassification" in output
    assert (project / "again" / "model.onnx").is_file()


def test_plan_prints_phases_and_rates_and_trains_nothing(project: Path) -> None:
    output = lightning_ft(project, "plan", "--config", "config.yaml")
    lines = [re.split(r"\s{2,}", line.strip()) for line in output.splitlines()]
    # 19 batches, accumulated by 2, 3 epochs: 30 steps; 5 phases, one each 0.15 of them.
    assert [row[1] for row in lines if len(row) == 8 and row[0].isdigit()] == [
        "start",
        "step 5",
        "step 9",
        "step 14",
        "step 18",
    ]
    rates = {row[0]: float(row[-1]) for row in lines if row[0] in ("embeddings", "block.2", "head")}
    assert rates == {"embeddings": pytest.approx(0.01 * 0.8**4), "block.2": pytest.approx(0.008), "head": 0.01}
    assert not (project / "runs").exists()


def test_plan_is_not_off_by_rounding() -> None:
    assert [_first(3 * 0.1 * 440), _first(0.45 * 30), _first(0.0), _first(7.0)] == [132, 14, 0, 7]


def test_plan_draws_a_picture(project: Path) -> None:
    output = lightning_ft(project, "plan", "--config", "config.yaml", "--plot", "plan.png")
    assert "picture: plan.png" in output
    assert (project / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_plan_warns_of_phases_that_never_begin(project: Path) -> None:
    config = project / "config.yaml"
    config.write_text(config.read_text().replace("every: 0.15", 'every: "1 epoch"'))
    output = lightning_ft(project, "plan", "--config", "config.yaml")
    assert output.count("never") == 2
    assert "training ends before the last phase" in output


def test_last_without_a_run_says_so(project: Path) -> None:
    output = lightning_ft(project, "fit", "--config", "config.yaml", "--ckpt_path", "last", code=1)
    assert "no run in" in output
    assert "nothing to resume" in output


def test_run_folders_are_numbered_and_found(tmp_path: Path) -> None:
    assert run_folder(tmp_path, None) == tmp_path / "run_0"
    for name in ("run_0", "run_2", "run_10", "run_x", "notes"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="no run in"):
        last_checkpoint(tmp_path)
    for name in ("run_0", "run_2"):
        (tmp_path / name / "checkpoints" / "last.ckpt").touch()
    assert last_checkpoint(tmp_path) == tmp_path / "run_2" / "checkpoints" / "last.ckpt"
    assert run_folder(tmp_path, None) == tmp_path / "run_11"
    assert run_folder(tmp_path, str(last_checkpoint(tmp_path))) == tmp_path / "run_2"
    assert run_folder(tmp_path, "elsewhere/model.ckpt") == tmp_path / "run_11"


def test_a_prediction_without_a_run_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    """Zero-shot, or with a checkpoint from elsewhere."""

    def folder() -> str:
        return run_folder(tmp_path, "elsewhere/model.ckpt", predicts=True).name

    (tmp_path / "run_0" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run_0" / ".predictions.jsonl.0.part").touch()  # with a checkpoint of that run
    assert folder() == "run_1"
    (tmp_path / "run_1").mkdir()
    (tmp_path / "run_1" / ".predictions.jsonl.0.part").touch()
    assert folder() == "run_1"
    assert run_folder(tmp_path, None).name == "run_2"
    (tmp_path / "run_1" / ".predictions.jsonl.0.part").rename(tmp_path / "run_1" / "predictions.jsonl")
    assert folder() == "run_2"


def test_a_module_that_knows_nothing_of_us_runs_from_the_command_line(project: Path) -> None:
    (project / "mine.py").write_text(
        "import torch\n"
        "from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel\n"
        "class Mine(BoringModel):\n    pass\n"
        "class Data(BoringDataModule):\n    pass\n"
    )
    arguments = [
        "--model",
        "mine.Mine",
        "--data",
        "mine.Data",
        "--trainer.max_steps",
        "2",
        "--trainer.accelerator",
        "cpu",
    ]
    output = lightning_ft(project, "fit", *arguments, code=1)
    assert "ExactResume cannot resume a DataLoader" in output
    lightning_ft(project, "fit", *arguments, "--exact_resume", "false")


def test_schedulers_of_the_command_line_step_by_step(project: Path) -> None:
    lightning_ft(
        project,
        *("fit", "--config", "config.yaml", "--trainer.max_epochs", "1", "--trainer.logger", "false"),
        *("--optimizer", "SGD", "--optimizer.lr", "0.1"),
        *("--lr_scheduler", "StepLR", "--lr_scheduler.step_size", "1", "--lr_scheduler.gamma", "0.5"),
    )
    stored = torch.load(project / "runs" / "run_0" / "checkpoints" / "last.ckpt", weights_only=True)
    assert stored["lr_schedulers"][0]["_last_lr"] == [pytest.approx(0.1 * 0.5**10)]
    # Without a logger the configuration lies in the run's own folder, and resuming may write it again.
    lightning_ft(
        project,
        *("fit", "--config", "config.yaml", "--trainer.max_epochs", "2", "--trainer.logger", "false"),
        *("--optimizer", "SGD", "--optimizer.lr", "0.1", "--ckpt_path", "last"),
        *("--lr_scheduler", "StepLR", "--lr_scheduler.step_size", "1", "--lr_scheduler.gamma", "0.5"),
    )
    assert [path.name for path in (project / "runs").iterdir()] == ["run_0"]


def in_this_process(project: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> FineTuningCLI:
    """A fit without starting Python anew."""
    monkeypatch.chdir(project)
    command = ["lightning-ft", "fit", "--config", "config.yaml", "--trainer.logger", "false"]
    monkeypatch.setattr(sys, "argv", [*command, *arguments])
    return cli.run()


# What Lightning and jsonargparse say of each other's older spellings is no concern of these.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("scheduler", "factor"),
    [
        (("SlantedTriangular", "--lr_scheduler.cut", "0.2"), lambda step: slanted_triangular(step, 13, cut=0.2)),
        (("WarmupThen", "--lr_scheduler.warmup", "0.25"), warmup_then("linear", total_steps=13, warmup_steps=3)),
        (("WarmupThen", "--lr_scheduler.total_steps", "40"), warmup_then("linear", total_steps=40, warmup_steps=4)),
        (("ExponentialLR", "--lr_scheduler.gamma", "0.5"), lambda step: 0.5**step),
    ],
    ids=["triangle", "warm-up", "given steps", "torch's own"],
)
def test_optimiser_and_scheduler_of_the_command_line(
    project: Path, monkeypatch: pytest.MonkeyPatch, scheduler: tuple[str, ...], factor: Any
) -> None:
    rates: dict[int, list[float]] = {}

    def record(self: Any, trainer: Any, *args: Any) -> None:
        rates[trainer.global_step] = [group["lr"] for group in trainer.optimizers[0].param_groups]

    monkeypatch.setattr(TrainingModeCheck, "on_train_batch_start", record)
    done = in_this_process(
        project,
        monkeypatch,
        *("--optimizer", "AdamW", "--optimizer.lr", "0.01", "--optimizer.weight_decay", "0.25"),
        *("--trainer.max_steps", "13", "--lr_scheduler", *scheduler),
    )
    matrices, vectors = done.trainer.optimizers[0].param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.25, 0.0)
    assert {p for p in done.model.parameters() if p.ndim >= 2} == set(matrices["params"])
    assert {p for p in done.model.parameters() if p.ndim < 2} == set(vectors["params"])
    assert rates == {step: [pytest.approx(0.01 * factor(step), abs=1e-12)] * 2 for step in range(13)}


@pytest.mark.filterwarnings("ignore")
def test_scheduler_over_an_endless_training_says_what_to_set(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--trainer.max_epochs", "-1", "--optimizer", "SGD", "--optimizer.lr", "0.1"]
    with pytest.raises(ValueError, match=r"--lr_scheduler SlantedTriangular spans .* no end: set --trainer.max_epochs"):
        in_this_process(project, monkeypatch, *arguments, "--lr_scheduler", "SlantedTriangular")


def test_callbacks_are_added_by_short_name_and_a_dry_run_leaves_no_checkpoint(project: Path) -> None:
    config = project / "config.yaml"
    settings = yaml.safe_load(config.read_text())
    settings["trainer"]["callbacks"] = settings["trainer"]["callbacks"][1:]
    config.write_text(yaml.safe_dump(settings))
    output = lightning_ft(
        project,
        *("fit", "--config", "config.yaml", "--trainer.fast_dev_run", "true"),
        *("--trainer.callbacks+=GradualUnfreezing", "--trainer.callbacks.every=1 epoch"),
    )
    assert "phase 1 of 5: tail, head train" in output
    assert not (project / "runs").exists()


def parsed(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    """The configuration that a command line comes to; nothing is made of it."""
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of calls that Lightning makes
    monkeypatch.setattr(sys, "argv", ["lightning-ft"])
    monkeypatch.setattr(FineTuningCLI, "instantiate_classes", lambda self: None)
    monkeypatch.setattr(FineTuningCLI, "_run_subcommand", lambda self, subcommand: None)
    return cli.run(arguments).config[arguments[0]]


def test_what_head_and_data_must_agree_on_is_written_once(monkeypatch: pytest.MonkeyPatch) -> None:
    config = parsed(
        monkeypatch,
        *("fit", "--model", "Seq2Seq", "--model.pretrained", "facebook/nllb-200-distilled-600M"),
        *("--model.target_language", "deu_Latn", "--model.trust_remote_code", "true"),
        *("--data", "Seq2SeqData", "--data.source_language", "eng_Latn"),
    )
    assert (config.data.init_args.tokenizer, config.data.init_args.source_language) == (
        "facebook/nllb-200-distilled-600M",
        "eng_Latn",
    )
    assert (config.data.init_args.target_language, config.data.init_args.trust_remote_code) == ("deu_Latn", True)
    for head, data in (("TokenClassification", "TokenClassificationData"), ("MaskedLM", "LanguageModelingData")):
        arguments = ["fit", "--model", head, "--model.pretrained", "x", "--data", data]
        assert parsed(monkeypatch, *arguments).data.init_args.trust_remote_code is False
        trusted = parsed(monkeypatch, *arguments, "--model.trust_remote_code", "true")
        assert trusted.data.init_args.trust_remote_code is True


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification"])
def test_labels_come_from_the_checkpoint(head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = ["O", "B-B", "B-A"]
    path = tmp_path / "run_0" / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    torch.save({"lightning_ft": {"arguments": {"labels": labels}}}, path)
    arguments = ["predict", "--model", head, "--model.pretrained", "x", "--trainer.default_root_dir", str(tmp_path)]
    arguments += ["--data", head.replace("Sequence", "") + "Data", "--data.train", "gone.jsonl"]
    assert parsed(monkeypatch, *arguments).data.init_args.labels is None
    for given in (str(path), "last"):
        assert parsed(monkeypatch, *arguments, "--ckpt_path", given).data.init_args.labels == labels
    own = parsed(monkeypatch, *arguments, "--ckpt_path", str(path), "--data.labels", '["O", "B-A"]')
    assert own.data.init_args.labels == ["O", "B-A"]
    # What is no file of ours is left to Lightning.
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    torch.save({"odd": Path("a")}, tmp_path / "pickle.ckpt")
    torch.save({"lightning_ft": {"arguments": {"labels": []}}}, tmp_path / "regression.ckpt")
    for name in ("other.ckpt", "pickle.ckpt", "regression.ckpt", "gone.ckpt"):
        assert checkpoint_labels(str(tmp_path / name)) is None
    alone = parsed(monkeypatch, "predict", "--model", head, "--model.pretrained", "x", "--ckpt_path", str(path))
    assert alone.get("data") is None
    for given in ("best", str(tmp_path / "other.ckpt")):
        assert parsed(monkeypatch, *arguments, "--ckpt_path", given).data.init_args.labels is None


def test_a_folder_taken_meanwhile_is_refused(project: Path) -> None:
    from lightning_ft.cli import SaveFitConfig

    class Fit:
        is_global_zero, fast_dev_run = True, False

    (project / "runs" / "run_0").mkdir(parents=True)
    (project / "runs" / "run_0" / ".claimed").touch()
    callback = SaveFitConfig(None, None, claim=project / "runs" / "run_0")  # type: ignore[arg-type]
    with pytest.raises(FileExistsError, match="start this one again"):
        callback.setup(Fit(), None, "fit")  # type: ignore[arg-type]
