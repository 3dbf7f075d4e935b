"""Recipes compose with every example, with each other and with the user's own callbacks, and train."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
import yaml

from lightning_ft import cli
from lightning_ft.cli import recipe
from tests.pretrained import pretrained

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.yaml"))
ADDED = {
    "few_sample": "StabilityMonitor",
    "lp_ft": "LPFT",
    "mixout": "Mixout",
    "r3f": "R3F",
    "reinit": "LayerReinit",
}
"""The callback that each recipe adds."""


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """The configuration that these arguments make."""
    with pytest.raises(SystemExit) as done:
        cli.run(["fit", *arguments, "--print_config"])
    assert done.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def files(*names: str) -> list[str]:
    return [argument for name in names for argument in ("--config", str(ROOT / f"{name}.yaml"))]


def names_of(config: dict[str, Any]) -> list[str]:
    return [callback["class_path"].rpartition(".")[2] for callback in config["trainer"]["callbacks"]]


def test_every_recipe_is_tested() -> None:
    assert set(RECIPES) == set(ADDED)


@pytest.mark.parametrize("name", RECIPES)
def test_tells_what_it_is_for_what_it_costs_and_where_it_is_from(name: str) -> None:
    header = (ROOT / "recipes" / f"{name}.yaml").read_text(encoding="utf-8").split("\n\n")[0]
    assert all(f"# {word}: " in header for word in ("For", "Costs", "Source"))
    assert f"--config recipes/{name}.yaml" in header


@pytest.mark.filterwarnings("ignore:`loftq_config`")
@pytest.mark.parametrize(
    "example", [pytest.param(name, marks=[] if name == "pairs" else pytest.mark.slow) for name in EXAMPLES]
)
def test_adds_to_the_callbacks_of_every_example(example: str, capsys: pytest.CaptureFixture[str]) -> None:
    recipes = [name for name in RECIPES if name != "few_sample" or example != "multi_task"]
    before = yaml.safe_load((ROOT / "examples" / f"{example}.yaml").read_text(encoding="utf-8"))
    config = printed(capsys, *files(f"examples/{example}", *(f"recipes/{name}" for name in recipes)))
    assert names_of(config) == [*names_of(before), *(ADDED[name] for name in recipes)]
    monitors = [callback["init_args"].get("monitor") for callback in config["trainer"]["callbacks"]]
    assert any(monitors), "there is no best dev checkpoint"
    if "few_sample" in recipes:
        assert config["optimizer"]["init_args"].items() >= {"lr": 2e-5, "eps": 1e-6, "weight_decay": 0.01}.items()
        assert config["lr_scheduler"]["init_args"].items() >= {"shape": "linear", "warmup": 0.1}.items()
        assert config["data"]["init_args"]["batch_size"] == 16
        assert (config["trainer"]["max_epochs"], config["trainer"]["gradient_clip_val"]) == (20, 1.0)


@pytest.mark.filterwarnings("ignore:`loftq_config`")
def test_takes_further_callbacks_and_values_of_the_user(capsys: pytest.CaptureFixture[str]) -> None:
    recipes = files("examples/mlm", "recipes/reinit", "recipes/few_sample")
    config = printed(capsys, *recipes, "--trainer.callbacks+=EMA", "--optimizer.init_args.lr=1e-4")
    assert names_of(config)[-3:] == ["LayerReinit", "StabilityMonitor", "EMA"]
    assert config["optimizer"]["init_args"]["lr"] == 1e-4


def test_comes_with_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = Path(recipe("recipes/reinit.yaml"))
    assert found.samefile(ROOT / "recipes" / "reinit.yaml")
    assert recipe("recipes/nothing.yaml") == "recipes/nothing.yaml"
    assert recipe("other/reinit.yaml") == "other/reinit.yaml"
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "reinit.yaml").write_text("{}")
    assert recipe("recipes/reinit.yaml") == "recipes/reinit.yaml"


@pytest.mark.filterwarnings("ignore:.*will be overridden by `FineTuningCLI")
def test_trains_from_a_folder_without_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": f"{'good' if i % 2 else 'bad'} film {i}", "label": i % 2} for i in range(32)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = {
        "model": {
            "class_path": "SequenceClassification",
            "init_args": {"pretrained": pretrained(tmp_path / "m", "bert", hf.AutoModelForSequenceClassification)},
        },
        "data": {
            "class_path": "ClassificationData",
            "init_args": {"train": "rows.jsonl", "val": "rows.jsonl", "labels": ["0", "1"]},
        },
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "logger": False},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lightning-ft"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of calls that Lightning makes
    spellings = ("--config {}", "--config={}", "-c {}")
    pairs = zip(RECIPES, itertools.cycle(spellings), strict=False)
    recipes = [part for name, spelling in pairs for part in spelling.format(f"recipes/{name}.yaml").split()]
    fitted = cli.run(["fit", "--config", "config.yaml", *recipes, "--trainer.max_epochs=2"])
    assert fitted.trainer.global_step == 4
    assert set(ADDED.values()) <= {type(callback).__name__ for callback in fitted.trainer.callbacks}
    optimizer = fitted.trainer.optimizers[0]
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]
    assert all(group["eps"] == 1e-6 for group in optimizer.param_groups)
    assert all(group["lr"] == 0 for group in optimizer.param_groups), "the decay ends at 0"
