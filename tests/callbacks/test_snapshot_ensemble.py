from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from lightning.pytorch import Callback
from safetensors.torch import load_file

from lightning_ft.callbacks import ExactResume, GradualUnfreezing
from lightning_ft.callbacks.snapshot_ensemble import SnapshotEnsemble
from lightning_ft.modules import Architecture, SequenceClassification
from tests.callbacks.test_exact_resume import Kill, Killed, options
from tests.strangers import FILTERED, STRANGERS, Filtered, Stranger, dataset, identical, outcome, weights
from tests.tiny import BERT

STRANGER = {stranger.name: stranger for stranger in STRANGERS}
each_stranger = pytest.mark.parametrize("stranger", STRANGERS, ids=lambda stranger: stranger.name)


class Steps(Callback):
    """The weights after each optimiser step."""

    def __init__(self) -> None:
        self.seen: dict[int, dict[str, Any]] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.seen.setdefault(trainer.global_step, weights(pl_module))


def answers(module: Any, states: list[dict[str, Any]]) -> Any:
    """The oracle: mean probabilities, each member loaded into the module."""
    tokens, _ = dataset().tensors
    before, results = weights(module), []
    module.eval()
    for state in states:
        module.load_state_dict(state)
        with torch.no_grad():
            results.append(module(tokens).double().softmax(-1))
    module.load_state_dict(before)
    return torch.stack(results).mean(0)


def score(stranger: Stranger, callback: Callback, module: Any, **options: Any) -> float:
    (result,) = stranger.trainer([callback], **options).test(module, verbose=False)
    return result["test_loss"]


@each_stranger
@pytest.mark.parametrize("last", [None, 2])
def test_the_mean_probability_of_the_last_members_answers(stranger: Stranger, last: int | None, tmp_path: Path) -> None:
    steps = Steps()
    every = {"every": "0.5 epochs"} if stranger.name == "manual" else {}
    callback = SnapshotEnsemble(4, last=last, **every)
    trainer = stranger.fit(steps, callback, default_root_dir=tmp_path)
    module = trainer.lightning_module
    ends = [2, 3, 5, 6] if stranger.name == "manual" else [3, 6, 9, 12]
    before, training = weights(module), module.training
    expected = answers(module, [steps.seen[step] for step in ends][-(last or 4) :])
    module.train(training)
    loss = F.nll_loss(expected.log(), dataset().tensors[1])
    assert score(stranger, callback, module) == pytest.approx(float(loss), rel=1e-5)
    assert identical(weights(module), before)
    assert "forward" not in vars(module)
    # A new callback finds the folder.
    assert score(stranger, SnapshotEnsemble(last=last), module, default_root_dir=tmp_path) == pytest.approx(float(loss))


def test_members_are_exact_and_hold_what_changed_alone(tmp_path: Path) -> None:
    steps, module = Steps(), Filtered()
    module.encoder.requires_grad_(False)
    FILTERED.fit(steps, SnapshotEnsemble(4, dirpath=tmp_path), module=module)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "base.safetensors",
        *(f"cycle_00{i}.safetensors" for i in (1, 2, 3, 4)),
    ]
    for i in (1, 2, 3, 4):
        member = load_file(tmp_path / f"cycle_00{i}.safetensors")
        assert sorted(member) == ["classifier.bias", "classifier.weight"]
        assert identical(member, {name: steps.seen[3 * i][name] for name in member})


def test_a_layer_that_begins_to_train_later_is_the_pretrained_one_in_earlier_members(tmp_path: Path) -> None:
    steps, callback = Steps(), SnapshotEnsemble(4, dirpath=tmp_path)
    trainer = FILTERED.fit(steps, GradualUnfreezing("3 steps"), callback)
    module = trainer.lightning_module
    expected = answers(module, [steps.seen[step] for step in (3, 6, 9, 12)])
    module.train()
    loss = F.nll_loss(expected.log(), dataset().tensors[1])
    assert score(FILTERED, callback, module) == pytest.approx(float(loss), rel=1e-5)
    assert len(load_file(tmp_path / "cycle_001.safetensors")) < len(load_file(tmp_path / "cycle_004.safetensors"))


def test_number_of_members(tmp_path: Path) -> None:
    def members(name: str, callback: SnapshotEnsemble, **settings: Any) -> list[int]:
        steps = Steps()
        callback.dirpath = tmp_path / name
        FILTERED.fit(steps, callback, **settings)
        return [
            next(step for step, state in steps.seen.items() if identical({n: state[n] for n in member}, member))
            for path in sorted((tmp_path / name).glob("cycle*"))
            if (member := load_file(path))
        ]

    assert members("short", SnapshotEnsemble(4), max_epochs=-1, max_steps=11) == [3, 6, 9, 11]
    assert members("accumulated", SnapshotEnsemble(2), accumulate_grad_batches=4) == [2, 4]
    assert members("every", SnapshotEnsemble(every="5 steps")) == [5, 10]
    assert members("epochs", SnapshotEnsemble(every="1 epoch"), max_epochs=3) == [6, 12, 18]


@each_stranger
@pytest.mark.parametrize(("hook", "batch"), [("on_after_backward", 3), ("on_train_batch_end", 5)])
def test_resume_is_exact(stranger: Stranger, hook: str, batch: int, tmp_path: Path) -> None:
    def callbacks(folder: Path) -> list[Callback]:
        exact = ExactResume("1 steps", dirpath=folder)
        return [exact, GradualUnfreezing("2 steps"), SnapshotEnsemble(every="2 steps", dirpath=folder / "members")]

    settings = options(stranger, tmp_path)
    whole = outcome(stranger.fit(*callbacks(tmp_path / "whole"), **settings))
    with pytest.raises(Killed):
        stranger.fit(*callbacks(tmp_path), Kill(hook, 1, batch), **settings)
    trainer = stranger.fit(*callbacks(tmp_path), **settings, ckpt_path=tmp_path / "last.ckpt")
    assert identical(outcome(trainer), whole)
    names = sorted(path.name for path in (tmp_path / "members").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "whole" / "members").iterdir())
    for name in names:
        pair = [load_file(folder / "members" / name) for folder in (tmp_path, tmp_path / "whole")]
        assert identical(*pair)


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
def test_a_checkpoint_names_its_members(tmp_path: Path) -> None:
    callback = SnapshotEnsemble(4, last=2, dirpath=tmp_path)
    trainer = FILTERED.fit(callback)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    expected = score(FILTERED, callback, trainer.lightning_module)
    tester = FILTERED.trainer([SnapshotEnsemble(last=2)])
    (result,) = tester.test(FILTERED.module(), ckpt_path=tmp_path / "run.ckpt", verbose=False)
    assert result["test_loss"] == pytest.approx(expected)
    assert expected != pytest.approx(score(FILTERED, Callback(), trainer.lightning_module))


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
@pytest.mark.parametrize("problem", ["single_label", "multi_label", "regression"])
def test_our_heads_predict_the_mean_probability(problem: Any, tmp_path: Path) -> None:
    labels = {} if problem == "regression" else {"num_labels": 3}
    module = SequenceClassification(
        Architecture(hf.BertConfig(**BERT)), problem=problem, learning_rate=1e-2, schedule="constant", **labels
    )
    ids = torch.randint(1, 50, (12, 5))
    target = {
        "single_label": torch.arange(12) % 3,
        "multi_label": (ids[:, :3] > 20).float(),
        "regression": ids[:, 0] / 50,
    }
    rows = [{"input_ids": ids[i], "labels": target[problem][i]} for i in range(12)]
    loader = torch.utils.data.DataLoader(rows, batch_size=4)
    steps, callback = Steps(), SnapshotEnsemble(3, answer=problem, dirpath=tmp_path)
    trainer = FILTERED.trainer([steps, callback], limit_val_batches=0)
    trainer.fit(module, loader)
    columns = trainer.predict(module, loader)
    module.eval()
    expected = []
    for step in (2, 4, 6):
        module.load_state_dict(steps.seen[step])
        with torch.no_grad():
            expected.append(module.probabilities(module({"input_ids": ids})))
    key = "score" if problem == "regression" else "probabilities"
    found = torch.tensor([value for batch in columns for value in batch[key]])
    torch.testing.assert_close(found, torch.stack(expected).mean(0), rtol=1e-5, atol=1e-6)


class Inside(Filtered):
    """Its steps call the parts, and not its own forward."""

    def loss(self, batch: Any) -> Any:
        return F.cross_entropy(self.classifier(self.encoder(batch[0])[:, 0]), batch[1])


def test_a_step_that_does_not_call_forward_is_told_and_its_module_can_be_named(tmp_path: Path) -> None:
    module, steps = Inside(), Steps()
    callback = SnapshotEnsemble(4, dirpath=tmp_path)
    FILTERED.fit(steps, callback, module=module)
    with pytest.raises(ValueError, match=r"test_step never called forward of the LightningModule.*through="):
        score(FILTERED, callback, module)
    callback = SnapshotEnsemble(dirpath=tmp_path, through="classifier")
    # Each member's classifier on the module's own encoder: what was asked for.
    assert score(FILTERED, callback, module) > 0
    assert "forward" not in vars(module.classifier)


def test_refusals(tmp_path: Path) -> None:
    for arguments, message in (
        ({"cycles": 0}, "cycles=0 must be a whole number"),
        ({"last": 0}, "last=0 must be a number of members"),
        ({"answer": "logits"}, "answer='logits' must be"),
        ({"every": 3}, "every=3 has no unit"),
    ):
        with pytest.raises(ValueError, match=message):
            SnapshotEnsemble(**arguments)
    with pytest.raises(ValueError, match=r'cycles=5 are shares .* every="500 steps"'):
        STRANGER["manual"].fit(SnapshotEnsemble(dirpath=tmp_path / "manual"))

    FILTERED.fit(SnapshotEnsemble(4, dirpath=tmp_path))
    trainer = FILTERED.fit(SnapshotEnsemble(2, dirpath=tmp_path))
    assert len(list(tmp_path.glob("cycle_*"))) == 2  # the earlier run's are no members of this one
    with pytest.raises(ValueError, match=r"the module has no .* it is not a member's module"):
        score(STRANGER["late"], SnapshotEnsemble(dirpath=tmp_path), STRANGER["late"].module())
    (tmp_path / "base.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"base.safetensors of the ensemble is gone"):
        score(FILTERED, SnapshotEnsemble(dirpath=tmp_path), trainer.lightning_module)
