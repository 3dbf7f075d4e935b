"""``lightning-ft fisher``: the file that EWC takes, from a checkpoint and its data, in one process or two."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy

from lightning_ft.cli import FineTuningTrainer
from lightning_ft.core.fisher import Fisher
from lightning_ft.data import ClassificationData
from lightning_ft.fisher_pass import fisher_of_task
from lightning_ft.functional.fisher import fisher_diagonal
from lightning_ft.modules import SequenceClassification, load_checkpoint
from tests.functional.test_fisher import assert_same
from tests.ranks import RANKS, run_ranks
from tests.test_cli import lightning_ft, project

__all__ = ["project"]
QUIET = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)


@pytest.fixture
def trained(project: Path) -> Path:
    lightning_ft(project, "fit", "--config", "config.yaml", "--trainer.max_epochs", "1")
    return project / "runs" / "run_0" / "checkpoints" / "last.ckpt"


def test_the_command_writes_what_the_function_computes(project: Path, trained: Path) -> None:
    command = ("fisher", "--config", "config.yaml", "--ckpt_path", "last")
    output = lightning_ft(project, *command, "--out", "f/fisher.safetensors", "--trainer.enable_progress_bar", "true")
    assert "Fisher information" in output
    assert "batches: whole" in output
    assert "100%" in output
    found = Fisher.load(project / "f" / "fisher.safetensors")
    # All rows: a training sampler repeats some of them only where there are several processes.
    assert (found.examples, found.variant) == (75, "exact")
    assert not any("classifier" in name for name in found.tensors)

    module = SequenceClassification.load_from_checkpoint(trained)
    data = ClassificationData(project / "model", train=project / "train.jsonl", batch_size=32)
    data.setup("fit")
    names = [name for name, _ in module.named_parameters() if "classifier" not in name]
    expected = fisher_diagonal(module, data.train_dataloader(), parameters=names)
    assert found.weights == pytest.approx(expected.weights)
    assert_same(found.tensors, expected.tensors, 1e-4)
    assert f"trace: {found.trace():.4g}" in output
    assert [path.name for path in (project / "runs").iterdir()] == ["run_0"]

    # One more task, of drawn labels: refused before any work; of the same variant: added.
    again = (*command, "--previous", "f/fisher.safetensors", "--gamma", "0.5", "--limit", "10", "--split", "val")
    output = lightning_ft(project, *again, "--variant", "sampled", code=1)
    assert "cannot be added to variant='exact'" in output
    output = lightning_ft(project, *again, "--out", "f/both.safetensors")
    both = Fisher.load(project / "f" / "both.safetensors")
    assert (both.examples, both.gammas) == (85, (0.5,))
    assert both.trace() > 0.5 * found.trace()
    assert "earlier tasks times: 0.5" in output

    # The next task's fit: it starts from the old task's model, and refuses to start from another one.
    load_checkpoint(trained).save_pretrained(project / "old")
    settings = {"strength": "0.1", "normalize": "true", "fisher": "f/fisher.safetensors", "storage": "disk"}
    ewc = [f"--trainer.callbacks.{name}={value}" for name, value in settings.items()]
    fit = ("fit", "--config", "config.yaml", "--trainer.max_epochs", "1", "--trainer.callbacks+=EWC", *ewc)
    assert "the Fisher information was computed at other weights" in lightning_ft(project, *fit, code=1)
    output = lightning_ft(project, *fit, "--model.pretrained", "old")
    assert "EWC: exact Fisher information of 75 examples" in output
    assert "total contraction" in output
    assert sorted(path.name for path in (project / "f").iterdir()) == ["both.safetensors", "fisher.safetensors"]


def parts(folder: Path, **options: Any) -> tuple[SequenceClassification, ClassificationData]:
    torch.manual_seed(0)
    module = SequenceClassification(folder / "model", labels=["negative", "positive"])
    files = {name: folder / f"{name}.jsonl" for name in ("train", "val")}
    return module, ClassificationData(folder / "model", **files, batch_size=4, **options)


def on_each_rank() -> dict[str, Any]:
    """The validation rows, 20, of which each of two processes has ten."""
    warnings.filterwarnings("ignore", message="without --ckpt_path")
    folder = Path(os.environ["FISHER_PROJECT"])
    module, data = parts(folder)
    ddp = DDPStrategy(process_group_backend="gloo")
    trainer = FineTuningTrainer(accelerator="cpu", strategy=ddp, devices=RANKS, **QUIET)
    report = fisher_of_task(
        trainer, model := module, data, folder / "ranks.safetensors", split="val", limit=None, head=True
    )
    return {"examples": report.facts["examples"], "trace": report.facts["trace"], "training": model.training}


@pytest.mark.filterwarnings("ignore:.*without --ckpt_path")
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch with gloo")
def test_two_processes_give_what_one_gives(
    project: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, data = parts(project)
    trainer = Trainer(accelerator="cpu", **QUIET)
    report = fisher_of_task(trainer, module, data, project / "one.safetensors", split="val", limit=None, head=True)
    assert report.facts["examples"] == 20
    assert {row["group"] for row in report.rows} >= {"embeddings", "block.0", "head"}
    assert sum(row["share %"] for row in report.rows) == pytest.approx(100, abs=0.5)
    monkeypatch.setenv("FISHER_PROJECT", str(project))
    ranks = run_ranks(f"{__name__}:on_each_rank", tmp_path_factory.mktemp("ranks"))
    assert [rank["examples"] for rank in ranks] == [20, 20]
    one, two = (Fisher.load(project / f"{name}.safetensors") for name in ("one", "ranks"))
    assert_same(two.tensors, one.tensors, 1e-4)


def test_a_new_head_and_no_data_are_told(project: Path) -> None:
    module, data = parts(project)
    with pytest.warns(UserWarning, match=r"without --ckpt_path.*a new head"):
        fisher_of_task(Trainer(accelerator="cpu", **QUIET), module, data, project / "f.safetensors", limit=6)
    assert Fisher.load(project / "f.safetensors").examples == 6
    with pytest.raises(ValueError, match="the Fisher information is one of data"):
        fisher_of_task(Trainer(accelerator="cpu", **QUIET), module, None, "f.safetensors")  # type: ignore[arg-type]
    with (
        pytest.raises(ValueError, match="split='test' must be one of train, val"),
        pytest.warns(UserWarning, match="without --ckpt_path"),
    ):
        fisher_of_task(Trainer(accelerator="cpu", **QUIET), module, data, "f", split="test")  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.*without --ckpt_path")
def test_an_interrupted_pass_leaves_the_old_file(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, data = parts(project)
    out = project / "f" / "fisher.safetensors"
    fisher_of_task(Trainer(accelerator="cpu", **QUIET), module, data, out, limit=6)
    before = out.read_bytes()

    def interrupted(*args: Any) -> Any:
        raise RuntimeError("the machine is gone")

    monkeypatch.setattr(SequenceClassification, "likelihood", interrupted)
    with pytest.raises(RuntimeError, match="the machine is gone"):
        fisher_of_task(Trainer(accelerator="cpu", **QUIET), module, data, out)
    assert out.read_bytes() == before
    assert list(out.parent.iterdir()) == [out]
    shutil.rmtree(out.parent)
