"""WiSE-FT: exact ends, the choice by validation, what others save, resuming, ranks."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from lightning_ft.callbacks import L2SP, ExactResume, LayerReinit
from lightning_ft.callbacks.wise_ft import GRID, WiSEFT
from lightning_ft.functional.wise_ft import interpolate_weights
from tests.callbacks.test_exact_resume import Kill, Killed
from tests.ranks import RANKS, run_ranks
from tests.sharded_worker import train, whole
from tests.strangers import FILTERED, STRANGERS, Filtered, Stranger, dataset, identical, outcome, weights

PNG = b"\x89PNG"
HEADS = ("classifier", "bert.classifier", "verdict")


def line(start: dict[str, Tensor], end: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """The oracle: in float64, and the head as trained."""
    return {
        name: value
        if name.startswith(HEADS) or not value.is_floating_point()
        else ((1 - alpha) * start[name].double() + alpha * value.double()).to(value.dtype)
        for name, value in end.items()
    }


def start_of(stranger: Stranger) -> dict[str, Tensor]:
    return weights(stranger.fit(max_epochs=0).lightning_module)


@pytest.mark.parametrize("alpha", [0, 0.25, 0.5, 1])
@pytest.mark.parametrize("stranger", STRANGERS, ids=lambda stranger: stranger.name)
def test_ends_on_the_line_and_exactly_at_its_ends(stranger: Stranger, alpha: float, tmp_path: Path) -> None:
    found = weights(stranger.fit(WiSEFT(alpha), default_root_dir=tmp_path).lightning_module)
    expected = line(start_of(stranger), weights(stranger.fit().lightning_module), alpha)
    assert found.keys() == expected.keys()
    if alpha in (0, 1):
        assert identical(found, expected)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)
    stored = torch.load(tmp_path / "checkpoints" / "wise_ft.ckpt", weights_only=True)
    assert identical(dict(stored["state_dict"]), found)
    assert "optimizer_states" not in stored


class Curve(Filtered):
    """Its validation is best two fifths of the way, where one weight of the body is."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        probe = self.encoder.tokens.weight[1, 0]
        here = (probe - self.first) / (self.goal - self.first) if hasattr(self, "goal") else probe
        self.log("bend", (here - 0.4).square().detach())


def curve() -> Curve:
    module = Curve()
    module.first = float(module.encoder.tokens.weight[1, 0].detach())
    module.goal = float(FILTERED.fit().lightning_module.encoder.tokens.weight[1, 0].detach())
    return module


@pytest.mark.parametrize(("mode", "best"), [("min", 0.4), ("max", 1.0)])
def test_takes_the_best_of_the_grid_and_tells_all(mode: Any, best: float, tmp_path: Path) -> None:
    callback = WiSEFT(monitor="bend", mode=mode)
    logger = CSVLogger(tmp_path, "log", version=0)
    trainer = FILTERED.fit(callback, module=curve(), default_root_dir=tmp_path, logger=logger, log_every_n_steps=1)
    report = callback.report
    assert report is not None
    assert report.facts["chosen alpha"] == best
    assert [row["alpha"] for row in report.rows] == list(GRID)
    for row in report.rows:
        assert row["bend"] == pytest.approx((row["alpha"] - 0.4) ** 2, abs=1e-4)
        assert "val_loss" in row
    expected = line(start_of(FILTERED), weights(FILTERED.fit().lightning_module), best)
    for name, value in weights(trainer.lightning_module).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)
    assert (tmp_path / "wise_ft.png").read_bytes().startswith(PNG)
    assert "wise_ft/alpha" in (tmp_path / "log" / "version_0" / "metrics.csv").read_text().splitlines()[0]


def test_the_table_is_what_the_trainer_validates(tmp_path: Path) -> None:
    callback = WiSEFT([0.3, 0.7])
    trainer = FILTERED.fit(callback, default_root_dir=tmp_path)
    module = copy.deepcopy(trainer.lightning_module)
    (found,) = FILTERED.trainer().validate(module, verbose=False)
    assert callback.report is not None
    chosen = callback.report.facts["chosen alpha"]
    row = next(row for row in callback.report.rows if row["alpha"] == chosen)
    assert row["val_loss"] == pytest.approx(found["val_loss"], abs=1e-6)
    again = torch.load(tmp_path / "checkpoints" / "wise_ft.ckpt", weights_only=True)["state_dict"]
    assert identical(dict(again), weights(trainer.lightning_module))


class Heard(Callback):
    def __init__(self) -> None:
        self.validations = 0

    def on_validation_end(self, *args: Any) -> None:
        self.validations += 1


@pytest.mark.parametrize("first", [True, False])
def test_what_others_save_at_the_end_is_the_fine_tuned_run(first: bool, tmp_path: Path) -> None:
    """Wherever it stands in the list; and no callback hears of its validations."""
    plain = FILTERED.fit(ExactResume("5 steps", dirpath=tmp_path / "plain"))
    heard, wise = Heard(), WiSEFT([0.0, 0.5])
    keeper = ModelCheckpoint(tmp_path / "keeper", save_last=True, every_n_epochs=100)
    callbacks = [ExactResume("5 steps", dirpath=tmp_path / "exact"), heard, keeper]
    callbacks.insert(0 if first else 2, wise)
    trainer = FILTERED.fit(*callbacks, enable_checkpointing=True, default_root_dir=tmp_path)
    assert heard.validations == 3  # with that before the training
    fine_tuned = weights(plain.lightning_module)
    for folder in ("exact", "keeper"):
        stored = torch.load(tmp_path / folder / "last.ckpt", weights_only=True)
        assert identical(dict(stored["state_dict"]), fine_tuned)
    assert (tmp_path / "keeper" / "wise_ft.ckpt").exists()
    assert not identical(weights(trainer.lightning_module), fine_tuned)


def test_layers_drawn_anew_stay_as_trained(tmp_path: Path) -> None:
    callbacks: list[Any] = [LayerReinit(1), WiSEFT(0)]
    found = weights(FILTERED.fit(*callbacks, default_root_dir=tmp_path).lightning_module)
    trained, start = weights(FILTERED.fit(LayerReinit(1)).lightning_module), start_of(FILTERED)
    for name, value in found.items():
        fresh = name.startswith(("encoder.layers.2", "classifier"))
        assert torch.equal(value, trained[name] if fresh else start[name])


@pytest.mark.parametrize(("epoch", "batch"), [(0, 5), (1, 3)])
def test_resumed_run_ends_at_the_same_weights(epoch: int, batch: int, tmp_path: Path) -> None:
    def callbacks() -> list[Any]:
        return [ExactResume("1 steps", dirpath=tmp_path), WiSEFT([0.2, 0.6]), L2SP(0.1)]

    options = {"accumulate_grad_batches": 2, "val_check_interval": 3, "default_root_dir": tmp_path}
    first = callbacks()
    whole_run = outcome(FILTERED.fit(*first, **options))
    with pytest.raises(Killed):
        FILTERED.fit(*callbacks(), Kill("on_after_backward", epoch, batch), **options)
    resumed = callbacks()
    trainer = FILTERED.trainer(resumed, **options)
    trainer.fit(Filtered(), ckpt_path=tmp_path / "last.ckpt")
    assert identical(outcome(trainer), whole_run)
    assert resumed[1].report == first[1].report


def test_a_run_that_breaks_off_is_left_as_it_is(tmp_path: Path) -> None:
    module = Filtered()
    with pytest.raises(Killed):
        FILTERED.fit(WiSEFT(0), Kill("on_after_backward", 1, 3), module=module, default_root_dir=tmp_path)
    assert not identical(weights(module), start_of(FILTERED))
    assert not (tmp_path / "checkpoints").exists()


def test_fails_with_the_fine_tuned_weights_in_place(tmp_path: Path) -> None:
    module = Filtered()
    with pytest.raises(ValueError, match=r"monitor='acc' was not logged; logged were: val_loss. Name one"):
        FILTERED.fit(WiSEFT(monitor="acc"), module=module, default_root_dir=tmp_path)
    assert identical(weights(module), weights(FILTERED.fit().lightning_module))


def test_refuses_to_resume_from_other_weights(tmp_path: Path) -> None:
    trainer = FILTERED.fit(WiSEFT(0.5), max_epochs=1, default_root_dir=tmp_path)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="build the model from the same pretrained weights"):
        FILTERED.fit(WiSEFT(0.5), module=trainer.lightning_module, ckpt_path=tmp_path / "a.ckpt")


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    FILTERED.fit(WiSEFT([0, 1]), fast_dev_run=True, default_root_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_bf16_weights_are_interpolated_in_fp32() -> None:
    start, end = (torch.randn(1000, generator=torch.Generator().manual_seed(i)).bfloat16() for i in (1, 2))
    for alpha in (0.1, 0.5, 0.9):
        theta = torch.zeros_like(start)
        interpolate_weights([theta], [start], [end], alpha)
        exact = (1 - alpha) * start.double() + alpha * end.double()
        assert ((theta.double() - exact).abs() <= 2**-8 * exact.abs()).all()  # half a unit in the last place
    theta = torch.zeros_like(start)
    interpolate_weights([theta], [start], [end], 0.0)
    assert torch.equal(theta, start)


def test_a_start_of_more_precision_is_not_rounded_first() -> None:
    start, end = torch.tensor([1 + 2**-9]), torch.tensor([1.0]).bfloat16()
    theta = torch.zeros(1)
    interpolate_weights([theta], [start], [end], 0.5)
    assert theta.item() == 1 + 2**-10


def test_infinite_weights_do_not_spoil_the_other_end() -> None:
    theta = torch.zeros(1)
    interpolate_weights([theta], [torch.tensor([torch.inf])], [torch.tensor([2.0])], 1.0)
    assert theta.item() == 2


class Normed(Filtered):
    def __init__(self) -> None:
        super().__init__()
        self.encoder.extra = nn.BatchNorm1d(8)


def test_running_statistics_are_told_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"running statistics as trained \(1 layers, such as 'encoder.extra'\)"):
        FILTERED.fit(WiSEFT(0.5), module=Normed(), max_epochs=1, default_root_dir=tmp_path)


def test_adapters_are_refused() -> None:
    peft = pytest.importorskip("peft")
    module = Filtered()
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["linear1"]), module)
    with pytest.raises(ValueError, match=r"is an adapter of peft: scale or merge it"):
        FILTERED.fit(WiSEFT(0.5), module=module)


class Headless(Filtered):
    def __init__(self) -> None:
        super().__init__()
        del self.classifier

    def forward(self, tokens: Tensor) -> Tensor:
        return self.encoder(tokens)[:, 0, :2]


def test_no_head_is_told_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="found no head in Headless and interpolates every layer"):
        FILTERED.fit(WiSEFT(0.5), module=Headless(), max_epochs=1, default_root_dir=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ({"alphas": []}, {}, r"alphas=\[\] must be in \[0, 1\], one or more"),
        ({"alphas": 1.5}, {}, r"alphas=1.5 must be in \[0, 1\]"),
        ({"mode": "best"}, {}, "mode='best' must be"),
        ({"storage": "bf16"}, {}, 'storage="bf16" rounds θ⁰'),
        ({}, {"limit_val_batches": 0}, "chooses α on validation data, and this fit has none"),
    ],
)
def test_bad_input(arguments: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FILTERED.fit(WiSEFT(**arguments), **options)


def test_another_callbacks_rounded_start_is_refused() -> None:
    with pytest.raises(ValueError, match=r'WiSEFT needs θ⁰ unrounded, .* say "cpu" there'):
        FILTERED.fit(L2SP(0.1, storage="bf16"), WiSEFT(0.5))
    with pytest.raises(ValueError, match=r"alpha=2 must be in \[0, 1\]"):
        interpolate_weights([], [], [], 2)


# --- processes ---------------------------------------------------------------------------------------------------


class TwoRanks(Filtered):
    """Each rank sees half of the rows, logs its own loss, and knows no one else's."""

    def __init__(self) -> None:
        super().__init__(dropout=0)

    def train_dataloader(self) -> Any:
        rank, world = self.trainer.global_rank, self.trainer.world_size
        # Lightning's own would shuffle.
        return DataLoader(dataset(), 4 // world, sampler=DistributedSampler(dataset(), world, rank, shuffle=False))

    def val_dataloader(self) -> Any:
        return DataLoader(dataset(), 6)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def fit(folder: str, **options: Any) -> dict[str, Any]:
    two = {"strategy": options.get("strategy") or DDPStrategy(process_group_backend="gloo"), "devices": RANKS}
    callback = WiSEFT([0.0, 0.3, 0.6, 1.0])
    settings = {**two, "use_distributed_sampler": True, "default_root_dir": folder, **options}
    trainer = FILTERED.fit(callback, module=TwoRanks(), **settings)
    assert callback.report is not None
    rows = [{key: float(value) for key, value in row.items()} for row in callback.report.rows]
    path = callback.checkpoint(trainer)
    stored = dict(torch.load(path, weights_only=True)["state_dict"]) if path.exists() else {}  # of rank 0
    return {
        "rows": rows,
        "chosen": callback.report.facts["chosen alpha"],
        "weights": weights(trainer.lightning_module),
        "stored": stored,
    }


def sharded() -> dict[str, Any]:
    """FSDP2: half of the way, of weights of which each process has a part."""
    import tempfile

    shared = [tempfile.mkdtemp()]
    torch.distributed.broadcast_object_list(shared)
    callback = WiSEFT(0.5)
    trainer, trace = train("fsdp2-whole", "steps", None, callback, max_epochs=1, default_root_dir=shared[0])
    return {"weights": whole(trainer), "trained": trace.weights[-1]}


def run() -> dict[str, Any]:
    import tempfile

    warnings.filterwarnings("ignore", message=".*recommended to use `self.log.*sync_dist=True")
    result = fit(tempfile.mkdtemp())
    return {"ddp": result, "sharded": sharded()}


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch with gloo")
def test_processes_choose_the_same_and_end_together(tmp_path: Path) -> None:
    first, second = run_ranks("tests.callbacks.test_wise_ft:run", tmp_path)
    assert identical(first["ddp"]["rows"], second["ddp"]["rows"])
    assert identical(first["ddp"]["weights"], second["ddp"]["weights"])
    assert identical(first["ddp"]["stored"], first["ddp"]["weights"])
    alone = fit(str(tmp_path / "alone"), strategy="auto", devices=1)
    for ours, theirs in zip(first["ddp"]["rows"], alone["rows"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    assert first["ddp"]["chosen"] == second["ddp"]["chosen"] == alone["chosen"]

    trainer, _ = train(None, "steps", max_epochs=1)
    start = weights(train(None, "steps", max_epochs=0)[0].lightning_module)
    end = line(start, weights(trainer.lightning_module), 0.5)
    for rank in (first, second):
        for name, value in rank["sharded"]["weights"].items():
            torch.testing.assert_close(value, end[name], rtol=0, atol=1e-5)
