"""One of two processes that train sharded models on a CPU: functions for ``tests.ranks.run_ranks``."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard

from lightning_ft.callbacks import DiscriminativeLR, GradualUnfreezing
from lightning_ft.core.layer_groups import LayerGroups
from lightning_ft.data.loader import ResumableDataLoader
from lightning_ft.data.sampler import LengthBucketSampler
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

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())

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


def model_parallel() -> Any:
    return ModelParallelStrategy(RANKS, 1, save_distributed_checkpoint=False, process_group_backend="gloo")


def lightnings_fsdp1() -> Any:
    return OnCPU(auto_wrap_policy={nn.TransformerEncoderLayer}, process_group_backend="gloo", state_dict_type="full")


SHARDINGS: dict[str, tuple[Callable[[Any], None], Callable[[], Any]]] = {
    "ddp-find-unused": (
        lambda module: None,
        lambda: DDPStrategy(process_group_backend="gloo", find_unused_parameters=True),
    ),
    "fsdp2": (fsdp2, model_parallel),
    "fsdp2-whole": (fsdp2_whole, model_parallel),
    "fsdp1": (fsdp1, let_be),
    "fsdp1-lightning": (lambda module: None, lightnings_fsdp1),
}
"""Name to what ``configure_model`` does, and the strategy."""


def whole(trainer: Any) -> dict[str, Tensor]:
    """All parameters, gathered from both processes, by their unsharded names."""
    model = trainer.strategy.model
    wrapped = any(isinstance(child, FSDP) for child in model.modules())
    with FSDP.summon_full_params(model, writeback=False) if wrapped else nullcontext():
        return {
            name.replace("_fsdp_wrapped_module.", "").removeprefix("module."): getattr(
                p, "full_tensor", p.detach().clone
            )().detach()
            for name, p in model.named_parameters()
        }


class Trace(Callback):
    """All weights after each batch, the tensors that trained in it, and those that got a gradient."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []
        self.trainable: list[int] = []
        self.names: list[list[str]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        weights = whole(trainer)
        self.weights.append(torch.cat([weights[name].flatten() for name in sorted(weights)]))
        self.trainable.append(sum(p.requires_grad for p in pl_module.parameters()))


SCENARIOS: dict[str, tuple[Any, dict[str, Any]]] = {
    "epochs": (lambda: [GradualUnfreezing("1 epoch")], {"max_epochs": 6}),
    "steps": (lambda: [DiscriminativeLR(0.5), GradualUnfreezing("2 steps")], {"max_epochs": 2}),
    "fraction": (lambda: [GradualUnfreezing(0.2)], {"max_epochs": 3, "accumulate_grad_batches": 2}),
}


def train(sharding: str | None, scenario: str, optimizer: Optimizer | None = None, **options: Any) -> Any:
    """A trainer that has trained, and its trace; in one process without ``sharding``."""
    callbacks, defaults = SCENARIOS[scenario]
    shard, strategy = SHARDINGS[sharding] if sharding else (lambda module: None, lambda: "auto")
    trace = Trace()
    single = {} if sharding else {"devices": 1}
    trainer = FILTERED.fit(
        *callbacks(),
        trace,
        *options.pop("callbacks", []),
        module=HeadFirst(shard, optimizer),
        use_distributed_sampler=False,
        **{"strategy": strategy(), "devices": RANKS, "limit_val_batches": 0, **single, **defaults, **options},
    )
    return trainer, trace


def traces() -> dict[str, Any]:
    warnings.filterwarnings("ignore", message=".*find_unused_parameters=True was specified in DDP constructor")
    results: dict[str, Any] = {}
    for sharding in SHARDINGS:
        for scenario in SCENARIOS:
            try:
                trainer, trace = train(sharding, scenario)
                groups = LayerGroups.of(trainer.lightning_module)
                results[f"{sharding}/{scenario}"] = {"weights": trace.weights, "trainable": trace.trainable}
            except Exception as error:
                import traceback
                traceback.print_exc()
                print("FAILED", sharding, scenario, repr(error))
    return results


class SaveAt(Callback):
    """Writes one checkpoint, at the start of a batch."""

    def __init__(self, step: int, path: str) -> None:
        self.step, self.path = step, path

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def resumed() -> dict[str, Any]:
    from functools import partial
    results = {}
    for sharding in ("fsdp2", "fsdp2-whole"):
        for oname, optimizer in {
            "momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
            "adamw": partial(torch.optim.AdamW, lr=1e-2),
        }.items():
          try:
            folder = Path(f"/tmp/shd/resume-{sharding}-{oname}")
            trainer, trace = train(sharding, "steps", optimizer, max_epochs=3, callbacks=[SaveAt(5, str(folder))])
            again, more = train(sharding, "steps", optimizer, max_epochs=3, ckpt_path=str(folder))
            results[sharding + "/" + oname] = {"weights": trace.weights, "more": more.weights, "trainable": trace.trainable, "more_trainable": more.trainable}
          except Exception as error:
                import traceback
                traceback.print_exc()
                print("FAILED", sharding, oname, repr(error))
    return results
