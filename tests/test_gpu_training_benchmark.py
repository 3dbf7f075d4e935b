"""The benchmark of training on a GPU, as far as it runs without one: its arithmetic, its plan, its processes."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

FOLDER = Path(__file__).parents[1] / "benchmarks" / "gpu"
H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Modules of the folder by their names."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def by_name(name: str) -> ModuleType:
        return importlib.import_module(name)

    return by_name


# ---- FLOPs


def model_of(config: dict[str, Any]) -> Any:
    """On no device: nothing is computed."""
    given = {name: value for name, value in config.items() if name != "decoder"}
    with torch.device("meta"):
        if config["decoder"]:
            return hf.LlamaForCausalLM(hf.LlamaConfig(**given, attn_implementation="eager"))
        return hf.BertForSequenceClassification(hf.BertConfig(**given, attn_implementation="eager"))


def counted(model: Any, rows: int, length: int) -> int:
    """What PyTorch counts of a forward and backward pass."""
    ids = torch.zeros(rows, length, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids).logits.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["BERT-base", "Llama-1B"])
def test_flops_are_those_that_pytorch_counts(load: Any, name: str) -> None:
    flops, config = load("_flops"), load("_training_plan").MODELS[name].config
    rows, length = 2, 64
    model = model_of(config)
    found = rows * length * flops.flops_per_token(config, length)
    if config["decoder"]:  # PyTorch counts what is masked, too
        found += rows * length * 3 * flops.attention_flops(config, length)
    else:  # and what sees one token of a row
        found += 6 * rows * sum(layer.weight.numel() for layer in (model.bert.pooler.dense, model.classifier))
    # Neither are products, though it counts Llama's one of angles: 1e-5 of all.
    assert counted(model, rows, length) == pytest.approx(found, rel=1e-4)
    linears = {m for m in model.modules() if isinstance(m, torch.nn.Linear)}
    assert flops.matrix_weights(config) == sum(m.weight.numel() for m in linears) - (
        0 if config["decoder"] else model.bert.pooler.dense.weight.numel() + model.classifier.weight.numel()
    )


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft reads it
def test_flops_over_a_frozen_base(load: Any) -> None:
    flops, config = load("_flops"), load("_training_plan").QUICK["tiny Llama"].config
    rows, length, rank = 2, 16, 4
    model = get_peft_model(model_of(config), LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert flops.lora_weights(config, rank) == trained
    wide, keys = 64, 32
    found = rows * length * (flops.flops_per_token(config, length, lora_rank=rank))
    found += rows * length * 3 * flops.attention_flops(config, length)
    # No gradients go into the embeddings: none of the inputs of the first block's three projections.
    found -= rows * length * 2 * ((wide + 2 * keys) * wide + 3 * rank * wide)
    assert counted(model, rows, length) == pytest.approx(found, rel=1e-4)


@pytest.mark.parametrize(
    ("device", "kind", "tera"),
    [
        (H100, "bf16", 989.4),
        (H100, "fp32", 67.0),
        ("NVIDIA H100 PCIe", "tf32", 378.0),
        ("NVIDIA H100 NVL", "bf16", 835.5),
        ("NVIDIA H200", "fp16", 989.4),
        ("NVIDIA A100-SXM4-80GB", "tf32", 156.0),
        ("Tesla T4", "fp16", 65.0),
        ("Tesla T4", "bf16", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
        ("NVIDIA A10G", "bf16", None),
        ("", "bf16", None),
    ],
)
def test_peaks(load: Any, device: str, kind: str, tera: float | None) -> None:
    assert load("_flops").peak(device, kind) == (None if tera is None else pytest.approx(1e12 * tera))


# ---- rows and their table


def test_figures_of_a_row(load: Any) -> None:
    plan, table = load("_training_plan"), load("_training_table")
    model, variant = plan.MODELS["BERT-base"], plan.VARIANTS[0]
    passes = [{"steps": [0.1, 0.2, 9.0], "peak_gib": 3.0}, {"steps": [0.1, 0.2], "peak_gib": 4.0}]
    row = table.row(variant, plan.OURS, model, passes, "", H100)
    assert row["tokens_per_s"] == pytest.approx(64 * 128 / 0.2)
    # 12 blocks of 12·768² weights, and 12·12·768·128 for scores and means.
    flops = 6 * 12 * 12 * 768**2 + 12 * 12 * 768 * 128
    assert row["mfu"] == pytest.approx(flops * 64 * 128 / 0.2 / 989.4e12)
    assert row["peak_gib"] == 4.0
    assert table.row(variant, plan.OURS, model, passes, "", "unknown")["mfu"] is None
    lost = table.row(variant, plan.THEIRS, model, [], "why", H100)
    assert (lost["tokens_per_s"], lost["mfu"], lost["not run"]) == (None, None, "why")


def test_table(load: Any) -> None:
    plan, table = load("_training_plan"), load("_training_table")
    model, variant = plan.MODELS["BERT-base"], plan.VARIANTS[0]
    made = {plan.OURS: [0.1, 0.2], plan.THEIRS: [0.2, 0.2], plan.AGAIN: [0.1, 0.1]}
    rows = [
        table.row(variant, who, model, [{"steps": [s], "peak_gib": 2.0} for s in steps], "", H100)
        for who, steps in made.items()
    ]
    rows += [table.row(plan.VARIANTS[1], who, model, [], "out of memory", H100) for who in (plan.OURS, plan.THEIRS)]
    text = table.markdown([{"model": "BERT-base", **row} for row in rows], "heading")
    assert "| bf16 | 54,613 | 40,960 | 2.9% | 2.2% | 2.00 | 2.00 | 1.333 (1.000–2.000) |" in text
    assert "| fp32 | - | - | - | - | - | - |  |" in text
    assert "A/A, bf16, ours again over ours: 1.500 (1.000–2.000)." in text
    assert "- fp32, HF Trainer: out of memory" in text


# ---- the clock


def test_clock_waits_at_the_ends_of_segments_alone(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = load("_training_worker")
    now, waits = [0.0], []
    monkeypatch.setattr(worker.time, "perf_counter", lambda: now[0])
    clock = worker.Clock("cpu", 3, 1.0, until=float("inf"))
    clock._wait = lambda: waits.append(now[0])
    steps = 0
    while True:
        steps += 1
        now[0] += 10.0 if steps == 1 else 0.25  # the first one compiles
        if clock():
            break
    assert clock.warmup == pytest.approx(11.0)
    assert clock.steps == pytest.approx([0.25, 0.25, 0.25])
    assert steps == 5 + 2 + 3 * 4
    assert waits == pytest.approx([11.0, 11.5, 12.5, 13.5, 14.5])


def test_clock_ends_when_there_is_no_more_time(load: Any) -> None:
    clock = load("_training_worker").Clock("cpu", 3, 1.0, until=0.0)
    assert [clock() for _ in range(5)] == [False] * 4 + [True]
    assert clock.steps == []


# ---- processes


def script(*options: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / "training.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, done.stderr
    return done


def test_help_and_plan(tmp_path: Path) -> None:
    assert "--dry" in script("--help").stdout
    plan = script("--dry", "--results", str(tmp_path / "results")).stdout
    assert "2 models, 12 variants, at most 5 rounds, 450 s in all" in plan
    assert "BERT-base: 64 rows of 128 tokens, N = 84.9 million, 0.524 GFLOPs a token, 0.37 over a frozen base" in plan
    assert "Llama-1B: 4 rows of 1024 tokens, N = 1235.7 million, 7.62 GFLOPs a token" in plan
    ours, theirs, again = "bf16: lightning_ft", "bf16: HF Trainer", "bf16: lightning_ft (again)"
    assert [line.strip() for line in plan.splitlines()[4:7]] == [ours, theirs, again]
    for text in ("fp32", "tf32", "fp16", "8-bit AdamW", "int8 + LoRA", "QLoRA", "flash-attn 2", "torch.compile"):
        assert f"{text}: HF Trainer" in plan or f"({text}): HF Trainer" in plan
    assert not (tmp_path / "results").exists()
    assert "nothing to run: --models of ['BERT-base', 'Llama-1B']" in script("--models", "T5", check=False).stderr


def options(device: str = "cuda", **others: Any) -> Namespace:
    return Namespace(device=device, rounds=2, quick=True, **others)


def test_a_process_that_dies_is_begun_anew_without_its_contestant(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    training, plan = load("training"), load("_training_plan")
    good = {"steps": [0.1], "peak_gib": 1.0}
    given: list[list[int]] = []
    told = [
        [
            {"begins": 0},
            {"contestant": 0, **good},
            {"begins": 1},
            {"contestant": 1, "error": "no such module"},
            {"begins": 2},
            {"ended": "Segmentation fault"},
        ],
        [{"begins": 0}, {"contestant": 0, **good}, {"begins": 3}, {"contestant": 3, **good}],
    ]

    def lines(settings: dict[str, Any], until: float) -> Iterator[dict[str, Any]]:
        given.append([number for number, *_ in settings["contestants"]])
        return iter(told[len(given) - 1])

    monkeypatch.setattr(training, "_lines", lines)
    model, variants = plan.QUICK["tiny BERT"], list(plan.VARIANTS[:2])
    rows = training._run("tiny BERT", model, variants, options(), 0.0, H100)
    assert given == [[0, 1, 2, 3, 4], [0, 3, 4]]
    assert [len(row.get("passes", [])) for row in rows] == [2, 0, 0, 1, 0]
    reasons = ["", "no such module", "Segmentation fault", "", "left out: no time"]
    assert [row["not run"] for row in rows] == reasons


def test_what_needs_a_gpu_is_said_by_name(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    training, plan = load("training"), load("_training_plan")
    monkeypatch.setattr(training, "_lines", lambda settings, until: iter([{"ended": "it did not begin"}]))
    model = plan.QUICK["tiny BERT"]
    rows = training._run("tiny BERT", model, list(plan.VARIANTS), options("cpu"), 0.0, "")
    skipped = {row["variant"] for row in rows if row["not run"] == "not run: it needs a GPU"}
    assert skipped == {"tf32", "fp16", "bf16, PyTorch's flash attention", "bf16, flash-attn 2"}
    assert {row["not run"] for row in rows if row["variant"] not in skipped} == {"it did not begin"}


def run_all(tmp_path: Path, device: str, *more: str) -> dict[tuple[str, str, str], dict[str, Any]]:
    script("--quick", "--device", device, "--rounds", "1", "--results", str(tmp_path), *more)
    assert "**tiny BERT**" in (tmp_path / "training.md").read_text(encoding="utf-8")
    content = json.loads((tmp_path / "training.json").read_text(encoding="utf-8"))
    assert "torch" in content["machine"]
    return {(row["model"], row["variant"], row["trainer"]): row for row in content["rows"]}


@pytest.mark.slow
def test_all_that_needs_no_gpu_runs(tmp_path: Path) -> None:
    rows = run_all(tmp_path, "cpu", "--seconds", "500")
    assert len(rows) == 2 * 25
    needs_gpu = {"tf32", "fp16", "bf16, PyTorch's flash attention", "bf16, flash-attn 2"}
    for (_, variant, _), row in rows.items():
        if variant in needs_gpu:
            assert row["not run"] == "not run: it needs a GPU"
        else:
            assert row["not run"] == ""
            assert len(row["passes"][0]["steps"]) == 2
            assert row["tokens_per_s"] > 0
    for (model, variant, trainer), row in rows.items():
        if trainer == "HF Trainer" and not row["not run"]:
            (ours,), (theirs,) = rows[model, variant, "lightning_ft"]["passes"], row["passes"]
            assert ours["trained"] == theirs["trained"]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = script("--results", str(tmp_path / "results"), check=False)
    assert done.returncode == 1
    assert "no GPU, or a PyTorch without CUDA; --dry says what would be run" in done.stderr
    assert not (tmp_path / "results").exists()


@pytest.mark.gpu
def test_everything_runs_on_a_gpu(tmp_path: Path) -> None:
    rows = run_all(tmp_path, "cuda", "--seconds", "500")
    lost = {row["not run"] for (_, variant, _), row in rows.items() if variant != "bf16, flash-attn 2"}
    assert lost == {""}
    assert all(row["peak_gib"] > 0 for row in rows.values() if not row["not run"])
    assert all(row["passes"][0]["held_before_gib"] < 0.1 for row in rows.values() if not row["not run"])
