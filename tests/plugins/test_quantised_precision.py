"""FourBit and EightBit in a Trainer: what trains, exact resume, checkpoints of every kind, ranks, refusals."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins.precision.bitsandbytes import _import_bitsandbytes
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.plugins.precision import BitsandbytesPrecision, HalfPrecision, MixedPrecision
from torch import Tensor, nn

from lightning_ft.callbacks import DiscriminativeLR, ExactResume, Freeze
from lightning_ft.functional.alterations import load_altered
from lightning_ft.functional.quantise import quantised_layers
from lightning_ft.functional.quantised_layers import QuantisedLinear
from lightning_ft.functional.quantised_tensor import Format, QuantisedTensor
from lightning_ft.plugins.eight_bit import EightBit
from lightning_ft.plugins.four_bit import FourBit
from tests.callbacks.test_exact_resume import BATCHES, Kill, Killed
from tests.ranks import run_ranks
from tests.strangers import STILL, STRANGERS, Filtered, Stranger, identical, outcome, weights

OURS = [stranger for stranger in STRANGERS if stranger.name != "legacy"]
PLUGINS: dict[str, Any] = {
    "nf4": FourBit,
    "fp4-plain": lambda: FourBit("fp4", False, block_size=32),
    "nf4-bf16": lambda: FourBit(compute="bf16-mixed"),
    "nf4-fp16": lambda: FourBit(compute="16-mixed"),
    "int8": EightBit,
    "int8-fp16": lambda: EightBit(0.0, compute=fp16()),
}

each_plugin = pytest.mark.parametrize("make", PLUGINS.values(), ids=PLUGINS)


def fp16() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3))


class Adapted(Filtered):
    """The stranger with LoRA of its own on the first linear layer of each block."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__(dropout)
        self.encoder.requires_grad_(False)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            for block in self.encoder.layers:
                block.linear1 = Lora(block.linear1)


class Lora(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(8, 2, bias=False), nn.Linear(2, 16, bias=False)
        nn.init.zeros_(self.up.weight)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, input: Tensor) -> Tensor:
        return self.base(input) + self.up(self.down(input))


ADAPTED = Stranger("adapted", Adapted)


def bits(module: Any) -> dict[str, Any]:
    """Packed parts as they are, and the other tensors."""
    state = {name: v.parts if isinstance(v, QuantisedTensor) else v for name, v in module.state_dict().items()}
    return copy.deepcopy(state)


@pytest.mark.parametrize("stranger", [*OURS, ADAPTED], ids=lambda stranger: stranger.name)
@each_plugin
def test_trains_all_but_what_it_packed(stranger: Stranger, make: Any) -> None:
    module, plugin, start = stranger.module(), make(), {}

    class Before(Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            start.update(bits(pl_module))
            assert plugin.report is not None

    options = {} if stranger.name == "manual" else {"gradient_clip_val": 1.0, "accumulate_grad_batches": 2}
    if stranger.name == "late":
        options.pop("gradient_clip_val")  # its optimiser is fused
    stranger.fit(Before(), module=module, plugins=[plugin], **options)
    packed = quantised_layers(module)
    assert plugin.report.facts["layers"] == len(packed) > 0
    end = bits(module)
    for path, layer in packed.items():
        assert identical(end[f"{path}.weight"], start[f"{path}.weight"])
        assert layer.weight.dtype == torch.int8
        assert layer.form.kind == plugin.report.facts["format"].split(",")[0]
    moved = {name for name in end if not identical(end[name], start[name])}
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert moved <= trained
    # The gradient of a key's bias is zero, and Late's pooler may be too small for bf16 to move.
    assert len(moved) > 0.8 * len(trained)
    for parameter in module.parameters():
        assert parameter.dtype == (torch.float32 if parameter.is_floating_point() else torch.int8)


@pytest.mark.parametrize("make", [FourBit, EightBit])
def test_one_step_with_adapters_changes_adapters_and_head_alone(make: Any) -> None:
    module = Adapted()
    before = weights(module)
    trainer = ADAPTED.fit(module=module, plugins=[make()], max_steps=2)
    assert trainer.precision_plugin.report.facts["frozen"] == 0
    assert "encoder.layers.0.linear1.down" in trainer.precision_plugin.report.facts["left"]
    assert len(quantised_layers(module)) == 6
    after = module.state_dict()
    assert after.keys() == before.keys()
    moved = {
        name for name in before if not isinstance(after[name], QuantisedTensor) and not after[name].equal(before[name])
    }
    blocks = range(3)
    adapters = {f"encoder.layers.{i}.linear1.{part}.weight" for i in blocks for part in ("up", "down")}
    assert moved == adapters | {"classifier.weight", "classifier.bias"}


@each_plugin
@pytest.mark.parametrize(
    ("name", "epoch", "batch"), [("adapted", 1, 3), ("filtered", 0, BATCHES - 1), ("late", 1, 2), ("head-first", 1, 0)]
)
def test_resumes_exactly(make: Any, name: str, epoch: int, batch: int, tmp_path: Path) -> None:
    stranger = {stranger.name: stranger for stranger in [*OURS, ADAPTED]}[name]

    def run(folder: Path, *more: Any, **options: Any) -> Any:
        callbacks = [ExactResume("1 steps", dirpath=folder), DiscriminativeLR(0.7), *more]
        settings = {"accumulate_grad_batches": 2, "val_check_interval": 3, "plugins": [make()]}
        trainer = stranger.fit(*callbacks, **settings, default_root_dir=folder, **options)
        state = {**outcome(trainer), "weights": bits(trainer.lightning_module)}
        return state, trainer.precision_plugin.state_dict()

    whole = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "killed", Kill("on_after_backward", epoch, batch))
    assert identical(run(tmp_path / "killed", ckpt_path=tmp_path / "killed" / "last.ckpt"), whole)


@pytest.mark.parametrize("make", [FourBit, EightBit])
@pytest.mark.parametrize("compute", ["32-true", "bf16-mixed", "16-mixed"])
def test_computes_in_the_precision_that_was_asked_for(make: Any, compute: Any) -> None:
    dtypes = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    module, seen = Filtered(dropout=0), set()

    class Watch(Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            layer = pl_module.encoder.layers[0].linear1
            layer.register_forward_hook(lambda layer, args, output: seen.add(output.dtype))

    trainer = STILL.fit(Watch(), module=module, plugins=[make(compute=compute)], max_epochs=1)
    assert seen == {dtypes[compute]}
    assert trainer.precision == compute
    assert (trainer.scaler is not None) == (compute == "16-mixed")


def test_scale_of_fp16_is_restored(tmp_path: Path) -> None:
    trainer = STILL.fit(plugins=[EightBit(compute=fp16())], max_epochs=1)
    assert trainer.scaler.get_scale() == 1024.0  # doubled after each third of six steps
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed = STILL.fit(plugins=[EightBit(compute=fp16())], max_epochs=1, ckpt_path=tmp_path / "a.ckpt")
    assert resumed.scaler.get_scale() == 1024.0


def test_computes_as_the_float_model_of_its_weights(tmp_path: Path) -> None:
    """A quantised run and a float run from the dequantised weights, both with frozen backbones, take the same steps."""

    def run(*callbacks: Any, module: Any = None, **options: Any) -> Any:
        return STILL.fit(Freeze("head"), *callbacks, module=module, max_epochs=1, **options).lightning_module

    quantised = run(plugins=[FourBit(double=False)])
    plain = Filtered(dropout=0)
    plain.load_state_dict({n: t for n, t in quantised.state_dict().items() if "classifier" not in n}, strict=False)
    plain = run(module=plain)
    torch.testing.assert_close(plain.classifier.weight, quantised.classifier.weight, rtol=0, atol=1e-5)


# ---- checkpoints


class Packed(Callback):
    """Quantises early, as a callback that puts adapters in does."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        trainer.precision_plugin.quantise(pl_module)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("saved")
    files: dict[str, Any] = {}
    for name, plugins in {"packed": [FourBit()], "float": []}.items():
        trainer = STILL.fit(max_epochs=1, plugins=plugins)
        trainer.save_checkpoint(folder / f"{name}.ckpt")
        trainer.save_checkpoint(folder / f"{name}-weights.ckpt", weights_only=True)
        files[name] = trainer.lightning_module
        files[f"{name}-loss"] = trainer.validate(trainer.lightning_module, verbose=False)[0]["val_loss"]
    return folder, files


@pytest.mark.parametrize("suffix", ["", "-weights"])
@pytest.mark.parametrize("early", [[], [Packed()]], ids=["late", "early"])
def test_a_packed_checkpoint_in_a_fresh_module(suffix: str, early: Any, saved: Any) -> None:
    folder, files = saved
    module, path = Filtered(dropout=0), folder / f"packed{suffix}.ckpt"
    stored = torch.load(path, weights_only=True)["state_dict"]
    assert stored.keys() == module.state_dict().keys()
    assert stored["encoder.layers.0.linear1.weight"].parts["codes"].dtype == torch.uint8
    losses = STILL.trainer(early, plugins=[FourBit()]).test(module, ckpt_path=path, verbose=False)
    assert identical(bits(module), bits(files["packed"]))
    assert losses[0]["test_loss"] == files["packed-loss"]


def test_a_float_checkpoint_is_quantised(saved: Any) -> None:
    folder, files = saved
    module = Filtered(dropout=0)
    STILL.trainer(plugins=[FourBit()]).test(module, ckpt_path=folder / "float.ckpt", verbose=False)
    for path, layer in quantised_layers(module).items():
        source = files["float"].get_submodule(path)
        assert identical(layer.parts(), QuantisedLinear(source, Format("nf4")).parts())


def test_without_the_plugin_the_weights_are_the_dequantised_ones(saved: Any) -> None:
    folder, files = saved
    module = Filtered(dropout=0)
    losses = STILL.trainer().test(module, ckpt_path=folder / "packed.ckpt", verbose=False)
    assert not quantised_layers(module)
    for path, layer in quantised_layers(files["packed"]).items():
        assert torch.equal(module.get_submodule(path).weight, layer.dequantised())
    assert losses[0]["test_loss"] == pytest.approx(files["packed-loss"], abs=1e-5)


def test_another_format_takes_what_the_checkpoint_stands_for(saved: Any) -> None:
    folder, files = saved
    module = Filtered(dropout=0)
    STILL.trainer(plugins=[EightBit()]).test(module, ckpt_path=folder / "packed.ckpt", verbose=False)
    for path, layer in quantised_layers(files["packed"]).items():
        torch.testing.assert_close(quantised_layers(module)[path].dequantised(), layer.dequantised(), rtol=0, atol=2e-3)


# ---- where Lightning's own plugin stops


def test_lightnings_plugin_refuses_the_cpu_and_mixed_precision() -> None:
    with pytest.raises(RuntimeError, match="only supported on CUDA"):
        Trainer(plugins=[BitsandbytesPrecision("nf4")], accelerator="cpu", logger=False)
    with pytest.raises(ValueError, match="Choose one"):
        Trainer(plugins=[BitsandbytesPrecision("nf4")], precision="bf16-mixed", accelerator="cpu", logger=False)
    with pytest.raises(ValueError, match=r"only works with `dtype=torch\.float16`"):
        BitsandbytesPrecision("int8", dtype=torch.bfloat16)


def test_lightnings_layer_leaves_quantised_weights_of_a_checkpoint_out() -> None:
    """Its hook takes a weight of uint8 for one that is in place already; the missing key is then hidden."""
    _import_bitsandbytes()
    from lightning.fabric.plugins.precision import bitsandbytes as lightnings

    theirs = lightnings._NF4Linear(64, 64, bias=False)
    before = theirs.weight.detach().clone()
    packed = QuantisedLinear(nn.Linear(64, 64, bias=False), Format("nf4"))
    codes = packed.parts()["codes"].view(-1, 1)
    assert theirs.load_state_dict({"weight": codes.clone()}) == ([], [])
    assert torch.equal(theirs.weight, before)

    ours = QuantisedLinear(nn.Linear(64, 64, bias=False), Format("nf4"))
    ours.load_state_dict(packed.state_dict())
    assert torch.equal(ours.parts()["codes"].view(-1, 1), codes)


# ---- one plugin, several callers


def test_is_quantised_once(tmp_path: Path) -> None:
    plugin, module = FourBit(), Filtered(dropout=0)
    first = plugin.quantise(module)
    layers = quantised_layers(module)
    assert plugin.quantise(module) is first
    STILL.fit(Packed(), module=module, plugins=[plugin], max_epochs=1)
    assert plugin.report is first
    STILL.fit(module=module, plugins=[FourBit()], max_epochs=1)  # a second run of the same module
    assert quantised_layers(module) == layers
    with pytest.raises(ValueError, match=r"Filtered is quantised in another way already, and EightBit would"):
        EightBit().quantise(module)
    assert plugin.quantise(Filtered(dropout=0)) is not first


def test_a_stranger_is_loaded_from_its_file(saved: Any) -> None:
    folder, files = saved
    module = Filtered(dropout=0)
    load_altered(module, folder / "packed.ckpt")
    assert identical(bits(module), bits(files["packed"]))


def test_a_float_checkpoint_in_a_module_that_is_quantised_early_is_no_silent_mixture(saved: Any) -> None:
    folder, _ = saved
    trainer = STILL.trainer([Packed()], plugins=[FourBit()])
    with pytest.raises(ValueError, match=r"holds a model changed by nothing, and this one is changed by quantise"):
        trainer.test(Filtered(dropout=0), ckpt_path=folder / "float.ckpt", verbose=False)


def test_skip_reaches_the_layers() -> None:
    trainer = STILL.fit(plugins=[FourBit(skip=r"layers\.[01]\.")], max_epochs=1)
    packed = quantised_layers(trainer.lightning_module)
    assert set(packed) == {"encoder.layers.2.linear1", "encoder.layers.2.linear2"}


def test_biases_of_quantised_layers_train() -> None:
    """BitFit on four bits."""
    module = Filtered(dropout=0)
    before = weights(module)
    STILL.fit(Freeze("head", parameters=r"\.bias$"), module=module, plugins=[FourBit()], max_epochs=1)
    assert not torch.equal(module.encoder.layers[0].linear1.bias, before["encoder.layers.0.linear1.bias"])
    assert torch.equal(module.encoder.tokens.weight, before["encoder.tokens.weight"])


# ---- ranks


def quantised_on_a_rank() -> Any:
    from lightning.pytorch.strategies import DDPStrategy

    several = {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": 2, "use_distributed_sampler": False}
    trainer = ADAPTED.trainer(plugins=[FourBit()], max_epochs=1, limit_val_batches=0, **several)
    torch.manual_seed(0)
    module = Adapted(dropout=0)
    trainer.fit(module)
    return [bits(module), {name: p.requires_grad for name, p in module.named_parameters()}]


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch with gloo")
def test_ranks_hold_the_same_bits(tmp_path: Path) -> None:
    first, second = run_ranks("tests.plugins.test_quantised_precision:quantised_on_a_rank", tmp_path)
    assert identical(first, second)
    single = Adapted(dropout=0)
    start = weights(single)
    ADAPTED.fit(module=single, plugins=[FourBit()], max_epochs=0)
    assert identical(
        first[0]["encoder.layers.0.linear1.base.weight"], bits(single)["encoder.layers.0.linear1.base.weight"]
    )
    moved = "encoder.layers.0.linear1.up.weight"
    assert not torch.equal(first[0][moved], start[moved])


# ---- refusals and YAML


class Nothing(Filtered):
    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)


class FSDPStrategy:
    pass


class Derived(FSDPStrategy):
    pass


def test_nothing_left_that_trains() -> None:
    with pytest.raises(ValueError, match=r"nothing trains: FourBit froze all .* Add adapters \(LoRA\)"):
        STILL.fit(module=Nothing(), plugins=[FourBit()])
    STILL.trainer(plugins=[FourBit()]).validate(Nothing(), verbose=False)


def test_strategies_that_shard_are_refused() -> None:
    module = Filtered()
    trainer: Any = SimpleNamespace(strategy=Derived(), training=True)
    module.trainer = trainer
    with pytest.raises(ValueError, match=r"FourBit does not run under FSDPStrategy, which shards .* Use DDP or one"):
        FourBit().convert_module(module)
    with pytest.raises((TypeError, ValueError), match="FSDP"):
        Trainer(plugins=[FourBit()], strategy="fsdp", accelerator="cpu", devices=2, logger=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FourBit("int8"), r'kind=\'int8\' must be "nf4" or "fp4"; for 8 bits take EightBit'),
        (lambda: FourBit(block_size=1), r"block_size=1 must be one of"),
        (lambda: FourBit(compute="bf16-true"), r"compute='bf16-true' must be one of 32-true, bf16-mixed, 16-mixed"),
        (lambda: EightBit(compute=HalfPrecision()), r"compute='16-true' must be one of"),
        (lambda: EightBit(-1.0), r"threshold=-1.0 must be 0 or more"),
        (lambda: EightBit(float("nan")), r"threshold=nan must be 0 or more"),
    ],
)
def test_bad_arguments(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.filterwarnings("ignore")  # LightningCLI's own use of jsonargparse
def test_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["fit"])
    config = tmp_path / "config.yaml"
    config.write_text(
        """
        trainer:
          logger: false
          accelerator: cpu
          plugins:
            - class_path: lightning_ft.plugins.four_bit.FourBit
              init_args: {kind: fp4, double: false, skip: [query, key], compute: bf16-mixed}
        """
    )
    cli = LightningCLI(
        Filtered, run=False, args=["--config", str(config)], save_config_callback=None, seed_everything_default=False
    )
    plugin = cli.trainer.precision_plugin
    assert isinstance(plugin, FourBit)
    assert plugin._settings == {
        "kind": "fp4",
        "block_size": 64,
        "double": False,
        "threshold": 0.0,
        "skip": ["query", "key"],
        "layers": None,
    }
    assert cli.trainer.precision == "bf16-mixed"
    assert isinstance(cli.model, pl.LightningModule)
