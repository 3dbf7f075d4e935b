"""PEFT: LoRA, IA3, learnt prompts and the other methods of peft, in any LightningModule."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_ft.callbacks._altering import Altering
from lightning_ft.callbacks._quadratic_pull import pending_scale
from lightning_ft.callbacks._split_rates import SplitRates
from lightning_ft.callbacks._trainer import refuse_deepspeed, training_length
from lightning_ft.core.layers import Layers, plain_layers
from lightning_ft.core.report import Report
from lightning_ft.functional.adalora import RankBudget
from lightning_ft.functional.peft_config import changes_base, plain_config
from lightning_ft.functional.peft_parts import find_transformer, second_factors

if TYPE_CHECKING:
    from peft import PeftConfig


class PEFT(Callback):
    """Train an adapter of peft and the head, and nothing else, in the transformer inside any LightningModule.

    LoRA: W + (α/r)BA with A, B of rank r, B = 0 at the start; DoRA, rsLoRA, PiSSA, AdaLoRA, IA3, TrainableTokens and
    whatever else of peft is put into layers; prompt tuning, P-tuning and prefix tuning. See
    :func:`lightning_ft.functional.peft_methods.adapt` for what is adapted and what trains.

    The model is changed in ``setup`` of every stage (or at the end of ``configure_model``), before a checkpoint is
    restored, before optimisers are made and before the model is wrapped, and stays so after the fit. Checkpoints hold
    the adapter and the head alone, with a hash of the base, and remember the configuration;
    :func:`~lightning_ft.functional.peft_adapters.save_adapter` writes a folder in peft's format,
    :func:`~lightning_ft.functional.peft_merge.merge` makes a plain model of it. With ``FourBit`` or ``EightBit``, whose
    layers are quantised before (PiSSA: after) the adapter comes, this is QLoRA.

    AdaLoRA: ranks are cut after each optimiser step that was made (a step post-hook), and the orthogonal penalty's
    gradient is added in ``on_before_optimizer_step``, once a step, instead of to each micro-batch's loss;
    ``total_step`` is that of the run, where its end is known, whatever the configuration says.

    The mode of modules is left as it is: new layers are in train mode, and a model that ``from_pretrained`` gave in
    eval mode would train its adapters with their dropout but without its own; ``TrainingModeCheck`` finds that.

    Args:
        config: Any configuration of peft for which the above holds; in YAML ``class_path: peft.LoraConfig`` with
            ``init_args``. ``target_modules`` is peft's own choice for the model by default, else all linear layers.
        module: Path of the model to adapt, where there are several.
        name: Of the adapter.
        loraplus_ratio: LoRA+: the factor on the learning rate of B, 16 in the paper; the optimiser's rate is A's.
        seed: Of the adapter's first weights; the same on all ranks.
        layers: Where the head is, if it is not found by itself.

    Attributes:
        report: What was adapted in this stage; None where it was done before.

    Raises:
        TypeError: ``config`` is none of peft's.
        ValueError: What :func:`~lightning_ft.functional.peft_methods.adapt` refuses; an argument is out of range; DoRA
            over quantised weights.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from peft import LoraConfig
        >>> trainer = Trainer(callbacks=[PEFT(LoraConfig(r=8, lora_alpha=16))], logger=False)

    Reference:
        Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models"; Hayou, Ghosh and Yu 2024, "LoRA+".
    """

    def __init__(
        self,
        config: PeftConfig,
        *,
        module: str | None = None,
        name: str = "default",
        loraplus_ratio: float | None = None,
        seed: int = 0,
        layers: Layers | None = None,
    ) -> None:
        self.config = plain_config(config)
        if loraplus_ratio is not None and not loraplus_ratio > 0:
            raise ValueError(f"loraplus_ratio={loraplus_ratio} must be above 0: 16 in the paper, 1 for the same rate")
        if loraplus_ratio is not None and self.config["peft_type"] != "LORA":
            raise ValueError(f"loraplus_ratio is for LoRA, and config is of {self.config['peft_type']}: leave it out")
        self.module = module
        self.name = name
        self.loraplus_ratio = loraplus_ratio
        self.layers = layers or Layers()
        where = {"transformer": module, "layers": plain_layers(layers)}
        self._altering = Altering(
            "peft",
            {"config": self.config, "adapter": name, "seed": seed, **where},
            quantised=not changes_base(self.config),
        )
        self._splits: list[SplitRates] = []
        self._hooks: list[RemovableHandle] = []
        self._stepping: list[Optimizer] = []
        self._budget: RankBudget | None = None
        self._saved: dict[str, Any] | None = None

    @property
    def report(self) -> Report | None:
        """What was adapted in this stage; None where it was done before."""
        return self._altering.report

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()
        quantise = getattr(trainer.precision_plugin, "quantise", None)
        if quantise is not None and self.config.get("use_dora"):
            raise ValueError(
                f"config: DoRA measures the base's weights, which {type(trainer.precision_plugin).__name__} quantises: "
                "use_dora=False, or train without quantisation"
            )
        self._altering.setup(trainer, pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.report is not None:
            rank_zero_info(f"PEFT: {self.report}")
        _, target = find_transformer(pl_module, self.module, self.layers)
        if self.loraplus_ratio is not None:
            refuse_deepspeed(trainer, self)
            factors = {id(p): self.loraplus_ratio for p in second_factors(target, self.name)}
            self._splits = [SplitRates(optimizer, factors) for optimizer in trainer.optimizers]
        if self.config["peft_type"] == "ADALORA":
            self._begin_budget(trainer, target)

    def _begin_budget(self, trainer: Trainer, target: Any) -> None:
        refuse_deepspeed(trainer, self)
        if any(pending_scale(trainer, optimizer) is not None for optimizer in trainer.optimizers):
            raise ValueError(
                "AdaLoRA needs unscaled gradients after a step, and a fused optimiser keeps them scaled "
                "under fp16: use fused=False"
            )
        _, total = training_length(trainer)
        steps = int(total) if math.isfinite(total) else None
        self._budget = RankBudget(target, target.peft_config[self.name], self.name, total=steps)
        if self._saved is not None:
            self._budget.load_state_dict(self._saved)
            self._saved = None
        mine = {id(p) for p in self._budget.parameters}
        for optimizer in trainer.optimizers:
            if any(id(p) in mine for group in optimizer.param_groups for p in group["params"]):
                self._hooks.append(optimizer.register_step_post_hook(self._stepped))
                self._stepping.append(optimizer)

    def _stepped(self, *_: Any) -> None:
        assert self._budget is not None
        self._budget.update()

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        # Lightning hands out a wrapper in manual optimisation, which shares the groups.
        if self._budget is not None and any(o.param_groups is optimizer.param_groups for o in self._stepping):
            self._budget.add_penalty_grad_()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        self._altering.release()
        for split in self._splits:
            split.remove()
        self._splits = []
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._stepping = []
        self._budget = None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {} if self._budget is None else {"budget": self._budget.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict.get("budget")
