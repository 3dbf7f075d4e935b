"""The examples run, on real data where they name public sets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def run(folder: Path, *command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("example", "data", "label", "metric"),
    [("pairs", "mrpc", "label", "val_mcc"), ("regression", "stsb", "score", "val_pearson")],
)
def test_configuration_trains_on_real_data(
    example: str, data: str, label: str, metric: str, minilm: str, real_data: Path, tmp_path: Path
) -> None:
    config = yaml.safe_load((ROOT / "examples" / f"{example}.yaml").read_text())
    assert config["data"]["init_args"]["train"].startswith("hub://nyu-mll/glue")
    folder = real_data / data
    output = run(
        tmp_path,
        *("-m", "lightning_ft", "fit", "--config", str(ROOT / "examples" / f"{example}.yaml")),
        *("--model.init_args.pretrained", minilm, "--data.init_args.label", label),
        *("--data.init_args.train", str(folder / "train.jsonl"), "--data.init_args.val", str(folder / "dev.jsonl")),
        *("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "4", "--trainer.limit_val_batches", "4"),
        *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
    )
    assert "max_epochs=1` reached" in output
    (log,) = (tmp_path / "runs" / "run_0" / "logs").glob("*/metrics.csv")
    header, *_ = log.read_text().splitlines()
    assert metric in header.split(",")


def test_own_module_runs(tmp_path: Path) -> None:
    output = run(tmp_path, str(ROOT / "examples" / "own_module.py"))
    assert "phase 3 of 3: stem, body, head train" in output


@pytest.mark.slow
def test_demo_beats_frozen_features(tmp_path: Path) -> None:
    import json

    run(tmp_path, "-m", "lightning_ft", "demo", "A fine film.")
    folder = tmp_path / "runs" / "demo" / "run_0"
    results = json.loads((folder / "demo.json").read_text())
    assert results["accuracy"] > results["accuracy, frozen features"]
    assert results["ONNX, worst relative difference"] < 1e-5
    for name in ("confusion.png", "learning_curve.png"):
        assert (folder / name).stat().st_size > 10_000
