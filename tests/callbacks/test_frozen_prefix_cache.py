from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_ft.callbacks import ExactResume, GradualUnfreezing
from lightning_ft.callbacks.frozen_prefix_cache import FrozenPrefixCache
from lightning_ft.core.layer_groups import LayerGroups
from lightning_ft.functional.prefix_layout import PrefixLayout
from lightning_ft.functional.prefix_rows import Unsuited
from tests.strangers import (
    BATCH,
    BATCHES,
    FILTERED,
    ROWS,
    STRANGERS,
    VOCABULARY,
    WIDTH,
    Filtered,
    Stranger,
    dataset,
    identical,
    outcome,
    pretrained,
    weights,
)

STRANGER = {stranger.name: stranger for stranger in STRANGERS}


class Frozen(Callback):
    """Freezes groups when training starts; in eval mode if asked, as a cached prefix is."""

    def __init__(self, what: Any, *, eval_mode: bool = False) -> None:
        self.what, self.eval_mode = what, eval_mode

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        groups = LayerGroups.of(pl_module)
        self.frozen = {p for name in groups.select(self.what) for p in groups.parameters(name)}
        for parameter in self.frozen:
            parameter.requires_grad_(False)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        for module in pl_module.modules() if self.eval_mode else ():
            if list(module.parameters()) and set(module.parameters()) <= self.frozen:
                module.eval()


class Calls(Callback):
    """How often block 0 ran in training so far, after each epoch."""

    def __init__(self) -> None:
        self.count, self.epochs = 0, []

    def _add(self, *_: Any) -> None:
        self.count += self.trainer.training

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.trainer = trainer
        lists = [m for m in pl_module.modules() if isinstance(m, nn.ModuleList) and len(m) == 3]
        # On a part of block 0: its own forward is replaced while it is skipped, and hooks on it run all the same.
        self.handle = next(lists[0][0].children()).register_forward_hook(self._add)

    def on_train_epoch_end(self, *args: Any) -> None:
        self.epochs.append(self.count)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if hasattr(self, "handle"):
            self.handle.remove()


BELOW_HEAD = r"(?!head).*"
each_stranger = pytest.mark.parametrize("stranger", STRANGERS, ids=lambda stranger: stranger.name)


def close(left: dict[str, Tensor], right: dict[str, Tensor], atol: float = 1e-5) -> None:
    """But for the biases of keys: their gradient is rounding alone, which Adam makes steps of."""
    for name, value in left.items():
        keyless = value[[*range(WIDTH), *range(2 * WIDTH, 3 * WIDTH)]] if name.endswith("in_proj_bias") else value
        other = right[name]
        other = other[[*range(WIDTH), *range(2 * WIDTH, 3 * WIDTH)]] if name.endswith("in_proj_bias") else other
        if not name.endswith("key.bias"):
            torch.testing.assert_close(keyless, other, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


class Plain(Filtered):
    """Without dropout and with plain SGD, under which rounding stays rounding."""

    def __init__(self) -> None:
        super().__init__(dropout=0)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


STILL = Stranger("plain", Plain)


def untouched(module: nn.Module) -> bool:
    return not any(
        "forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in module.modules() if m is not module
    )


@each_stranger
@pytest.mark.parametrize("what", [BELOW_HEAD, "embeddings..block.1"])
def test_trains_as_without_it_and_never_runs_the_prefix_again(what: str, stranger: Stranger) -> None:
    module, calls, callback = stranger.module(), Calls(), FrozenPrefixCache()
    names = list(module.state_dict()) if stranger.name != "late" else None
    tree = [name for name, _ in module.named_modules()] if names else None
    got = stranger.fit(Frozen(what), calls, callback, module=module, max_epochs=3)
    # In eval mode the parts between the frozen ones that have no parameters stay as they are.
    wanted = stranger.fit(Frozen(what, eval_mode=True), max_epochs=3)
    close(weights(got.lightning_module), weights(wanted.lightning_module), atol=1e-4)
    assert calls.epochs[0] == calls.epochs[1] == calls.epochs[2] > 0
    report = callback.report()
    assert report.facts["hit rate"] == 1
    (phase,) = report.rows
    pooled = what == BELOW_HEAD
    assert phase["rows"] == ROWS
    assert phase["bytes"] == ROWS * (1 if pooled else 5) * WIDTH * 4
    assert phase["cached"] == ("what enters the head" if pooled else "the output of block 2 of 3")
    assert (list(module.state_dict()), [name for name, _ in module.named_modules()]) == (names, tree) or not names
    assert untouched(module)


class Failure(Exception):
    pass


class FailIn(Callback):
    def __init__(self, hook: str) -> None:
        setattr(self, hook, self._fail)

    def _fail(self, trainer: Any, *args: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.current.ready == 4:
            raise Failure


@each_stranger
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_backward", "on_after_backward"])
def test_leaves_nothing_behind_after_an_exception(hook: str, stranger: Stranger, tmp_path: Path) -> None:
    module, callback = stranger.module(), FrozenPrefixCache("disk", dirpath=tmp_path)
    with pytest.raises(Failure):
        stranger.trainer([Frozen(BELOW_HEAD), callback, FailIn(hook)]).fit(module)
    assert untouched(module)
    assert callback._cache is None


# -- thaws


@pytest.mark.parametrize("first", ["cache", "unfreezing"])
@pytest.mark.parametrize("every", ["1 epoch", "2 epochs", "4 steps"])
def test_follows_thaws_and_trains_as_without_it(every: str, first: str) -> None:
    """Without dropout, so that the uncached run has nothing to draw in frozen layers."""
    callback = FrozenPrefixCache(min_epochs=0)
    callbacks = [callback, GradualUnfreezing(every)] if first == "cache" else [GradualUnfreezing(every), callback]
    got = STILL.fit(*callbacks, max_epochs=7, limit_val_batches=0)
    wanted = STILL.fit(GradualUnfreezing(every), max_epochs=7, limit_val_batches=0)
    close(weights(got.lightning_module), weights(wanted.lightning_module))
    places = [f"the output of block {k} of 3" for k in (3, 2, 1)]
    assert [phase["cached"] for phase in callback.report().rows] == places


def test_starts_at_the_depth_that_the_plan_keeps_for_two_epochs(caplog: pytest.LogCaptureFixture) -> None:
    def places(every: str | float, epochs: int, min_epochs: float = 2) -> list[tuple[int, str]]:
        callback = FrozenPrefixCache(min_epochs=min_epochs)
        STILL.fit(GradualUnfreezing(every), callback, max_epochs=epochs, limit_val_batches=0)
        return [(phase["step"] // BATCHES, phase["cached"][20:]) for phase in callback.report().rows]

    assert places("1 epoch", 6) == [(0, "2 of 3")]
    assert places("2 epochs", 6) == [(0, "3 of 3"), (2, "2 of 3"), (4, "1 of 3")]
    assert places("12 steps", 6) == [(0, "3 of 3"), (2, "2 of 3"), (4, "1 of 3")]
    assert places(0.5, 4) == [(0, "3 of 3"), (2, "2 of 3")]
    assert places("1 epoch", 3, 1) == [(0, "3 of 3"), (1, "2 of 3"), (2, "1 of 3")]
    assert places("1 epoch", 1) == [(0, "3 of 3")]  # training ends before the thaw
    assert places("6 steps", 3, 3) == [(0, "1 of 3")]


def test_tail_that_thaws_ends_the_pooled_cache() -> None:
    class Thaw(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 2:
                for parameter in pl_module.encoder.norm.parameters():
                    parameter.requires_grad_(True)

    callback = FrozenPrefixCache()
    got = STILL.fit(Frozen(BELOW_HEAD), Thaw(), callback, max_epochs=4, limit_val_batches=0)
    wanted = STILL.fit(Frozen(BELOW_HEAD), Thaw(), max_epochs=4, limit_val_batches=0)
    close(weights(got.lightning_module), weights(wanted.lightning_module))
    assert [row["cached"] for row in callback.report().rows] == ["what enters the head", "the output of block 3 of 3"]


# -- weights that change


class Write(Callback):
    """Writes frozen weights in place before the batches of an epoch."""

    def __init__(self, function: Callable[[Tensor, int], Any], batches: Iterable[int] = (0,), start: int = 1) -> None:
        self.function, self.batches, self.start = function, set(batches), start

    @torch.no_grad()
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch >= self.start and batch_idx in self.batches:
            self.function(pl_module.encoder.layers[0].linear1.weight, trainer.current_epoch)


def test_changed_weights_are_seen_and_equal_ones_are_no_change(caplog: pytest.LogCaptureFixture) -> None:
    def run(function: Callable[[Tensor, int], Any], *extra: Callback) -> Any:
        return weights(STILL.fit(Frozen(BELOW_HEAD), Write(function), *extra, max_epochs=3).lightning_module)

    callback = FrozenPrefixCache()
    close(run(lambda w, epoch: w.mul_(1.5), callback), run(lambda w, epoch: w.mul_(1.5)))
    assert [row["step"] for row in callback.report().rows] == [0, BATCHES, 2 * BATCHES]
    run(lambda w, epoch: w.copy_(w.clone()), callback := FrozenPrefixCache())
    assert [row["step"] for row in callback.report().rows] == [0]
    swapped = FrozenPrefixCache()
    close(run(lambda w, epoch: setattr(w, "data", w * 2), swapped), run(lambda w, epoch: setattr(w, "data", w * 2)))
    assert len(swapped.report().rows) == 3


def test_weights_that_change_all_the_time_end_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    callback, write = FrozenPrefixCache(), partial(Write, lambda w, epoch: w.mul_(1.01), range(BATCHES))
    got = STILL.fit(Frozen(BELOW_HEAD), write(), callback, max_epochs=3)
    wanted = STILL.fit(Frozen(BELOW_HEAD), write(), max_epochs=3)
    close(weights(got.lightning_module), weights(wanted.lightning_module))
    assert "the cache ends: the frozen weights changed twice in an epoch" in caplog.text
    assert len(callback.report().rows) == 2
    assert callback.report().facts["ended"]


def test_average_that_is_swapped_in_for_validation_keeps_the_cache() -> None:
    callback, average = FrozenPrefixCache(), partial(EMAWeightAveraging, decay=0.5, update_every_n_steps=1)
    got = STILL.fit(Frozen(BELOW_HEAD), callback, average(), max_epochs=3)
    wanted = STILL.fit(Frozen(BELOW_HEAD), average(), max_epochs=3)
    close(weights(got.lightning_module), weights(wanted.lightning_module))
    assert callback.report().facts["hit rate"] == 1
    assert len(callback.report().rows) == 1


def test_deep_copies_of_the_module_neither_hold_nor_use_the_cache() -> None:
    copies: list[LightningModule] = []

    class Copy(Callback):
        def on_before_zero_grad(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            copies.append(copy.deepcopy(pl_module))

    callback = FrozenPrefixCache()
    STILL.fit(callback, Frozen(BELOW_HEAD), Copy(), max_epochs=1)
    for module in copies:
        tokens = torch.full((2, 5), 3)
        plain = STILL.module()
        plain.load_state_dict(module.state_dict())
        torch.testing.assert_close(module(tokens), plain(tokens), rtol=0, atol=1e-6)
    assert len(copies) == BATCHES


# -- inputs


class Changing(Dataset[Any]):
    """Rows that are new in each epoch, drawn from the global generator."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> Any:
        return torch.randint(VOCABULARY, (5,)), torch.tensor(index % 2)


def fit_on(loader: Any, *callbacks: Callback, stranger: Stranger = STILL, **options: Any) -> Any:
    trainer = stranger.trainer(callbacks, **{"max_epochs": 4, "limit_val_batches": 0, **options})
    torch.manual_seed(0)
    module = stranger.module()
    module.train_dataloader = None
    trainer.fit(module, loader)
    return trainer


def test_inputs_that_change_end_it_with_a_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    callback, calls = FrozenPrefixCache(), Calls()
    got = fit_on(DataLoader(Changing(), 4), Frozen(BELOW_HEAD), callback, calls)
    wanted = fit_on(DataLoader(Changing(), 4), Frozen(BELOW_HEAD))
    close(weights(got.lightning_module), weights(wanted.lightning_module))  # and the same rows were drawn
    assert "the cache ends: only 0% of the rows of an epoch were there" in caplog.text
    assert callback._cache is None
    # The fill leaves the generator as it was, so that the rest of its epoch draws the very rows that it drew.
    assert callback.report().rows[0]["seen"] == 2 * ROWS
    assert calls.epochs[3] - calls.epochs[2] == BATCHES


class Stream(IterableDataset[Any]):
    def __init__(self, rows: Iterable[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)


LOADERS: dict[str, Callable[[], Any]] = {
    "shuffled": lambda: DataLoader(dataset(), BATCH, shuffle=True),
    "batch-sampler": lambda: DataLoader(dataset(), batch_sampler=[[i, i + 1, i + 2] for i in range(0, ROWS, 3)]),
    "single-rows": lambda: DataLoader(dataset(), batch_size=1),
    "mapping": lambda: DataLoader(
        dataset(), BATCH, collate_fn=lambda rows: [torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows])]
    ),
}


@pytest.mark.parametrize("name", LOADERS)
def test_reads_the_data_behind_any_loader_without_moving_it(name: str) -> None:
    callback, calls = FrozenPrefixCache(), Calls()
    got = fit_on(LOADERS[name](), Frozen(BELOW_HEAD), callback, calls)
    close(weights(got.lightning_module), weights(fit_on(LOADERS[name](), Frozen(BELOW_HEAD)).lightning_module))
    assert callback.report().facts["hit rate"] == 1
    assert len(set(calls.epochs)) == 1


@pytest.mark.parametrize("case", ["stream", "limited", "two loaders", "computed"])
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_keeps_rows_as_they_come_where_the_data_cannot_be_read_ahead(case: str, where: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"limit_train_batches": 3} if case == "limited" else {}
    loader: Any = DataLoader(Stream(list(dataset())) if case == "stream" else dataset(), BATCH)
    stranger = STILL
    if case == "two loaders":
        stranger = Stranger("pairs", partial(Pairs, 0.0))
        loader = [loader, DataLoader(dataset(), BATCH)]
    if case == "computed":
        stranger = Stranger("computed", partial(Computed, 0.0))
    callback, calls = FrozenPrefixCache(where, dirpath=tmp_path / "cache" if where == "disk" else None), Calls()
    got = fit_on(loader, Frozen(BELOW_HEAD), callback, calls, stranger=stranger, **options)
    wanted = fit_on(loader, Frozen(BELOW_HEAD), stranger=stranger, **options)
    close(weights(got.lightning_module), weights(wanted.lightning_module))
    (phase,) = callback.report().rows
    assert calls.epochs[0] == calls.epochs[3]
    assert phase["hits"] > 0.7 * phase["seen"]
    assert not list((tmp_path / "cache").glob("*")) if where == "disk" else True


class Dropped(Filtered):
    """Drops out between encoder and head, in a function and not in a module."""

    def forward(self, tokens: Tensor) -> Tensor:
        return self.classifier(F.dropout(self.encoder(tokens)[:, 0], 0.5, self.training))


def test_dropout_below_the_head_stays_on() -> None:
    """One vector for each row would be without it, so that the last block's output is kept."""
    callback, stranger = FrozenPrefixCache(), Stranger("dropped", Dropped)
    got = stranger.fit(Frozen(BELOW_HEAD), callback)
    wanted = stranger.fit(Frozen(BELOW_HEAD, eval_mode=True))
    close(weights(got.lightning_module), weights(wanted.lightning_module), atol=1e-4)
    assert callback.report().rows[0]["cached"] == "the output of block 3 of 3"


class Computed(Filtered):
    """Makes its inputs in the training step."""

    def loss(self, batch: list[Tensor]) -> Tensor:
        return super().loss([batch[0].flip(1), batch[1]])


class Pairs(Filtered):
    """Calls its model twice in a step."""

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch[0]) + super().loss([batch[1][0].flip(0), batch[1][1]])


@pytest.mark.parametrize("rows", [0, 10])
@pytest.mark.parametrize("what", [BELOW_HEAD, "embeddings..block.1"])
def test_budget_is_kept_and_the_rest_computed(rows: int, what: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    size = WIDTH * 4 * (1 if what == BELOW_HEAD else 5)
    callback = FrozenPrefixCache(budget=rows * size + 1)
    got = STILL.fit(Frozen(what), callback, max_epochs=3)
    close(weights(got.lightning_module), weights(STILL.fit(Frozen(what), max_epochs=3).lightning_module))
    (phase,) = callback.report().rows
    assert (phase["rows"], phase["bytes"]) == (rows, rows * size)
    assert phase["hits"] == 3 * rows
    assert f"{1 - rows / ROWS:.0%} of the rows do not fit the budget" in caplog.text


# -- disk


def test_later_run_opens_what_an_earlier_one_left(tmp_path: Path) -> None:
    def run(*extra: Callback, what: str = BELOW_HEAD, **options: Any) -> tuple[Any, str, int]:
        callback = FrozenPrefixCache("disk", dirpath=tmp_path, **options)
        trainer = STILL.fit(Frozen(what), *extra, callback, max_epochs=2, limit_val_batches=0)
        (phase,) = callback.report().rows
        return weights(trainer.lightning_module), phase["how"], phase["rows"]

    first, how, rows = run()
    assert (how, rows) == ("filled", ROWS)
    again, how, rows = run()
    assert (how, rows) == ("opened", ROWS)
    assert identical(first, again)
    assert len(list(tmp_path.iterdir())) == 1

    class Other(Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            with torch.no_grad():
                pl_module.encoder.layers[1].linear1.weight[0, 0] += 1e-3

    assert run(Other())[1] == "filled"  # other weights
    assert run(what="embeddings..block.1")[1] == "filled"  # another place
    assert run(dtype="float16")[1] == "filled"
    assert len(list(tmp_path.iterdir())) == 4


def test_files_whose_content_is_not_what_the_model_computes_are_replaced(tmp_path: Path) -> None:
    def run() -> Any:
        callback = FrozenPrefixCache("disk", dirpath=tmp_path)
        return weights(STILL.fit(Frozen(BELOW_HEAD), callback, limit_val_batches=0).lightning_module)

    wanted = run()
    (values,) = tmp_path.glob("*/values.bin")
    values.write_bytes(bytes(values.stat().st_size))
    assert identical(run(), wanted)


# -- a transformers model, with what it can be called with


class Bert(LightningModule):
    """A BERT of transformers; ``options`` go to each call."""

    def __init__(self, embeds: bool = False, **options: Any) -> None:
        super().__init__()
        config = hf.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_attention_heads=2,
            intermediate_size=16,
            num_hidden_layers=3,
            max_position_embeddings=32,
        )
        self.net = pretrained(hf.BertForSequenceClassification, config).train()
        self.embeds, self.options = embeds, options

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs = {"input_ids": batch[0], "attention_mask": (batch[0] >= 0).long()}
        if self.embeds:
            inputs["inputs_embeds"] = self.net.bert.embeddings.word_embeddings(inputs.pop("input_ids"))
        out = self.net(**inputs, **self.options)
        self.states = out.hidden_states
        return F.cross_entropy(out.logits, batch[1])

    def train_dataloader(self) -> Any:
        return DataLoader(dataset(), BATCH)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"embeds": True}, "no token ids"),
        ({"output_hidden_states": True}, "gives something else"),
    ],
)
def test_calls_that_need_the_prefix_get_it(
    options: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    callback, stranger = FrozenPrefixCache(), Stranger("bert", partial(Bert, **options))
    got = stranger.fit(Frozen(BELOW_HEAD, eval_mode=True), callback)
    close(weights(got.lightning_module), weights(stranger.fit(Frozen(BELOW_HEAD, eval_mode=True)).lightning_module))
    assert reason in caplog.text
    assert caplog.text.count("goes through uncached") == 1
    assert not callback.report().rows


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_works_in_bfloat16(precision: Any) -> None:
    """Autocast keeps the weights that it has cast: those of a run without gradients must not reach the head."""
    stranger, callback = Stranger("bert", Bert), FrozenPrefixCache()
    got = stranger.fit(Frozen(BELOW_HEAD), callback, precision=precision, max_epochs=3)
    wanted = stranger.fit(Frozen(BELOW_HEAD, eval_mode=True), precision=precision, max_epochs=3)
    assert callback.report().facts["hit rate"] > 0.6
    start = weights(Bert())["net.classifier.weight"]
    moved = weights(got.lightning_module)["net.classifier.weight"].float() - start
    expected = weights(wanted.lightning_module)["net.classifier.weight"].float() - start
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(moved, expected, rtol=0.05, atol=2e-3)


def test_validation_runs_the_whole_model() -> None:
    seen: list[int] = []

    class Watch(Calls):
        def _add(self, *_: Any) -> None:
            if self.trainer.validating or self.trainer.state.stage == "validate":
                seen.append(self.trainer.current_epoch)

    callback = FrozenPrefixCache()
    FILTERED.fit(Frozen(BELOW_HEAD), callback, Watch())
    assert seen == [0, 0, 1, 1]
    assert callback.report().facts["hit rate"] == 1


# -- models that are left alone


def test_model_without_blocks_trains_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    class Flat(Filtered):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Embedding(VOCABULARY, WIDTH)

    caplog.set_level(logging.INFO)
    Stranger("flat", Flat).fit(FrozenPrefixCache(), max_epochs=1)
    assert "FrozenPrefixCache: nothing is cached: blocks= must name the list of blocks" in caplog.text


@pytest.mark.parametrize("case", ["compiled", "two lists"])
def test_models_in_which_the_prefix_cannot_be_skipped(case: str) -> None:
    module = Filtered()
    if case == "compiled":
        module.encoder._compiled_call_impl = lambda *_: None
    else:
        module.twin = nn.ModuleList(module.encoder.layers)
    with pytest.raises(Unsuited, match="the model is compiled" if case == "compiled" else r"one list \(2 lists fit\)"):
        PrefixLayout.of(module, LayerGroups.of(module, blocks="encoder.layers"))


def test_nothing_frozen_is_no_reason_to_look(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert identical(outcome(FILTERED.fit(FrozenPrefixCache())), outcome(FILTERED.fit()))
    assert "FrozenPrefixCache" not in caplog.text


# -- resume


class Killed(Exception):
    pass


class Kill(Callback):
    def __init__(self, hook: str, epoch: int, batch: int) -> None:
        self.epoch, self.batch = epoch, batch
        setattr(self, hook, self._raise)

    def _raise(self, trainer: Any, *args: Any) -> None:
        progress = trainer.fit_loop.epoch_loop.batch_progress.current
        if (trainer.current_epoch, progress.ready - 1) == (self.epoch, self.batch) and not trainer.sanity_checking:
            raise Killed


def resumable(folder: Path, min_epochs: float) -> list[Callback]:
    cached = FrozenPrefixCache(min_epochs=min_epochs)
    return [ExactResume("1 steps", dirpath=folder), GradualUnfreezing("4 steps"), cached]


def resume_options(stranger: Stranger, folder: Path) -> dict[str, Any]:
    accumulation = {} if stranger.name == "manual" else {"accumulate_grad_batches": 2}
    return {"val_check_interval": BATCHES // 2, "max_epochs": 4, "default_root_dir": folder, **accumulation}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def run(name: str, min_epochs: float) -> Any:
        folder, stranger = tmp_path_factory.mktemp(name), STRANGER[name]
        callbacks = resumable(folder, min_epochs)
        result = outcome(stranger.fit(*callbacks, **resume_options(stranger, folder)))
        assert len(callbacks[2].report().rows) == (3 if min_epochs == 0 else 2)
        return result

    return run


@pytest.mark.parametrize(
    ("name", "min_epochs", "hook", "epoch", "batch"),
    [
        # Three optimiser steps an epoch; thaws at the steps 4 (epoch 1, batch 2), 8 and 12.
        *(("filtered", 0.0, "on_after_backward", epoch, batch) for epoch, batch in ((0, 3), (1, 1), (1, 2), (1, 3))),
        ("filtered", 0.0, "on_after_backward", 0, BATCHES - 1),
        ("filtered", 0.0, "on_after_backward", 2, 4),
        ("filtered", 0.0, "on_validation_end", 1, 2),
        ("filtered", 0.0, "on_validation_end", 1, BATCHES - 1),
        ("filtered", 0.0, "on_train_batch_end", 2, 3),
        ("filtered", 2.0, "on_after_backward", 1, 3),
        *((name, 0.0, "on_after_backward", 1, 4) for name in ("late", "manual", "head-first", "legacy")),
    ],
)
def test_resumed_run_goes_on_bit_for_bit(
    name: str, min_epochs: float, hook: str, epoch: int, batch: int, tmp_path: Path, uninterrupted: Any
) -> None:
    """With dropout in what trains, shuffled rows, accumulation and validation in mid-epoch."""
    stranger = STRANGER[name]
    settings = resume_options(stranger, tmp_path)
    with pytest.raises(Killed):
        stranger.fit(*resumable(tmp_path, min_epochs), Kill(hook, epoch, batch), **settings)
    torch.manual_seed(99)
    trainer = stranger.trainer(resumable(tmp_path, min_epochs), **settings)
    trainer.fit(stranger.module(), ckpt_path=tmp_path / "last.ckpt")
    assert identical(outcome(trainer), uninterrupted(name, min_epochs))


def test_resumed_run_keeps_the_depth_that_was_chosen(tmp_path: Path) -> None:
    """Two epochs before its end a run would choose anew, and see other activations from there on."""
    callbacks, settings = resumable(tmp_path, 2.0), {"max_epochs": 4, "limit_val_batches": 0}
    with pytest.raises(Killed):
        FILTERED.fit(*callbacks, Kill("on_after_backward", 0, 4), **settings)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["FrozenPrefixCache"]
    assert (saved["frozen"], saved["depth"]) == (3, 1)
    resumed = resumable(tmp_path, 0.0)
    FILTERED.fit(*resumed, **settings, ckpt_path=tmp_path / "last.ckpt")
    assert resumed[2].report().rows[0]["cached"] == "the output of block 1 of 3"


# -- arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"where": "gpu"}, 'where=\'gpu\' must be "memory" or "disk"'),
        ({"dtype": "int8"}, "dtype='int8' must be one of float32, bfloat16, float16"),
        ({"budget": "2"}, "budget='2' must be a size"),
        ({"min_epochs": -1}, "min_epochs=-1 must be 0 or more"),
        ({"min_epochs": math.nan}, "min_epochs=nan must be 0 or more"),
        ({"dirpath": "x"}, 'dirpath= is the folder of where="disk"'),
    ],
)
def test_refuses_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FrozenPrefixCache(**arguments)


def test_report_is_printed_and_plain() -> None:
    callback = FrozenPrefixCache(dtype="bfloat16")
    FILTERED.fit(Frozen(BELOW_HEAD), callback)
    assert "what enters the head" in str(callback.report())
    assert '"hit rate": 1.0' in callback.report().to_json()
    assert callback.report().rows[0]["bytes"] == ROWS * WIDTH * 2
