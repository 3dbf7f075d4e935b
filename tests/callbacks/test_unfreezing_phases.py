"""Explicit phases, metrics that end a phase, chain-thaw, norms: closed forms on a stranger."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import jsonargparse
import pytest
import torch
import transformers
from lightning.pytorch import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn

from lightning_ft.callbacks import DiscriminativeLR, GradualUnfreezing
from lightning_ft.callbacks._rate_factor import RateFactor
from lightning_ft.callbacks._split_rates import SplitRates
from lightning_ft.core import LayerGroups, Layers
from lightning_ft.core.norms import is_norm
from lightning_ft.core.phases import Phase, Stage
from lightning_ft.core.plateau import Plateau
from lightning_ft.core.schedule import Duration
from tests.strangers import BATCHES, FILTERED, STILL, STRANGERS, WIDTH, Filtered, Stranger, identical, weights

MANUAL = next(stranger for stranger in STRANGERS if stranger.name == "manual")
ALL = ("embeddings", "block.0", "block.1", "block.2", "tail", "head")


class Groups(Callback):
    """The groups that train in each batch, the sizes of the optimisers' states before it, and the weights around it."""

    def __init__(self, layers: Layers | None = None) -> None:
        self.layers = layers or Layers()
        self.trained: list[tuple[str, ...]] = []
        self.states: list[int] = []
        self.before: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        groups = self.layers.of(pl_module)
        self.trained.append(tuple(name for name in groups if all(p.requires_grad for p in groups.parameters(name))))
        self.states.append(sum(len(optimizer.state) for optimizer in trainer.optimizers))
        self.before.append(weights(pl_module))

    @property
    def phases(self) -> list[tuple[tuple[str, ...], int]]:
        """What trained, and in how many batches."""
        runs: list[tuple[tuple[str, ...], int]] = []
        for names in self.trained:
            count = runs.pop()[1] if runs and runs[-1][0] == names else 0
            runs.append((names, count + 1))
        return runs


class Scored(Filtered):
    """Logs given values, one each validation; the sanity check's is one that would end a phase at once."""

    def __init__(self, scores: Sequence[float]) -> None:
        super().__init__()
        self.scores = list(scores)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def on_validation_epoch_end(self) -> None:
        worst = -math.inf
        self.log("score", worst if self.trainer.sanity_checking else self.scores.pop(0))


def scored(*scores: float) -> Stranger:
    return Stranger("scored", lambda: Scored(scores))


# --- until, chain-thaw --------------------------------------------------------------------------------------------


def test_until_is_the_lowest_group_that_is_ever_released() -> None:
    watch = Groups()
    callback = GradualUnfreezing("2 steps", until="block.1")
    trainer = FILTERED.fit(callback, watch, max_epochs=2)
    assert watch.phases == [(ALL[4:], 2), (ALL[3:], 2), (ALL[2:], 8)]
    assert all(p.requires_grad for p in trainer.lightning_module.parameters())
    low = [name for group in ALL[:2] for name, _ in LayerGroups.of(trainer.lightning_module).named_parameters(group)]
    ended, started = weights(trainer.lightning_module), watch.before[0]
    assert all(torch.equal(ended[name], started[name]) for name in low)


class Three(Filtered):
    """Three layers a, b, c on a frozen encoder."""

    LAYERS = Layers(groups={"rest": "encoder", "a": r"classifier\.0", "b": r"classifier\.1", "c": r"classifier\.2"})

    def __init__(self) -> None:
        super().__init__()
        self.encoder.requires_grad_(False)
        self.classifier = nn.Sequential(nn.Linear(WIDTH, 4), nn.Linear(4, 4), nn.Linear(4, 2))


def test_chain_thaw_is_last_first_second_everything_with_new_states() -> None:
    watch = Groups(Three.LAYERS)
    callback = GradualUnfreezing(previous="freeze", layers=Three.LAYERS)
    trainer = Stranger("three", Three).fit(callback, watch, max_epochs=4)
    assert watch.phases == [(("c",), BATCHES), (("a",), BATCHES), (("b",), BATCHES), (("a", "b", "c"), BATCHES)]
    emptied = [i for i, (one, other) in enumerate(pairwise(watch.states), 1) if one > other]
    assert emptied == [BATCHES, 2 * BATCHES, 3 * BATCHES]
    assert [watch.states[i] for i in emptied] == [0, 0, 0]
    (optimizer,) = trainer.optimizers
    assert len(optimizer.state) == 6
    assert {int(state["step"]) for state in optimizer.state.values()} == {BATCHES}


def test_chain_thaw_of_a_language_encoder() -> None:
    watch = Groups()
    FILTERED.fit(GradualUnfreezing("2 steps", previous="freeze"), watch)
    one_each = [(ALL[4:], 2), *(((name,), 2) for name in ALL[:4])]
    assert watch.phases == [*one_each, (ALL, 2)]


# --- explicit phases ----------------------------------------------------------------------------------------------

PHASES = [Phase("head"), Phase("top:1", at="4 steps", lr=0.5), Phase(["tail", "block.1"], at="1 epoch", lr=0.25)]


@pytest.mark.parametrize(
    ("previous", "expected"),
    [
        ("keep", [(("head",), 4), (("block.2", "head"), 2), (("block.1", "block.2", "tail", "head"), 6)]),
        ("freeze", [(("head",), 4), (("block.2",), 2), (("block.1", "tail"), 6)]),
    ],
)
def test_phases_train_what_they_name_from_their_time_on(previous: Any, expected: Any) -> None:
    watch = Groups()
    FILTERED.fit(GradualUnfreezing(phases=PHASES, previous=previous), watch)
    assert watch.phases == expected


def test_phases_without_times_follow_every() -> None:
    watch = Groups()
    FILTERED.fit(GradualUnfreezing(0.25, phases=[Phase("head"), Phase("blocks"), Phase("all")]), watch)
    assert [count for _, count in watch.phases] == [3, 3, 6]


def test_mixed_units_are_compared_when_the_length_is_known() -> None:
    phases = [Phase("head"), Phase("blocks", at="1 epoch"), Phase("all", at="6 steps")]
    with pytest.raises(ValueError, match=r"one at 1 epochs is followed by one at 6 steps: let at= grow"):
        FILTERED.fit(GradualUnfreezing(phases=phases))
    FILTERED.fit(GradualUnfreezing(phases=phases), max_epochs=1, limit_train_batches=5)
    MANUAL.fit(GradualUnfreezing(phases=phases), max_epochs=1)  # steps an epoch are not known


class Plain(Filtered):
    """Plain SGD at the rate 0.1 under a scheduler, without dropout."""

    def __init__(self) -> None:
        super().__init__(dropout=0)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD([{"params": [p]} for p in self.parameters()], lr=0.1)
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "interval": "step"},
        ]


class Rates(Callback):
    """The rate at which each trained parameter really moved in each step: θ ← θ − rate · g."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []
        self.shown: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self._old = {name: p.detach().double() for name, p in pl_module.named_parameters()}
        self.shown.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        assert len(trainer.optimizers[0].param_groups) == len(list(pl_module.parameters()))
        moved = {}
        for name, p in pl_module.named_parameters():
            if p.grad is not None and p.grad.abs().max() > 1e-5:
                gradient = p.grad.double()
                moved[name] = float(
                    ((self._old[name] - p.detach().double()) * gradient).sum() / gradient.square().sum()
                )
        self.seen.append(moved)


def both(*callbacks: Callback) -> list[list[Callback]]:
    return [list(callbacks), list(callbacks)[::-1]]


def ramp(step: int) -> float:
    """0.5 with a warm-up of four steps from the step 3, after 1."""
    return 1.0 if step < 3 else 0.5 * min(1.0, (step - 3) / 4)


@pytest.mark.parametrize("turned", [False, True])
def test_rates_of_a_phase_are_scaled_while_stepping_only(turned: bool) -> None:
    phases = [Phase("head"), Phase("all", at="3 steps", lr=0.5, warmup="4 steps")]
    callbacks = both(GradualUnfreezing(phases=phases), DiscriminativeLR(0.5))[turned]
    rates = Rates()
    module = Plain()
    trainer = Stranger("plain", Plain).fit(*callbacks, rates, module=module)
    assert rates.shown == pytest.approx([0.1 * 0.9**step for step in range(12)])
    depth = DiscriminativeLR(0.5).multipliers(module)
    group = {name: g for g in ALL for name, _ in LayerGroups.of(module).named_parameters(g)}
    for step, seen in enumerate(rates.seen):
        assert seen
        for name, rate in seen.items():
            expected = 0.1 * 0.9**step * depth[group[name]] * ramp(step)
            assert rate == pytest.approx(expected, rel=0.05, abs=1e-6), (step, name)
    assert [g["lr"] for g in trainer.optimizers[0].param_groups] == pytest.approx([0.1 * 0.9**12] * len(group))


@pytest.mark.parametrize("first", [True, False])
def test_factors_of_phase_and_depth_multiply_whichever_was_there_first(first: bool) -> None:
    low, high = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([low, high], lr=1.0)
    phase = RateFactor("owner", [optimizer]) if first else None
    depth = SplitRates(optimizer, {id(low): 0.5, id(high): 1.0})
    phase = phase or RateFactor("owner", [optimizer])
    phase.value = 0.25
    for step in (1, 2):
        low.grad, high.grad = torch.ones(1), torch.ones(1)
        optimizer.step()
        assert (low.item(), high.item()) == (-0.125 * step, -0.25 * step)
        assert [(group["lr"], len(group["params"])) for group in optimizer.param_groups] == [(1.0, 2)]
    phase.remove()
    depth.remove()


def test_warmup_in_parts_of_training_and_of_epochs() -> None:
    class Factors(Callback):
        def __init__(self) -> None:
            self.values: list[float] = []

        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            self.values.append(callback._rates.value)

    for warmup in (0.25, "0.5 epochs"):
        callback = GradualUnfreezing(phases=[Phase("head", warmup=warmup), Phase("all", at=0.5, lr=2.0)])
        factors = Factors()
        FILTERED.fit(callback, factors)
        assert factors.values == pytest.approx([0, 1 / 3, 2 / 3, 1, 1, 1, *[2.0] * 6])


def test_a_step_that_raises_leaves_no_factor() -> None:
    class Raises(Callback):
        def on_before_optimizer_step(self, trainer: Any, *args: Any) -> None:
            assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05)
            raise KeyboardInterrupt

    module = Plain()
    trainer = Stranger("plain", Plain).trainer([GradualUnfreezing(phases=[Phase("all", lr=0.5)]), Raises()])
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer.fit(module)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.1


def test_refuses_a_factor_where_there_is_no_rate() -> None:
    class Relative(Filtered):
        def configure_optimizers(self) -> Any:
            return transformers.Adafactor(self.parameters())

    message = "lr and warmup multiply learning rates, and Adafactor has none"
    with pytest.raises(ValueError, match=message):
        Stranger("relative", Relative).fit(GradualUnfreezing(phases=[Phase("all", lr=0.5)]))
    Stranger("relative", Relative).fit(GradualUnfreezing(phases=[Phase("head"), Phase("all", at=0.5)]))


def test_stages_tell_when_each_begins() -> None:
    module = FILTERED.module()
    stages = GradualUnfreezing(0.3, until="block.1").stages(module)
    assert [stage.begins for stage in stages] == [None, Duration(0.3, "fraction"), Duration(0.6, "fraction")]
    assert [s.begins for s in GradualUnfreezing(Plateau()).stages(module)] == [None] * 5
    chosen = GradualUnfreezing(phases=PHASES).stages(module)
    assert chosen[1] == Stage(("block.2", "head"), Duration(4, "steps"), 0.5)
    assert [stage.lr for stage in chosen] == [1.0, 0.5, 0.25]


# --- metric-driven --------------------------------------------------------------------------------------------------

# Two validations an epoch, three batches apart.
TWICE = {"val_check_interval": BATCHES // 2}


@pytest.mark.parametrize(
    ("plateau", "scores", "counts"),
    [
        # Better, worse: the third validation is the next phase's first, which is always better.
        (Plateau("score"), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [6, 6, 6]),
        (Plateau("score", patience=2), [1.0, 2.0, 2.0, 4.0, 5.0, 6.0], [9, 9]),
        (Plateau("score", patience=2), [1.0, 2.0, 0.5, 4.0, 5.0, 6.0], [15, 3]),
        (Plateau("score", mode="max"), [1.0, 2.0, 3.0, 3.0, 5.0, 6.0], [12, 6]),
        (Plateau("score", min_delta=0.5), [3.0, 2.0, 1.6, 1.0, 0.4, 0.0], [9, 9]),
        (Plateau("score"), [1.0, math.nan, 1.0, 0.9, 0.8, 0.7], [6, 12]),
    ],
)
def test_a_phase_ends_when_its_metric_stops_improving(plateau: Plateau, scores: list[float], counts: list[int]) -> None:
    watch = Groups()
    scored(*scores).fit(GradualUnfreezing(plateau), watch, max_epochs=3, **TWICE)
    assert [count for _, count in watch.phases] == counts
    assert [len(names) for names, _ in watch.phases] == [2, 3, 4][: len(counts)]


def test_the_value_of_the_first_rank_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the values get better, on the first rank they get worse."""
    monkeypatch.setattr(
        SingleDeviceStrategy, "broadcast", lambda self, obj, src=0: -obj if isinstance(obj, float) else obj
    )
    watch = Groups()
    scored(4.0, 3.0, 2.0, 1.0).fit(GradualUnfreezing(Plateau("score")), watch, **TWICE)
    assert [count for _, count in watch.phases] == [6, 6]


def test_a_decision_inside_a_window_waits_for_its_end() -> None:
    """Windows of four and two batches, a validation after each batch, each worse than the one before it."""
    watch = Groups()
    callback = GradualUnfreezing(Plateau("score"))
    scored(*range(12)).fit(callback, watch, accumulate_grad_batches=4, val_check_interval=1)
    assert [count for _, count in watch.phases] == [4, 2, 4, 2]


def test_best_weights_of_the_stage_come_back_at_the_transition() -> None:
    watch = Groups()
    callback = GradualUnfreezing(Plateau("score", patience=2, reload_best=True))
    scored(3.0, 1.0, 2.0, 2.0, 9.0, 9.0).fit(callback, watch, max_epochs=3, **TWICE)
    assert [count for _, count in watch.phases] == [12, 6]
    # The second validation, the best, saw what the batch 6 began with.
    assert identical(watch.before[12], watch.before[6])
    assert not identical(watch.before[11], watch.before[6])


def test_best_running_statistics_come_back_too() -> None:
    class Normed(Scored):
        def __init__(self) -> None:
            super().__init__([1.0, 2.0, 3.0, 4.0])
            self.classifier = nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 2))

    watch = Groups()
    callback = GradualUnfreezing(Plateau("score", reload_best=True))
    Stranger("normed", Normed).fit(callback, watch, **TWICE)
    assert identical(watch.before[6], watch.before[3])
    assert not identical(watch.before[5]["classifier.0.running_mean"], watch.before[3]["classifier.0.running_mean"])


def test_without_reload_best_no_weights_are_kept() -> None:
    callback = GradualUnfreezing(Plateau("score"))
    scored(1.0, 0.5).fit(callback, max_epochs=1, **TWICE)
    assert callback.state_dict()["metric"] == {"best": 0.5, "waited": 0, "weights": {}}


def test_phases_and_chain_thaw_by_metric() -> None:
    watch = Groups(Three.LAYERS)

    class ScoredThree(Three):
        validation_step, on_validation_epoch_end = Scored.validation_step, Scored.on_validation_epoch_end

        def __init__(self) -> None:
            super().__init__()
            self.scores = [1.0, 2.0] * 3

    callback = GradualUnfreezing(Plateau("score"), previous="freeze", layers=Three.LAYERS)
    Stranger("three", ScoredThree).fit(callback, watch, max_epochs=3, **TWICE)
    assert watch.phases == [(("c",), 6), (("a",), 6), (("b",), 6)]
    watch = Groups()
    callback = GradualUnfreezing(Plateau("score"), phases=[Phase("head"), Phase("all", lr=0.1)])
    scored(1.0, 2.0, 3.0, 4.0).fit(callback, watch, **TWICE)
    assert [count for _, count in watch.phases] == [6, 6]


def test_missing_metric_lists_what_was_logged() -> None:
    with pytest.raises(ValueError, match=r"monitor='accuracy' was not logged; logged were: val_loss\. Name one"):
        FILTERED.fit(GradualUnfreezing(Plateau("accuracy")), num_sanity_val_steps=0)


def test_refuses_a_fit_without_validation() -> None:
    with pytest.raises(ValueError, match=r"decides after validations, and this fit has none: give validation data"):
        FILTERED.fit(GradualUnfreezing(Plateau()), limit_val_batches=0)


# --- norms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stranger", STRANGERS, ids=lambda stranger: stranger.name)
def test_norms_train_in_every_phase(stranger: Stranger) -> None:
    started = weights(stranger.fit(max_epochs=0).lightning_module)
    trainer = stranger.fit(GradualUnfreezing("1 epoch", norms="always"), max_epochs=1)
    module = trainer.lightning_module
    ended = weights(module)
    norms = {f"{path}.{n}" for path, m in module.named_modules() if is_norm(m) for n, _ in m.named_parameters()}
    groups = LayerGroups.of(module)
    top = {name for group in ("tail", "head") for name, _ in groups.named_parameters(group)}
    moved = {name for name, _ in module.named_parameters() if not torch.equal(started[name], ended[name])}
    assert len(norms) >= 14
    assert norms <= moved <= norms | top


def test_norms_that_their_owner_froze_stay_frozen() -> None:
    module = FILTERED.module()
    module.encoder.layers[0].norm1.requires_grad_(False)
    frozen = weights(module.encoder.layers[0].norm1)
    FILTERED.fit(GradualUnfreezing("1 epoch", norms="always"), module=module, max_epochs=1)
    assert identical(weights(module.encoder.layers[0].norm1), frozen)


# --- what a person writes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "check"),
    [
        ("every: 1 epoch", lambda c: c.every == Duration(1, "epochs")),
        ("every: 0.1\nuntil: block.0\nprevious: freeze", lambda c: (c.until, c.previous) == ("block.0", "freeze")),
        (
            "every: {monitor: val_f1, mode: max, patience: 3, reload_best: true}\nnorms: always",
            lambda c: c.every == Plateau("val_f1", "max", 3, reload_best=True) and c.norms == "always",
        ),
        (
            "phases:\n- train: head\n- {train: 'top:2', at: 1 epoch, lr: 0.5, warmup: 50 steps}\n"
            "- {train: [block.0, embeddings], at: 0.5}",
            lambda c: (
                c.phases
                == [
                    Phase("head"),
                    Phase("top:2", "1 epoch", 0.5, "50 steps"),
                    Phase(["block.0", "embeddings"], 0.5),
                ]
            ),
        ),
    ],
)
def test_is_written_in_yaml(text: str, check: Callable[[Any], bool]) -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(GradualUnfreezing, "callback")
    config = parser.parse_string("callback:\n" + "".join(f"  {line}\n" for line in text.splitlines()))
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    assert check(instantiate(config).callback)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"previous": "drop"}, "previous='drop' must be 'keep' or 'freeze'"),
        ({"norms": "never"}, "norms='never' must be 'follow' or 'always'"),
        ({"phases": []}, r"phases=\[\] must be a list of one Phase"),
        ({"phases": [{"train": "head"}]}, r"phases=.* must be a list of one Phase"),
        ({"phases": PHASES, "start": 2}, "pass it without groups_per_step=, start= and until="),
        ({"phases": PHASES, "until": "block.0"}, "pass it without groups_per_step=, start= and until="),
        ({"phases": PHASES[1:]}, r"phases\[0\] begins at the start of training: leave out its at='4 steps'"),
        ({"phases": [*PHASES, Phase("all")]}, "give at= to all of them but the first, or to none"),
        ({"phases": PHASES, "every": "2 epochs"}, "every= and the phases' at= both say when"),
        ({"phases": PHASES, "every": Plateau()}, "every= and the phases' at= both say when"),
        (
            {"phases": [Phase("head"), Phase("tail", at=0.5), Phase("all", at=0.5)]},
            "one at 0.5 of training is followed by one at 0.5 of training: let at= grow",
        ),
    ],
)
def test_refuses_arguments_that_contradict(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradualUnfreezing(**arguments)


def test_refuses_groups_that_are_not_there() -> None:
    with pytest.raises(ValueError, match=r"until='block\.7' must name the lowest group to release, one of embeddings"):
        FILTERED.fit(GradualUnfreezing(until="block.7"))
    with pytest.raises(ValueError, match=r"phases\[1\]\.train: 'top:9' must ask for 1 to 3 blocks"):
        FILTERED.fit(GradualUnfreezing(phases=[Phase("head"), Phase("top:9", at=0.5)]))


@pytest.mark.parametrize("phase", [Phase("head", at=None, warmup=0.1), Phase("head", warmup=0.5, lr=0.5)])
def test_refuses_parts_of_endless_training(phase: Phase) -> None:
    with pytest.raises(ValueError, match="fraction of a training that has no end"):
        STILL.fit(GradualUnfreezing(phases=[phase]), max_epochs=-1)
