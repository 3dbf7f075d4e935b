"""EWC: pull each weight back to where an old task left it, by how much that task has to say about it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_ft.callbacks._anchoring import Anchoring, pretrained_and_new
from lightning_ft.callbacks._old_task import fisher_of_old_task
from lightning_ft.callbacks._quadratic_pull import Mode, QuadraticPull, Term
from lightning_ft.callbacks._trainer import refuse_deepspeed
from lightning_ft.core.anchor import Anchor, Storage
from lightning_ft.core.fisher import Fisher, Variant
from lightning_ft.core.layers import Layers
from lightning_ft.core.report import Report

Named = list[tuple[str, nn.Parameter]]


class EWC(Callback):
    """Elastic weight consolidation: Ω = (λ/2) Σᵢ Fᵢ (θᵢ − θ⁰ᵢ)².

    θ⁰ are the weights that the fit starts from, which the old task left behind; F is the diagonal Fisher information
    of the old task's data at these weights (:func:`~lightning_ft.functional.fisher_diagonal`). The head of the new
    task, and layers that LayerReinit drew anew, have no part in it. ``coupled`` adds the gradient of Ω in
    ``on_before_optimizer_step``: once an optimiser step, after unscaling and DDP's reduction, before clipping.
    ``decoupled`` moves θ ← θ − ηλF(θ − θ⁰) beside the optimiser, where it really stepped; Adam then does not rescale
    what F weighs.

    λ suits one variant of F on one model: traces differ a hundredfold. ``normalize=True`` divides F by its mean, after
    which λ is comparable to ``L2SP``'s strength. For a sequence of tasks (online EWC) pass what
    ``lightning-ft fisher --previous OLD --gamma 0.95`` wrote at the end of the last one.

    Logs ``ewc`` (Ω) every ``log_every_n_steps`` steps where the trainer has a logger.

    Deviation from the paper: one anchor, the latest solution, for all old tasks, as in online EWC.

    Args:
        strength: λ; the papers' are 10² to 10⁴ for the exact or empirical F as it is, and 0.01 to 1 suit a normalised
            one as they suit L2SP.
        fisher: A file that ``lightning-ft fisher`` or ``Fisher.save`` wrote; or the old task's data, if the module's
            head is the old one (the same task in another domain): F is then computed when the fit starts, and written
            to ``fisher/`` in ``default_root_dir``, from where a resumed run takes it.
        mode: ``"coupled"`` or ``"decoupled"``.
        variant: Whose labels, where F is computed: ``"exact"`` (an expectation over the model's own), ``"sampled"``
            (one drawn from it) or ``"empirical"`` (the data's).
        examples: Of how many examples F is then the mean; 200 to 2,000 do.
        normalize: Divide F by its mean over the parameters that are pulled.
        quantile: Cut F at this quantile, such as 0.999: its largest values lie far above the rest, and the decoupled
            form needs ηλ max F < 1.
        layers: Where the blocks and the head are, if they are not found by themselves.
        storage: Where θ⁰ and F are kept: see :class:`L2SP`.

    Raises:
        ValueError: An argument is out of range; F was computed at other weights than the fit starts from, or of none
            of its parameters; the pull ηλ max F is 1 or more (decoupled); on resume, the model does not start from the
            weights that the interrupted run was anchored to; FSDP1 or DeepSpeed; data given to a sharded run.
        FileNotFoundError: The file of F is not there.

    Example:
        >>> EWC(1000.0, "fisher.safetensors").mode
        'coupled'

    Reference:
        Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting in neural networks"; Schwarz et al. 2018,
        "Progress & Compress"; van de Ven 2025, "On the Computation of the Fisher Information in Continual Learning".
    """

    def __init__(
        self,
        strength: float,
        fisher: str | os.PathLike[str] | LightningDataModule,
        *,
        mode: Mode = "coupled",
        variant: Variant = "exact",
        examples: int = 1000,
        normalize: bool = False,
        quantile: float | None = None,
        layers: Layers | None = None,
        storage: Storage | None = None,
    ) -> None:
        if not strength >= 0:
            raise ValueError(f"strength={strength!r} must be 0 or more")
        if examples < 1:
            raise ValueError(f"examples={examples!r} must be 1 or more: the Fisher information is their mean")
        if quantile is not None and not 0 < quantile <= 1:
            raise ValueError(f"quantile={quantile!r} must lie in (0, 1]: 0.999 cuts the highest value of each thousand")
        self.strength = strength
        self.fisher = fisher
        self.mode = mode
        self.variant = variant
        self.examples = examples
        self.normalize = normalize
        self.quantile = quantile
        self.layers = layers or Layers()
        self.report: Report | None = None
        self._file: str | None = None  # where F of the old data was written
        self._pull = QuadraticPull("EWC", mode)
        self._anchoring = Anchoring(self, lambda module: pretrained_and_new(self, module, self.layers)[0], storage)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._file = None
            self._pull.reset()
            self._anchoring.watch(trainer, pl_module)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._anchoring.restoring()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_deepspeed(trainer, self)
        body, _ = pretrained_and_new(self, pl_module, self.layers)
        anchor = self._anchoring.take(body)
        fisher = self._prepared(self._load(trainer, pl_module, anchor), anchor, body)
        body = [(name, p) for name, p in body if name in fisher]
        weights = Anchor(fisher, anchor.storage)
        weights.move(body)
        pull = Term([p for _, p in body], self.strength, anchor.like(body), weights.like(body))
        self._pull.start(trainer, [pull])

    def _load(self, trainer: Trainer, module: LightningModule, anchor: Anchor) -> Fisher:
        if not isinstance(self.fisher, str | os.PathLike):
            fisher, self._file = fisher_of_old_task(
                *(trainer, module, self.fisher, anchor, list(anchor.tensors), self._file),
                variant=self.variant,
                examples=self.examples,
            )
            return fisher
        file = Path(self.fisher)
        if not file.is_file():
            raise FileNotFoundError(
                f"fisher={str(file)!r} does not exist: write it with lightning-ft fisher --config OLD.yaml --out {file}"
            )
        return Fisher.load(file)

    def _prepared(self, fisher: Fisher, anchor: Anchor, body: Named) -> dict[str, Tensor]:
        """F of what is pulled, sharded as that is."""
        shapes = {name: p.shape for name, p in body}
        common = {name: fisher.tensors[name] for name in shapes if name in fisher.tensors}
        for name, tensor in common.items():
            if tensor.shape != shapes[name]:
                raise ValueError(
                    f"the Fisher information of {name} has shape {tuple(tensor.shape)}, the parameter "
                    f"{tuple(shapes[name])}: it is of another model"
                )
        if not common:
            raise ValueError(
                "the Fisher information is of none of the parameters that train here: it names "
                f"{list(fisher.tensors)[:3]}, and these are {list(shapes)[:3]}: compute it with a module that keeps "
                "its model under the same attributes"
            )
        if missing := [name for name in shapes if name not in common]:
            rank_zero_warn(
                f"EWC: {len(missing)} of {len(shapes)} pretrained parameters have no Fisher information and are free "
                f"to move: {', '.join(missing[:3])}. Compute it while they train"
            )
        fisher.check_weights(anchor.select(common).squares_of_whole())
        chosen = Fisher(common, fisher.examples, fisher.variant)
        if self.quantile is not None:
            chosen = chosen.clipped(self.quantile)
        if self.normalize:
            chosen = chosen.normalised()
        rank_zero_info(
            f"EWC: {fisher.variant} Fisher information of {fisher.examples} examples, trace {chosen.trace():.4g} over "
            f"{len(common)} tensors"
        )
        parameters = dict(body)
        return {name: _sharded_like(tensor, parameters[name]) for name, tensor in chosen.tensors.items()}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._anchoring.recheck(trainer)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._pull.before_step(trainer, pl_module, optimizer, "ewc")

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.report = self._pull.report()
        rank_zero_info(str(self.report))

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        self._pull.release()
        self._anchoring.release()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"fingerprint": self._anchoring.fingerprint, "file": self._file, "pull": self._pull.state()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._anchoring.fingerprint = state_dict["fingerprint"]
        self._file = state_dict["file"]
        self._pull.load(state_dict["pull"])


def _sharded_like(tensor: Tensor, parameter: Any) -> Tensor:
    if not hasattr(parameter, "placements"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    placed: Tensor = distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)
    return placed
