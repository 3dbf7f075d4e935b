"""Optimiser states in eight bits, for any project."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast, get_args

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer
from typing_extensions import override

from lightning_ft.core.report import Report
from lightning_ft.functional.eight_bit_optimizer import eight_bit, embedding_parameters, repoint, state_report
from lightning_ft.functional.quantised_tensor import import_bitsandbytes

Rule = Literal["same", "adamw", "lion", "paged_same", "paged_adamw", "paged_lion"]
_SHARDED = ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy", "XLAFSDPStrategy")


class EightBitOptimizer(Callback):
    """Keep the states of the project's own optimiser in eight bits: two bytes a weight for AdamW instead of eight.

    m and v are kept as 8-bit codes in blocks of 256 values with one fp32 scale each, and are fp32 while a step runs.
    What ``configure_optimizers`` returns is taken over as it is made: groups, rates, decays, schedulers, hooks; so
    depth-wise rates, schedules, clipping, accumulation, fp16 scaling and exact resume work as before. States of
    embeddings, whose gradients are sparse and uneven, stay in 32 bits, as do those of small tensors. See
    :func:`lightning_ft.functional.eight_bit_optimizer.eight_bit`.

    It replaces AdamW, Adam without decay, and SGD with momentum of ``torch.optim``. A checkpoint resumes with the same
    setting only. The states exist from the first step on; :attr:`report` is made when training ends.

    Args:
        rule: ``"same"``: the project's own, in 8 bits. ``"adamw"``; ``"lion"``: Lion in place of the project's AdamW or
            Adam, with half the states: its authors take a rate 3 to 10 times smaller and a decay as much larger, which
            the project must set. With ``paged_`` before it the states may move to host memory where the GPU's is short.
        min_size: Tensors with fewer values keep states in 32 bits; bitsandbytes' 4096.
        embedding_bits: 32, or 8 for embeddings, too.
        betas: In the place of the project's own; Lion's are 0.9 and 0.99 by default.

    Raises:
        ValueError: An argument is out of range; an option of the optimiser has no counterpart in 8 bits; the
            checkpoint's states are others; FSDP, ModelParallel, DeepSpeed.
        TypeError: The project has another optimiser.
        ImportError: bitsandbytes is not installed.

    Example:
        >>> EightBitOptimizer("paged_adamw").rule
        'paged_adamw'

    Reference:
        Dettmers, Lewis, Shleifer and Zettlemoyer 2022, "8-bit Optimizers via Block-wise Quantization".
    """

    def __init__(
        self,
        rule: Rule = "same",
        *,
        min_size: int = 4096,
        embedding_bits: Literal[8, 32] = 32,
        betas: tuple[float, float] | None = None,
    ) -> None:
        if rule not in get_args(Rule):
            raise ValueError(f"rule={rule!r} must be one of {', '.join(get_args(Rule))}")
        if min_size < 0:
            raise ValueError(f"min_size={min_size} must be 0 or more: a number of values")
        if embedding_bits not in (8, 32):
            raise ValueError(f"embedding_bits={embedding_bits} must be 8 or 32")
        if betas is not None and not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={betas} must be in [0, 1)")
        import_bitsandbytes()
        self.rule = rule
        self.min_size = min_size
        self.embedding_bits = embedding_bits
        self.betas = None if betas is None else (betas[0], betas[1])
        self.report: Report | None = None
        self._restore: Callable[[], None] = _nothing

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._release()
        self.report = None
        strategy = next((k.__name__ for k in type(trainer.strategy).__mro__ if k.__name__ in _SHARDED), None)
        if strategy is not None:
            raise ValueError(
                f"EightBitOptimizer does not run under {strategy}, whose shards cut through the blocks of 8-bit "
                "states: use DDP or one device"
            )
        # On the instance, since no hook lies between the making of optimisers and those who then hook into them.
        configure, own = pl_module.configure_optimizers, vars(pl_module)
        before = {name: own[name] for name in ("configure_optimizers",) if name in own}  # LightningCLI's
        own["configure_optimizers"] = lambda: self._converted(pl_module, configure)

        def restore() -> None:
            del own["configure_optimizers"]
            own.update(before)

        self._restore = restore

    def _converted(self, module: LightningModule, configure: Callable[[], Any]) -> Any:
        self._release()
        result = configure()
        replaced: dict[int, tuple[Optimizer, Optimizer]] = {}
        result = _map_optimizers(result, lambda optimizer: self._replace(optimizer, module, replaced))
        for old, new in replaced.values():
            for scheduler in _schedulers(result):
                repoint(scheduler, old, new)
            for name, value in list(vars(module).items()):
                if value is old:
                    vars(module)[name] = new
        return result

    def _replace(
        self, optimizer: Optimizer, module: LightningModule, replaced: dict[int, tuple[Optimizer, Optimizer]]
    ) -> Optimizer:
        if id(optimizer) not in replaced:
            rule = cast('Literal["same", "adamw", "lion"]', self.rule.removeprefix("paged_"))
            new = eight_bit(
                optimizer,
                rule,
                full=embedding_parameters(module) if self.embedding_bits == 32 else (),
                min_size=self.min_size,
                paged=self.rule != rule and module.device.type != "cpu",  # there it would only warn
                betas=self.betas,
            )
            replaced[id(optimizer)] = (optimizer, new)
        return replaced[id(optimizer)][1]

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.report = state_report(trainer.optimizers, pl_module)
        rank_zero_info(str(self.report))

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        restore, self._restore = self._restore, _nothing
        restore()


def _nothing() -> None:
    pass


def _map_optimizers(result: Any, change: Callable[[Optimizer], Optimizer]) -> Any:
    """What ``configure_optimizers`` returned, of whichever of Lightning's forms, with other optimisers."""
    if isinstance(result, Optimizer):
        return change(result)
    if isinstance(result, dict):
        return {name: _map_optimizers(value, change) for name, value in result.items()}
    if isinstance(result, (list, tuple)):
        return type(result)(_map_optimizers(value, change) for value in result)
    return result


def _schedulers(result: Any) -> list[Any]:
    if isinstance(result, (dict, list, tuple)):
        values = result.values() if isinstance(result, dict) else result
        return [scheduler for value in values for scheduler in _schedulers(value)]
    return [result] if hasattr(result, "step") and not isinstance(result, Optimizer) else []
