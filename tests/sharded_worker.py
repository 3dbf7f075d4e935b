"""Two processes that shard a model on a CPU, in the ways that there are: :func:`run`, for ``tests.ranks``."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.utils.data import DataLoader

from lightning_ft.callbacks import EWC, L2SP, DiscriminativeLR, GradualUnfreezing
from lightning_ft.core.anchor import Anchor
from lightning_ft.core.layer_groups import LayerGroups
from lightning_ft.core.penalty import QuadraticPenalty
from lightning_ft.data.loader import ResumableDataLoader
from lightning_ft.data.sampler import LengthBucketSampler
from lightning_ft.functional.learning_rates import decay_groups
from tests.ddp_worker import TWICE, OldTask, metric
from tests.fisher_file import fisher_file
from tests.ranks import RANKS
from tests.strangers import BATCH, FILTERED, LENGTH, ROWS, WIDTH, Encoder, dataset, pretrained

Optimizer = Callable[[Any], torch.optim.Optimizer]


class NormFirst(Encoder):
    """Its final norm is registered before the blocks: registration order would take it for an embedding's."""

    def __init__(self) -> None:
        super().__init__(0.0)
        norm, layers = self._modules.pop("norm"), self._modules.pop("layers")
        self.norm, self.layers = norm, layers


class HeadFirst(LightningModule):
    """A head declared first, no dropout, each process its part of the batches; ``shard`` wraps it in its own way."""

    def __init__(self, shard: Callable[[Any], None] = lambda module: None, optimizer: Optimizer | None = None) -> None:
        super().__init__()
        self.shard = shard
        self.optimizer = optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.1))

    def configure_model(self) -> None:
        if not hasattr(self, "verdict"):
            self.verdict: Any = pretrained(nn.Linear, WIDTH, 2)
            self.thing_from_paris: Any = nn.ModuleDict({"inner": pretrained(NormFirst)})
            self.shard(self)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.verdict(self.thing_from_paris["inner"](tokens).mean(1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        tokens, labels = batch
        return nn.functional.cross_entropy(self(tokens), labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def on_validation_epoch_end(self) -> None:
        # On rank 0 it gets worse, so that phases end, on rank 1 it gets better.
        self.log("score", self.trainer.fit_loop.total_batch_idx * (-1.0 if self.trainer.global_rank else 1.0))

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())

    def val_dataloader(self) -> Any:
        return DataLoader(dataset(), BATCH)

    def train_dataloader(self) -> Any:
        rank, world = self.trainer.global_rank, self.trainer.world_size
        sampler = LengthBucketSampler([LENGTH] * ROWS, BATCH // world, num_replicas=world, rank=rank)
        return ResumableDataLoader(dataset(), sampler, trainer=self.trainer)


# Four ways to shard.


def fsdp2(module: Any) -> None:
    """Each block a unit; the encoder's rest and the head one more each."""
    inner = module.thing_from_paris["inner"]
    for part in (*inner.layers, inner, module.verdict):
        fully_shard(part, mesh=module.device_mesh["data_parallel"])


def fsdp2_whole(module: Any) -> None:
    """Some blocks units, all the rest one with the LightningModule: it holds frozen and training parameters."""
    for part in (*module.thing_from_paris["inner"].layers[1:], module):
        fully_shard(part, mesh=module.device_mesh["data_parallel"])


def fsdp1(module: Any, use_orig_params: bool = True) -> None:
    """By wrapping, under a strategy that lets it be."""

    def wrap(part: nn.Module) -> FSDP:
        return FSDP(part, use_orig_params=use_orig_params, device_id=torch.device("cpu"))

    inner = module.thing_from_paris["inner"]
    for i, block in enumerate(inner.layers):
        inner.layers[i] = wrap(block)
    module.thing_from_paris["inner"] = wrap(inner)
    module.verdict = wrap(module.verdict)


class LetsBe(DDPStrategy):
    """Two processes, and a model that is wrapped already."""

    def configure_ddp(self) -> None:
        pass


class OnCPU(FSDPStrategy):
    """Lightning's own strategy, which asks for a GPU only if it is exactly of its class, and for its number."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return FSDP(
            model,
            cpu_offload=self.cpu_offload,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            device_id=torch.device("cpu"),
            **self.kwargs,
        )


def let_be() -> Any:
    return LetsBe(process_group_backend="gloo")


def model_parallel(folder: bool = False) -> Any:
    return ModelParallelStrategy(RANKS, 1, save_distributed_checkpoint=folder, process_group_backend="gloo")


def lightnings_fsdp1() -> Any:
    return OnCPU(auto_wrap_policy={nn.TransformerEncoderLayer}, process_group_backend="gloo", state_dict_type="full")


SHARDINGS: dict[str, tuple[Callable[[Any], None], Callable[[], Any]]] = {
    "ddp": (
        lambda module: None,
        lambda: DDPStrategy(process_group_backend="gloo", find_unused_parameters=True),
    ),
    "fsdp2": (fsdp2, model_parallel),
    "fsdp2-whole": (fsdp2_whole, model_parallel),
    "fsdp1": (fsdp1, let_be),
    "fsdp1-lightning": (lambda module: None, lightnings_fsdp1),
}
"""Name to what ``configure_model`` does, and the strategy."""


class Trace(Callback):
    """After each batch all weights; before each step the tensors that train and what is wrong with gradients."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []
        self.trainable: list[int] = []
        self.wrong: list[str] = []
        self.penalty: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        for name, parameter in pl_module.named_parameters():
            # Of FSDP1's flat parameter a process may hold no value of this one.
            if parameter.requires_grad == (parameter.grad is None) and (
                parameter.numel() or not parameter.requires_grad
            ):
                self.wrong.append(f"step {trainer.global_step}: {name}")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        weights = whole(trainer)
        self.weights.append(torch.cat([weights[name].flatten() for name in sorted(weights)]))
        self.trainable.append(sum(p.requires_grad for p in pl_module.parameters()))
        if "l2_sp" in trainer.callback_metrics:
            self.penalty.append(float(trainer.callback_metrics["l2_sp"]))

    def result(self) -> dict[str, Any]:
        return {key: vars(self)[key] for key in ("weights", "trainable", "wrong", "penalty")}


class SaveAt(Callback):
    """Writes one checkpoint, before a batch."""

    def __init__(self, step: int, path: str) -> None:
        self.step, self.path = step, path

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def whole(trainer: Any) -> dict[str, Tensor]:
    """All parameters, gathered from both processes, by their unsharded names."""
    model = trainer.strategy.model
    wrapped = any(isinstance(child, FSDP) for child in model.modules())
    with FSDP.summon_full_params(model, writeback=False) if wrapped else nullcontext():
        return {
            name.replace("_fsdp_wrapped_module.", "").removeprefix("module."): (
                p.full_tensor() if hasattr(p, "full_tensor") else p.clone()
            ).detach()
            for name, p in model.named_parameters()
        }


SCENARIOS: dict[str, tuple[Callable[[], list[Callback]], dict[str, Any]]] = {
    "epochs": (lambda: [GradualUnfreezing("1 epoch")], {"max_epochs": 5, "limit_train_batches": 2}),
    "steps": (lambda: [DiscriminativeLR(0.5), GradualUnfreezing("1 steps")], {"max_epochs": 1}),
    "fraction": (lambda: [GradualUnfreezing(0.2)], {"accumulate_grad_batches": 2}),
    "metric": (lambda: [metric()], {**TWICE, "max_epochs": 5}),
}
"""Name to callbacks and options of the Trainer, for all ways of sharding."""

PENALISED: dict[str, tuple[Callable[[], list[Callback]], dict[str, Any]]] = {
    "coupled": (
        lambda: [
            L2SP(0.5, head_strength=0.1),
            EWC(0.5, fisher_file()),
            GradualUnfreezing("2 steps"),
            DiscriminativeLR(0.5),
        ],
        {"logger": DummyLogger(), "log_every_n_steps": 1, "gradient_clip_val": 1.0},
    ),
    "decoupled": (
        lambda: [
            GradualUnfreezing("2 steps"),
            L2SP(0.5, "decoupled", head_strength=0.1, storage="bf16"),
            EWC(0.5, fisher_file(), mode="decoupled"),
        ],
        {"logger": DummyLogger(), "log_every_n_steps": 1},
    ),
}
"""The same for FSDP2."""

RUNS: list[tuple[str, str]] = [
    *[("ddp", scenario) for scenario in ("epochs", "fraction")],
    ("fsdp2", "steps"),
    *[("fsdp2-whole", scenario) for scenario in (*SCENARIOS, *PENALISED)],
    *[("fsdp1", scenario) for scenario in SCENARIOS],
    ("fsdp1-lightning", "steps"),
]


def train(
    sharding: str | None, scenario: str, optimizer: Optimizer | None = None, *more: Callback, **options: Any
) -> tuple[Any, Trace]:
    """A trainer that has trained, and its trace; in one process without ``sharding``."""
    callbacks, defaults = {**SCENARIOS, **PENALISED}[scenario]
    shard, strategy = SHARDINGS[sharding] if sharding else (lambda module: None, lambda: "auto")
    trace = Trace()
    trainer = FILTERED.fit(
        *callbacks(),
        trace,
        *more,
        module=HeadFirst(shard, optimizer),
        **{
            "strategy": strategy(),
            "devices": RANKS if sharding else 1,
            "use_distributed_sampler": False,
            "limit_val_batches": 0,
            **defaults,
            **options,
        },
    )
    return trainer, trace


class Depth(Callback):
    """What is told of a module's depth, when training starts."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        groups = LayerGroups.of(pl_module)
        members = {name: [key for key, _ in groups.named_parameters(name)] for name in groups}
        shapes = {key: list(groups.shape_of(p)) for name in groups for key, p in groups.named_parameters(name)}
        names = {id(p): key for name in groups for key, p in groups.named_parameters(name)}
        by_regex = LayerGroups.of(pl_module, groups={"rest": "^thing_from_paris.inner", "head": r"^verdict\."})
        by_path = LayerGroups.of(pl_module, blocks="thing_from_paris.inner.layers", head="verdict")
        self.told = {
            "members": members,
            "shapes": shapes,
            "printed": repr(groups),
            "rates": DiscriminativeLR(0.5).multipliers(pl_module),
            "decay": [sorted(names[id(p)] for p in group["params"]) for group in decay_groups(pl_module, 0.1)],
            "by_regex": [key for key, _ in by_regex.named_parameters("head")],
            "by_path": repr(by_path),
        }


def depth(sharding: str | None) -> dict[str, Any]:
    told = Depth()
    train(sharding, "steps", None, told, max_steps=1)
    return told.told


RESUMED: dict[str, tuple[str, Optimizer, bool]] = {
    "adamw": ("fsdp2-whole", partial(torch.optim.AdamW, lr=1e-2), False),
    "folder": ("fsdp2", partial(torch.optim.SGD, lr=0.05, momentum=0.9), True),
}
"""Name to sharding, optimiser and whether the checkpoint is a folder."""


def resumed(name: str, folder: Path) -> dict[str, Any]:
    sharding, optimizer, as_folder = RESUMED[name]
    path = str(folder / name)
    _, straight = train(sharding, "coupled", optimizer, SaveAt(5, path), strategy=model_parallel(as_folder))
    _, again = train(sharding, "coupled", optimizer, strategy=model_parallel(as_folder), ckpt_path=path)
    return {"straight": straight.result(), "again": again.result()}


def error(function: Callable[[], Any]) -> str:
    try:
        function()
    except ValueError as raised:
        return str(raised)
    return "nothing was raised"


def refusals(folder: Path) -> dict[str, str]:
    def fit(shard: Callable[[Any], None], *callbacks: Callback, **options: Any) -> Any:
        module = HeadFirst(shard, RESUMED["adamw"][1])
        return FILTERED.fit(*callbacks, module=module, use_distributed_sampler=False, devices=RANKS, **options)

    def other_weights(module: Any) -> None:
        module.verdict.weight.data.add_(1)
        module.thing_from_paris["inner"].tokens.weight.data.add_(1)
        fsdp2_whole(module)

    class Pieces(HeadFirst):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(decay_groups(self.parameters(), 0.1), lr=0.1)

    penalised = PENALISED["coupled"][0]
    checkpoint = {"ckpt_path": str(folder / "adamw"), "max_epochs": 2, "strategy": model_parallel()}
    return {
        "flat": error(lambda: fit(partial(fsdp1, use_orig_params=False), GradualUnfreezing(), strategy=let_be())),
        "l2-sp": error(lambda: fit(fsdp1, L2SP(0.1), strategy=let_be())),
        "ewc": error(lambda: fit(fsdp2_whole, EWC(0.1, OldTask(), variant="empirical"), strategy=model_parallel())),
        "disk": error(lambda: fit(fsdp2_whole, L2SP(0.1, storage="disk"), strategy=model_parallel())),
        "decay": error(lambda: FILTERED.fit(module=Pieces(fsdp1), devices=RANKS, strategy=let_be())),
        "anchor": error(lambda: fit(other_weights, *penalised(), **checkpoint)),
    }


def anchored() -> dict[str, Any]:
    """An anchor and a penalty of a sharded layer, whose rows do not divide by two, beside those of the whole one."""
    layer = pretrained(nn.Linear, 5, 3)
    early = Anchor.capture(layer.named_parameters())
    start = [p.detach().clone() for p in layer.parameters()]
    fully_shard(layer, mesh=init_device_mesh("cpu", (RANKS,)))
    anchor = Anchor.capture(layer.named_parameters())
    penalty = QuadraticPenalty(0.5, anchor.like(layer.named_parameters()))
    parameters = list(layer.parameters())
    for parameter, value in zip(parameters, start, strict=True):
        parameter.data.add_(distribute_tensor(value.sin(), parameter.device_mesh, parameter.placements))
    gradients = torch.autograd.grad(penalty.value(parameters), parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    penalty.add_grad_(parameters)
    added = [p.grad.full_tensor() for p in parameters]
    penalty.pull_(parameters, learning_rate=0.1)
    return {
        "value": float(penalty.value(parameters).detach()),
        "autograd": [g.full_tensor() for g in gradients],
        "added": added,
        "pulled": [p.full_tensor().detach() for p in parameters],
        "fingerprint": anchor.fingerprint(),
        "early": error(lambda: early.like(layer.named_parameters())),
    }


def run() -> dict[str, Any]:
    warnings.filterwarnings("ignore", message=".*find_unused_parameters=True was specified in DDP constructor")
    warnings.filterwarnings("ignore", message=".*recommended to use `self.log.*sync_dist=True")
    results: dict[str, Any] = {f"{s}/{c}": train(s, c)[1].result() for s, c in RUNS}
    results["anchored"] = anchored()
    results["depth"] = {sharding: depth(sharding) for sharding in SHARDINGS}
    # The first process chooses the folder.
    shared = [tempfile.mkdtemp()]
    torch.distributed.broadcast_object_list(shared)
    folder = Path(shared[0])
    results["resumed"] = {name: resumed(name, folder) for name in RESUMED}
    results["refusals"] = refusals(folder)
    return results
