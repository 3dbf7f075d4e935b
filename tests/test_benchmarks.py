"""Each benchmark runs from end to end, at a size at which its figures mean nothing. Nothing here is about time."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def _run(script: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / script), "--quick", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _numbers(content: Any) -> Iterator[float]:
    if isinstance(content, dict | list):
        for item in content.values() if isinstance(content, dict) else content:
            yield from _numbers(item)
    elif isinstance(content, int | float):
        yield content


def _check(done: subprocess.CompletedProcess[str], file: Path, titles: set[str], numbers: int = 20) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    assert set(content["tables"]) == titles
    assert content["machine"]["threads"] == 1
    found = list(_numbers([content["tables"], content["seconds"]]))
    assert len(found) > numbers
    assert all(map(math.isfinite, found))
    assert all(f"**{title}**" in done.stdout for title in titles)
    return content


@pytest.mark.slow
def test_vs_hf_trainer(real_data: Path, tmp_path: Path) -> None:
    done = _run("vs_hf_trainer.py", "--data", str(real_data / "sst2"), "--results", str(tmp_path))
    titles = {
        "Losses, step by step",
        "Step time, identical batches",
        "Step time without arithmetic",
        "Epoch time",
        "Medians",
    }
    content = _check(done, tmp_path / "vs_hf_trainer.json", titles)
    (losses,) = content["tables"]["Losses, step by step"]
    assert losses["worst difference"] <= 1e-5
    assert losses["same parameters decay"]
    ratios = [row["comparison"] for row in content["tables"]["Epoch time"]]
    assert sum(name.startswith("A/A: ") for name in ratios) == 3


def test_overhead(tmp_path: Path) -> None:
    content = _check(
        _run("overhead.py", "--results", str(tmp_path)), tmp_path / "overhead.json", {"Step time", "Added to a step"}
    )
    assert len(content["tables"]["Added to a step"]) == 3


def test_packing(real_data: Path, tmp_path: Path) -> None:
    tokenizer = real_data.parent / "models" / "aidreams260k"
    done = _run(
        "packing.py",
        *("--data", str(real_data / "self_instruct"), "--tokenizer", str(tokenizer), "--results", str(tmp_path)),
    )
    content = _check(done, tmp_path / "packing.json", {"Real tokens per second", "Seconds per real token"})
    by_name = {row["batches"]: row for row in content["tables"]["Real tokens per second"]}
    assert by_name["packed"]["padding over real tokens"] < by_name["random"]["padding over real tokens"]


@pytest.mark.slow
def test_frozen_prefix(real_data: Path, tmp_path: Path) -> None:
    done = _run("frozen_prefix.py", "--data", str(real_data / "sst2"), "--results", str(tmp_path))
    phases = {"Step time, head only", "Step time, top block and head"}
    content = _check(done, tmp_path / "frozen_prefix.json", {*phases, "Steps, fill and memory"})
    for row in content["tables"]["Steps, fill and memory"]:
        assert row["how"] == "filled"
        assert row["hits"] == row["seen"] == 192


@pytest.mark.slow
def test_depth(real_data: Path, tmp_path: Path) -> None:
    absent = tmp_path / "python"
    results = tmp_path / "results"
    done = _run(
        "depth.py", "--data", str(real_data), "--tasks", "sst2", "--rival", str(absent), "--results", str(results)
    )
    titles = {
        "Dev accuracy",
        "After each epoch",
        "Seconds to the same dev accuracy",
        "Seconds to it, ratios",
        "Step time by phase",
        "Step time by phase, ratios",
        "Last dev accuracy with the cache",
        "Memory of the cache",
    }
    check, phases = "Losses without dropout, step by step", "Phases by default"
    content = _check(done, results / "depth.json", {check, phases, *(f"{title}, sst2" for title in titles)})
    assert f"finetuning-scheduler is left out: {absent} does not have it. Run `make rivals`" in done.stdout
    tables = content["tables"]
    ours = "GradualUnfreezing"
    assert set(content["seconds"]["sst2"]) == {"full fine-tuning", ours, f"{ours} + FrozenPrefixCache"}
    assert [row["worst difference"] <= 1e-4 for row in tables[check]] == [True]
    assert [row[ours] for row in tables[phases]] == [8, 14, 2]
    assert [row["hits"] == row["seen"] == 48 for row in tables["Memory of the cache, sst2"]] == [True]


def test_ddp_drift(tmp_path: Path) -> None:
    done = _run("ddp_drift.py", "--rival", str(tmp_path / "python"), "--results", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "finetuning-scheduler is left out" in done.stdout
    content = json.loads((tmp_path / "ddp_drift.json").read_text(encoding="utf-8"))
    rows = {(row["callback"], row["find_unused_parameters"]): row for row in content["tables"]["Replicas under DDP"]}
    assert {name for name, _ in rows} == {"none: all train", "BackboneFinetuning", "GradualUnfreezing"}
    for unused in (False, True):
        assert rows["GradualUnfreezing", unused]["largest difference at the end"] == 0
        assert rows["none: all train", unused]["largest difference at the end"] == 0
        assert rows["BackboneFinetuning", unused]["ranks differ from step"] == 7


@pytest.mark.slow
def test_anchors(real_data: Path, tmp_path: Path) -> None:
    absent = tmp_path / "python"
    results = tmp_path / "results"
    done = _run("anchors.py", "--data", str(real_data), "--rival", str(absent), "--results", str(results))
    titles = {
        "memory": {"Memory"},
        "added": {"Added to a step"},
        "step": {"Step time"},
        "fisher": {"Fisher information", "Fisher information, ratios"},
        "tasks": {f"Two tasks, {what}" for what in ("Fisher information", "a step", "dev accuracy")},
    }
    tables: dict[str, Any] = {}
    for part, names in titles.items():
        tables |= _check(done, results / f"anchors_{part}.json", names, numbers=5)["tables"]
    assert f"avalanche-lib is left out: {absent} does not have it. Run `make rivals`" in done.stdout
    targets = {row["added to a step"]: row["target, %"] for row in tables["Added to a step"]}
    assert targets["L2SP, coupled, all"] == targets["EWC, coupled"] == 1.5
    assert targets["L2SP, decoupled, all"] == targets["EWC, decoupled"] == 0.8
    assert {row["passes"] for row in tables["Fisher information"]} == {1, 5}
    variants = {row["F"]: row["trace"] for row in tables["Two tasks, Fisher information"]}
    assert set(variants) == {"exact", "sampled", "empirical"}
    assert all(trace > 0 for trace in variants.values())
    assert [row["contestant"] for row in tables["Two tasks, dev accuracy"]] == ["plain fine-tuning", "EWC"]


@pytest.mark.slow
@pytest.mark.parametrize("head", ["tagging", "multiple choice"])
def test_heads_vs_hf(head: str, real_data: Path, tmp_path: Path) -> None:
    done = _run("heads_vs_hf.py", "--heads", head, "--results", str(tmp_path))
    name = head.replace(" ", "_")
    titles = {"Losses, step by step", "Step time, identical batches"}
    time = json.loads((tmp_path / f"heads_time_{name}.json").read_text(encoding="utf-8"))
    metric = json.loads((tmp_path / f"heads_metric_{name}.json").read_text(encoding="utf-8"))
    assert done.returncode == 0, done.stderr
    assert set(time["tables"]) == titles
    assert time["tables"]["Losses, step by step"][0]["worst difference"] <= 1e-5
    (row,) = metric["tables"]["Dev metric"]
    assert 0 <= row["lightning_ft"] <= 1
    assert len(metric["scores"]["HF Trainer"]) == 1


@pytest.mark.slow
def test_forgetting(real_data: Path, tmp_path: Path) -> None:
    folders = ("--data", str(real_data), "--runs", str(tmp_path / "runs"), "--results", str(tmp_path))
    done = _run("forgetting.py", *folders, "--methods", "L2-SP", "EWC, exact", "WiSE-FT")
    content = _check(done, tmp_path / "forgetting.json", {"Forgetting", "All strengths"})
    assert [row["method"] for row in content["tables"]["Forgetting"]] == ["plain", "L2-SP", "EWC, exact", "WiSE-FT"]
    assert (tmp_path / "forgetting.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_few_sample(real_data: Path, tmp_path: Path) -> None:
    folders = ("--data", str(real_data / "sst2"), "--runs", str(tmp_path / "runs"), "--results", str(tmp_path))
    content = _check(_run("few_sample.py", *folders), tmp_path / "few_sample.json", {"Dev accuracy"})
    assert {row["seeds"] for row in content["tables"]["Dev accuracy"]} == {2}
    # Finished runs are read again.
    again = _run("few_sample.py", *folders)
    assert again.returncode == 0, again.stderr
    assert "accuracy': " not in again.stdout


def test_absent_data_is_named(tmp_path: Path) -> None:
    done = _run("vs_hf_trainer.py", "--data", str(tmp_path), "--results", str(tmp_path))
    assert done.returncode == 1
    assert "train.jsonl does not exist: pass --data FOLDER" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_export(real_data: Path, tmp_path: Path) -> None:
    options = ("--parts", "encoder", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path))
    done = _run("export.py", "--data", str(real_data / "sst2"), *options)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "export_encoder.json").read_text(encoding="utf-8"))
    assert set(content["tables"]) == {"Latency", "Quality"}
    names = {row["runtime"] for row in content["tables"]["Quality"]}
    assert {"torch", "fp32", "int8", "transformers int8"} <= names
    assert {row["runtime"] for row in content["tables"]["Latency"]} == names


@pytest.mark.slow
def test_eight_bit_optimizer(real_data: Path, tmp_path: Path) -> None:
    folders = ("--data", str(real_data / "trec6"), "--runs", str(tmp_path / "runs"), "--results", str(tmp_path))
    content = _check(
        _run("eight_bit_optimizer.py", *folders), tmp_path / "eight_bit_optimizer.json", {"States of 8 bits"}
    )
    rows = {row["optimiser"]: row for row in content["tables"]["States of 8 bits"]}
    assert rows["AdamW8bit"]["the others over AdamW"] <= 0.30
    assert rows["AdamW8bit"]["state of embeddings, MB"] == pytest.approx(
        rows["AdamW"]["state of embeddings, MB"], rel=1e-4
    )


@pytest.mark.slow
def test_qlora(real_data: Path, tmp_path: Path) -> None:
    folders = ("--data", str(real_data / "self_instruct"), "--runs", str(tmp_path / "runs"), "--results", str(tmp_path))
    done = _run("qlora.py", *folders)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "qlora.json").read_text(encoding="utf-8"))["tables"]["QLoRA"]
    by_method = {row["method"]: row for row in rows}
    assert by_method["LoRA"]["trainable"] == by_method["QLoRA"]["trainable"] < by_method["full"]["trainable"]
    assert by_method["QLoRA"]["weights, MB"] < by_method["LoRA"]["weights, MB"]
    assert by_method["QLoRA"]["saved weights, MB"] == pytest.approx(by_method["LoRA"]["saved weights, MB"])
