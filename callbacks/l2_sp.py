"""L2-SP: pull the weights towards the pretrained ones instead of towards zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_ft.callbacks._trainer import refuse_deepspeed
from lightning_ft.core.anchor import Anchor
from lightning_ft.core.fresh import fresh_parameters
from lightning_ft.core.layers import Layers
from lightning_ft.core.penalty import QuadraticPenalty
from lightning_ft.core.sharding import is_piece


class L2SP(Callback):
    """Penalise the distance to the pretrained weights: Ω = (α/2) ‖θ − θ⁰‖² + (β/2) ‖θ_head‖².

    θ are the weights of embeddings, blocks and tail that train when the fit starts, θ⁰ their values before any
    checkpoint is restored, θ_head the new head. ``coupled``, the paper's form, adds the gradient of Ω in
    ``on_before_optimizer_step``: once an optimiser step whatever the accumulation, after unscaling and DDP's
    reduction, before clipping (which sees it). ``decoupled`` moves θ beside the optimiser, θ ← θ − ηα(θ − θ⁰), only
    when it really stepped. Under plain SGD both differ by η²α times the gradient only, since θ is pulled where the
    step left it; under Adam the coupled gradient is rescaled by 1/√v, and the decoupled pull per step is ηα: at
    η = 2e-5 the paper's α = 0.1 does nothing, and 50 matches its 1e-3 a step.

    Under FSDP2 (ModelParallelStrategy) each process anchors and pulls its own part of the weights.

    AdamW's own weight decay pulls towards zero at the same time: set it to 0 for a pure pull.

    Logs ``l2_sp`` (Ω) every ``log_every_n_steps`` steps where the trainer has a logger.

    Args:
        strength: α.
        mode: ``"coupled"`` or ``"decoupled"``.
        head_strength: β; 0 leaves the head to the optimiser's weight decay. The paper takes α = 0.1, β = 0.01.
        kernels_only: Leave out biases and norms (tensors of fewer than two dimensions), as the paper does.
        layers: Where the blocks and the head are, if they are not found by themselves; ``Layers(head=[])`` where there
            is no new head, as in a language model with a tied one. The group named ``head`` has no anchor, and neither
            have layers that LayerReinit drew anew: they count as head.

    Raises:
        ValueError: An argument is out of range; the pull ηα is 1 or more; nothing is there to anchor; on resume,
            the model does not start from the weights that the interrupted run was anchored to; FSDP1 or DeepSpeed.

    Reference:
        Li, Grandvalet and Davoine 2018, "Explicit Inductive Bias for Transfer Learning with Convolutional Networks".
    """

    def __init__(
        self,
        strength: float,
        mode: Literal["coupled", "decoupled"] = "coupled",
        *,
        head_strength: float = 0.0,
        kernels_only: bool = True,
        layers: Layers | None = None,
    ) -> None:
        if mode not in ("coupled", "decoupled"):
            raise ValueError(f'mode={mode!r} must be "coupled" (through the gradient) or "decoupled" (beside the step)')
        for argument, value in {"strength": strength, "head_strength": head_strength}.items():
            if not value >= 0:
                raise ValueError(f"{argument}={value!r} must be 0 or more")
        self.strength = strength
        self.mode = mode
        self.head_strength = head_strength
        self.kernels_only = kernels_only
        self.layers = layers or Layers()
        self._anchor: Anchor | None = None
        self._restored = False
        self._fingerprint: dict[str, float] | None = None
        self._terms: list[_Term] = []
        self._handles: list[RemovableHandle] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._anchor, self._fingerprint, self._restored = None, None, False

        def capture(module: nn.Module, *_: Any) -> None:
            self._anchor = Anchor.capture(self._split(pl_module)[0])

        # The module may be built, or load its pretrained weights, only in its own `setup` or `configure_model`, and a
        # checkpoint is restored before `on_fit_start`: the pretrained weights are those just before the last load.
        self._handles.append(pl_module.register_load_state_dict_pre_hook(capture))  # type: ignore[no-untyped-call]

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._restored = True

    def _split(self, module: LightningModule) -> tuple[list[tuple[str, nn.Parameter]], list[nn.Parameter]]:
        if any(is_piece(parameter) for parameter in module.parameters()):
            raise ValueError(
                "L2SP does not run under FullyShardedDataParallel (FSDP1), whose pieces do not tell which processes "
                "hold the rest: use FSDP2, that is Trainer(strategy=ModelParallelStrategy()) and fully_shard in "
                "configure_model"
            )
        groups = self.layers.of(module)
        wanted = [
            (name, group, parameter)
            for group in groups
            for name, parameter in groups.named_parameters(group)
            if parameter.requires_grad and (parameter.ndim >= 2 or not self.kernels_only)
        ]
        # Layers drawn anew (LayerReinit) have lost the values that they could be pulled to.
        fresh = fresh_parameters(module)
        body = [(name, p) for name, group, p in wanted if group != "head" and p not in fresh]
        if not body:
            raise ValueError(
                "L2SP found no pretrained parameter that trains: everything outside the head is frozen, so there is "
                "nothing to anchor. Under LoRA the change is centred at zero already: use weight decay instead"
            )
        return body, [p for _, group, p in wanted if group == "head" or p in fresh]

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._release_hooks()
        refuse_deepspeed(trainer, self)
        body, head = self._split(pl_module)
        if not head and self.layers.head is None and self.layers.groups is None:
            rank_zero_warn(
                f"L2SP found no head in {type(pl_module).__name__} and anchors every layer. If one of them is new, its "
                'random weights are no anchor: name it, layers=Layers(head="classifier"). If there is none (a tied LM '
                "head), layers=Layers(head=[])"
            )
        if any(p.dtype in (torch.bfloat16, torch.float16) for _, p in body):
            rank_zero_warn(
                "L2SP on weights of half precision: a pull smaller than half a unit in their last place (1e-4 at 0.05 "
                'in bf16) is lost. Use Trainer(precision="bf16-mixed"), which keeps fp32 weights'
            )
        if self._anchor is None or not self._restored:
            self._anchor = Anchor.capture(body)
        if self._fingerprint is not None:
            self._anchor.check(self._fingerprint)
        self._fingerprint = self._anchor.fingerprint()
        references = self._anchor.like(body)
        for optimizer in trainer.optimizers:
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            anchored = [(p, r) for (_, p), r in zip(body, references, strict=True) if id(p) in held]
            pull = QuadraticPenalty(self.strength, [r for _, r in anchored])
            self._terms.append(_Term(optimizer, [p for p, _ in anchored], pull))
            self._terms.append(
                _Term(optimizer, [p for p in head if id(p) in held], QuadraticPenalty(self.head_strength))
            )
            if self.mode == "decoupled":
                self._handles.append(optimizer.register_step_post_hook(self._pull))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Sharded strategies restore callbacks only after `on_fit_start`.
        if trainer.strategy.restore_checkpoint_after_setup and self._restored:
            assert self._anchor is not None
            assert self._fingerprint is not None
            self._anchor.check(self._fingerprint)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.loggers and (trainer.global_step + 1) % every == 0:
            with torch.no_grad():
                values = [term.penalty.value(term.parameters) for term in self._terms if term.parameters]
            pl_module.log("l2_sp", torch.stack(values).sum())
        if self.mode == "coupled":
            scale = _pending_scale(trainer, optimizer)
            for term in self._terms:
                if term.optimizer is getattr(optimizer, "optimizer", optimizer):
                    term.penalty.add_grad_(term.parameters, scale=scale)

    def _pull(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # Fused optimisers under an fp16 scaler run a step that overflowed, too, and skip it inside, by this flag.
        overflow: Tensor | None = getattr(optimizer, "found_inf", None)
        for group in optimizer.param_groups:
            rate = group["lr"] if overflow is None else group["lr"] * (1 - overflow)
            for term in self._terms:
                if term.optimizer is optimizer:
                    term.pull_(group["params"], rate)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def _release_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _release(self) -> None:
        self._release_hooks()
        self._terms.clear()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"fingerprint": self._fingerprint}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._fingerprint = state_dict["fingerprint"]


class _Term:
    """A penalty over the parameters that one optimiser holds."""

    def __init__(self, optimizer: Optimizer, parameters: list[nn.Parameter], penalty: QuadraticPenalty) -> None:
        self.optimizer = optimizer
        self.parameters = parameters
        self.penalty = penalty
        self._index = {id(parameter): i for i, parameter in enumerate(parameters)}

    def pull_(self, parameters: Sequence[nn.Parameter], rate: float | Tensor) -> None:
        """Decoupled, for those of a group's parameters that this term is about."""
        if not isinstance(rate, Tensor) and rate * self.penalty.strength >= 1:
            raise ValueError(
                f"the learning rate {rate:g} times strength={self.penalty.strength:g} is 1 or more: each step would "
                "jump past the pretrained weights. Lower the strength"
            )
        members = [i for p in parameters if (i := self._index.get(id(p))) is not None]
        self.penalty.pull_(self.parameters, learning_rate=rate, members=members)


def _pending_scale(trainer: Trainer, optimizer: Optimizer) -> Tensor | None:
    """The fp16 loss scale, where the gradients still carry it: fused optimisers unscale inside ``step()``."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return None
    device = optimizer.param_groups[0]["params"][0].device
    scale: Tensor = scaler.scale(torch.ones((), device=device))
    return scale
