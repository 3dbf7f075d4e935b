from __future__ import annotations

import csv
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_ft.callbacks.exact_resume import ExactResume
from lightning_ft.callbacks.freeze import Freeze
from lightning_ft.callbacks.lp_ft import LPFT
from tests.callbacks import test_contract as contract
from tests.ranks import run_ranks
from tests.strangers import (
    BATCH,
    BATCHES,
    FILTERED,
    ROWS,
    STRANGERS,
    Filtered,
    Stranger,
    dataset,
    identical,
    outcome,
    weights,
)

HEAD = {"filtered": "classifier", "late": "bert.classifier", "head-first": "verdict.2"}
each_stranger = pytest.mark.parametrize("stranger", STRANGERS, ids=lambda stranger: stranger.name)


def probe(stranger: Stranger = FILTERED, **arguments: Any) -> LPFT:
    """With few penalties: the paper's grid is tested with the function."""
    head = "verdict.2" if stranger.name == "head-first" else None
    return LPFT(**{"labels": 1, "head": head, "penalties": [0.01, 1.0], **arguments})


class AtStart(Callback):
    """The module as training finds it. Listed behind the callback that it watches."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.weights = weights(pl_module)
        self.training = {name for name, m in pl_module.named_modules() if m.training}
        self.flags = [p.requires_grad for p in pl_module.parameters()]
        self.random = (torch.get_rng_state(), np.random.get_state()[1].tolist())


def features(module: Any, path: str, tokens: Tensor) -> Tensor:
    """What enters the layer in a forward pass in eval mode: the oracle's own way to see it."""
    found: list[Tensor] = []
    handle = module.get_submodule(path).register_forward_hook(lambda m, args, out: found.append(args[0]))
    module.eval()
    with torch.no_grad():
        module(tokens)
    handle.remove()
    return found[0].double()


@each_stranger
def test_training_starts_with_the_head_that_scikit_learn_fits(stranger: Stranger) -> None:
    untouched, plain = stranger.fit(max_epochs=0).lightning_module, AtStart()
    stranger.fit(plain)
    start, callback = AtStart(), probe(stranger)
    trainer = stranger.fit(callback, start)

    path = HEAD.get(stranger.name, "classifier")
    layer = f"{path}.weight", f"{path}.bias"
    changed = {name for name in start.weights if not start.weights[name].equal(plain.weights[name])}
    assert changed == set(layer)
    assert (start.training, start.flags) == (plain.training, plain.flags)
    assert identical(start.random, plain.random)

    tokens, labels = dataset().tensors
    x = features(untouched, path, tokens)
    scaler = StandardScaler().fit(x)
    assert callback.report is not None
    model = LogisticRegression(C=callback.report.facts["C"], max_iter=1000).fit(scaler.transform(x), labels)
    logits = x @ start.weights[layer[0]].double().T + start.weights[layer[1]].double()
    expected = torch.from_numpy(model.decision_function(scaler.transform(x)))
    torch.testing.assert_close(logits[:, 1] - logits[:, 0], expected, rtol=0, atol=1e-2)
    torch.testing.assert_close(logits[:, 0], -logits[:, 1], rtol=0, atol=1e-4)
    assert callback.report.facts["train score"] == pytest.approx(model.score(scaler.transform(x), labels))

    # Then everything trains.
    moved = weights(trainer.lightning_module)
    assert all(not tensor.equal(start.weights[name]) for name, tensor in moved.items() if name in changed)
    assert sum(not tensor.equal(start.weights[name]) for name, tensor in moved.items()) > len(moved) / 2


@each_stranger
def test_contract(stranger: Stranger, tmp_path: Path) -> None:
    make = partial(probe, stranger)
    contract.test_trains_releases_everything_and_keeps_its_state(stranger, make, tmp_path)
    contract.test_releases_everything_after_an_exception(stranger, make, tmp_path)
    contract.test_validation_and_test_change_nothing(stranger, make, tmp_path)
    contract.test_second_fit_owes_nothing_to_the_first(stranger, make, tmp_path)


class Seen(Callback):
    """Batches of training, and a random number drawn in each."""

    def __init__(self) -> None:
        self.batches: list[Tensor] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches += [batch[0].clone(), torch.rand(3), torch.from_numpy(np.random.rand(3))]


def noisy_collate(rows: Any) -> list[Tensor]:
    tokens, labels = zip(*rows, strict=True)
    return [torch.stack(tokens) + (torch.rand(()) * 0).long(), torch.stack(labels)]


@pytest.mark.parametrize(
    "options",
    [
        {"shuffle": True},
        {"shuffle": True, "collate_fn": noisy_collate},
        {"shuffle": True, "generator": 5},
        {"shuffle": True, "num_workers": 1, "persistent_workers": True},
    ],
    ids=["shuffled", "random collation", "own generator", "persistent workers"],
)
def test_batches_and_random_numbers_of_training_are_as_without_it(options: dict[str, Any]) -> None:
    class Plain(Filtered):
        def train_dataloader(self) -> Any:
            own = {"generator": torch.Generator().manual_seed(5)} if "generator" in options else {}
            return DataLoader(dataset(), BATCH, **{**options, **own})

    def run(*callbacks: Any) -> list[Tensor]:
        seen = Seen()
        np.random.seed(0)
        FILTERED.fit(*callbacks, seen, module=Plain(), max_epochs=1 if "num_workers" in options else 2)
        return seen.batches

    assert identical(run(probe()), run())


def test_a_loader_that_can_be_resumed_stands_where_it_stood(tmp_path: Path) -> None:
    seen, plain = Seen(), Seen()
    FILTERED.fit(ExactResume(dirpath=tmp_path / "a"), probe(), seen)
    FILTERED.fit(ExactResume(dirpath=tmp_path / "b"), plain)
    assert identical(seen.batches, plain.batches)


class Stop(Callback):
    def __init__(self, epoch: int, batch: int) -> None:
        self.at = (epoch, batch)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if (trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_progress.current.ready - 1) == self.at:
            raise KeyError


@pytest.mark.parametrize("at", [(0, 0), (0, 3), (1, BATCHES - 1)])
def test_resumed_run_is_not_probed_again_and_ends_as_the_uninterrupted(at: tuple[int, int], tmp_path: Path) -> None:
    options = {"accumulate_grad_batches": 2, "val_check_interval": 3}
    whole = outcome(FILTERED.fit(ExactResume("1 steps", dirpath=tmp_path / "whole"), probe(), **options))
    with pytest.raises(KeyError):
        FILTERED.fit(ExactResume("1 steps", dirpath=tmp_path), probe(), Stop(*at), **options)
    callback = probe()
    resumed = FILTERED.fit(
        ExactResume("1 steps", dirpath=tmp_path), callback, ckpt_path=tmp_path / "last.ckpt", **options
    )
    assert callback.report is None
    assert identical(outcome(resumed), whole)


def test_a_run_that_goes_on_keeps_its_head(tmp_path: Path) -> None:
    callback = probe()
    trainer = FILTERED.fit(callback, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    start = AtStart()
    trainer.callbacks.append(start)
    before = weights(trainer.lightning_module)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(trainer.lightning_module)
    assert identical(start.weights, before)

    # A checkpoint written without this callback has steps behind it all the same.
    FILTERED.fit(max_epochs=1).save_checkpoint(tmp_path / "plain.ckpt")
    other = probe()
    FILTERED.fit(other, ckpt_path=tmp_path / "plain.ckpt")
    assert other.report is None


@pytest.mark.parametrize("options", [{"limit_val_batches": 0}, {}], ids=["none", "held out"])
def test_penalty_is_chosen_on_validation_rows_or_on_held_out_ones(options: dict[str, Any]) -> None:
    callback = probe()
    FILTERED.fit(callback, **options)
    assert callback.report is not None
    assert callback.report.facts["validation rows"] == ("a fifth of them" if options else ROWS)


def test_validation_loader_is_used_though_its_first_epoch_comes_later() -> None:
    callback = probe()
    FILTERED.fit(callback, check_val_every_n_epoch=2, num_sanity_val_steps=0, limit_val_batches=1)
    assert callback.report is not None
    assert callback.report.facts["validation rows"] == 12


def test_as_many_batches_as_asked_for() -> None:
    for callback, options in ((probe(batches=2), {}), (probe(), {"limit_train_batches": 2})):
        FILTERED.fit(callback, **options)
        assert callback.report is not None
        assert callback.report.facts["training rows"] == 2 * BATCH


def test_compiled_model_is_probed_and_compiles_afterwards() -> None:
    class Compiled(Filtered):
        def __init__(self) -> None:
            super().__init__(dropout=0)
            self.run = [torch.compile(super().forward, backend="eager")]

        def forward(self, tokens: Tensor) -> Tensor:
            return self.run[0](tokens)

    plain, compiled = AtStart(), AtStart()
    expected = FILTERED.fit(probe(), plain, module=Filtered(dropout=0))
    found = FILTERED.fit(probe(), compiled, module=Compiled())
    assert identical(compiled.weights, plain.weights)
    torch.testing.assert_close(weights(found.lightning_module), weights(expected.lightning_module), rtol=0, atol=1e-5)


def test_report_is_logged_and_the_module_logs_and_measures_nothing(tmp_path: Path) -> None:
    class Counting(Filtered):
        finished = 0

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.finished += 1
            return loss

    logger, module = CSVLogger(tmp_path), Counting()
    FILTERED.fit(probe(), module=module, logger=logger, log_every_n_steps=1, max_epochs=1)
    assert module.finished == BATCHES
    lines = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").read_text().splitlines()))
    (line,) = [line for line in lines if line["lp_ft/C"]]
    assert float(line["lp_ft/train"]) > 0.5 < float(line["lp_ft/val"])


# ---- two processes


def ddp() -> list[Any]:
    """For `run_ranks`: the head at the start of training, and all weights at its end."""

    class Module(Filtered):
        def __init__(self) -> None:
            super().__init__(dropout=0)

        def train_dataloader(self) -> Any:
            tokens, labels = dataset().tensors
            rank, world = self.trainer.global_rank, self.trainer.world_size
            return DataLoader(TensorDataset(tokens[rank::world], labels[rank::world]), BATCH // world)

        val_dataloader = train_dataloader

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.loss(batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def several() -> dict[str, Any]:
        return {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": 2} if "RANK" in os.environ else {}

    start, callback = AtStart(), probe()
    trainer = FILTERED.fit(callback, start, module=Module(), use_distributed_sampler=False, **several())
    assert callback.report is not None
    missing = LPFT(labels=lambda batch: batch[1] * 0)
    try:
        FILTERED.fit(missing, module=Module(), use_distributed_sampler=False, **several())
    except ValueError as error:
        message = str(error)
    return [start.weights, weights(trainer.lightning_module), dict(callback.report.facts), message]


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch with gloo")
def test_two_processes_fit_the_head_of_one(tmp_path: Path) -> None:
    (first, second), single = run_ranks("tests.callbacks.test_lp_ft:ddp", tmp_path), ddp()
    assert identical(first, second)
    assert first[2]["training rows"] == single[2]["training rows"] == ROWS
    assert first[3] == single[3]
    assert "labels must be of two classes or more" in first[3]
    for ours, expected in zip(first[:2], single[:2], strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-3)


# ---- what is refused


class Mappings(Filtered):
    def loss(self, batch: Any) -> Tensor:
        return super().loss([batch["ids"], batch["y"]])

    def train_dataloader(self) -> Any:
        return DataLoader([{"ids": x, "y": y} for x, y in dataset()], BATCH)

    val_dataloader = train_dataloader


def test_labels_are_a_key_a_position_or_a_function() -> None:
    starts = []
    for module, labels in (
        (Mappings(), "y"),
        (Mappings(), lambda b: b["y"].tolist()),
        (Filtered(), 1),
        (Filtered(), -1),
    ):
        start = AtStart()
        FILTERED.fit(probe(labels=labels), start, module=module, max_epochs=1)
        starts.append(start.weights)
    for other in starts[1:]:
        torch.testing.assert_close(other, starts[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (
            Filtered,
            {"labels": "labels"},
            "labels='labels' is not in the batches, which are lists of 2: name",
        ),
        (Filtered, {"labels": 2}, "labels=2 is not in the batches, which are lists of 2"),
        (
            Mappings,
            {"labels": "label"},
            "is not in the batches, which are mappings with the keys ids, y",
        ),
        (Filtered, {"labels": lambda batch: "no"}, "gave a str of no numbers"),
        (Filtered, {"labels": 0}, "labels must be classes from 0 to 1"),
        (
            Filtered,
            {"labels": lambda batch: batch[1][:2]},
            "what enters 'classifier' has the shape .* labels have",
        ),
        (Filtered, {"head": "verdict"}, r"head='verdict' must name one nn.Linear, and names 0; there are: .*8 to 2\)"),
        (Filtered, {"head": "linear1"}, "head='linear1' must name one nn.Linear, and names 3"),
        (Filtered, {"penalties": [-1.0]}, "must be values of C"),
    ],
)
def test_refuses_what_it_cannot_find(module: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FILTERED.fit(probe(**arguments), module=module())


def test_refuses_a_head_of_two_layers_with_its_candidates() -> None:
    with pytest.raises(ValueError, match=r"head= must name .* There are: verdict.0 \(8 to 8\), verdict.2 \(8 to 2\)"):
        STRANGERS[3].fit(LPFT(labels=1))


def test_refuses_a_frozen_head() -> None:
    with pytest.raises(ValueError, match="here the head has 0 tensors that train"):
        FILTERED.fit(Freeze(groups="head"), probe())


def test_layer_that_the_step_never_runs() -> None:
    class Unused(Filtered):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(8, 2)

    with pytest.raises(ValueError, match="training_step never ran 'spare': name the layer that gives the logits"):
        FILTERED.fit(probe(head="spare"), module=Unused())


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        rows = dataset()
        while True:
            yield from rows


def test_stream_needs_a_number_of_batches() -> None:
    class Stream(Filtered):
        def train_dataloader(self) -> Any:
            return DataLoader(Endless(), BATCH)

    with pytest.raises(ValueError, match="has no end that is known: say how many, batches="):
        FILTERED.fit(probe(), module=Stream(), max_steps=3)
    callback = probe(batches=3)
    FILTERED.fit(callback, module=Stream(), max_steps=3)
    assert callback.report is not None
    assert callback.report.facts["training rows"] == 3 * BATCH


def test_refuses_several_training_loaders() -> None:
    class Two(Filtered):
        def train_dataloader(self) -> Any:
            return {"a": super().train_dataloader(), "b": super().train_dataloader()}

    with pytest.raises(ValueError, match="LPFT needs one training data loader, and there are 2"):
        FILTERED.fit(probe(), module=Two())


def test_refuses_quantised_weights() -> None:
    class Packed(Filtered):
        def __init__(self) -> None:
            super().__init__()
            self.classifier.weight = nn.Parameter(torch.zeros(2, 8, dtype=torch.uint8), requires_grad=False)

    with pytest.raises(ValueError, match="'classifier', and they are sharded or quantised"):
        FILTERED.fit(probe(head="classifier"), module=Packed(), num_sanity_val_steps=0)


def test_missing_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ImportError, match=r'pip install "lightning-ft\[probe\]"'):
        FILTERED.fit(probe())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"problem": "many"}, "problem='many' must be \"single_label\""), ({"batches": 0}, "batches=0 must be 1 or more")],
)
def test_refuses_bad_arguments_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LPFT(**arguments)
