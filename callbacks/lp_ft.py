"""Linear probing, then fine-tuning (LP-FT): training starts with the best linear head on the pretrained features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from lightning_ft.callbacks._head_inputs import HeadInputs
from lightning_ft.core.layers import Layers
from lightning_ft.core.report import Report
from lightning_ft.functional.linear_probe import LinearProbe, Problem, linear_probe


class LPFT(Callback):
    """Fit the head to the pretrained features before the first step; then everything trains.

    A random head sends random gradients into the layers below it and distorts what they know; a fitted one does not.
    In ``on_train_start`` of a new run one epoch of training batches runs through the module's own ``training_step`` up
    to the head, in eval mode and without gradients. :func:`lightning_ft.functional.linear_probe` is fitted to what
    enters the head, its penalty chosen on the batches of (the first) validation loader, or on a held-out fifth of the
    training rows where there is none, and written into the head. Data loaders stand where they stood, random states
    are as they were, and nothing is logged by the module. Under DDP each rank brings its share, rank 0 fits, and all
    get the same head. A resumed run keeps the head of its checkpoint.

    Use a lower learning rate than for plain fine-tuning. The head must be one linear layer. Where it is more (RoBERTa:
    a dense layer, tanh, a linear layer), ``head="classifier.out_proj"`` fits the last layer to what the random dense
    layer makes of the features. Labels of positions must stand at their positions (not shifted, as in a language
    model); -100 is left out.

    Args:
        labels: Where a batch has its labels: a key, a position, or a function of the batch.
        head: Path of the linear layer that gives the logits, whole or as far as needed to be unique.
        problem: What the labels are: ``"single_label"`` (classes), ``"multi_label"`` (0/1 for each label) or
            ``"regression"``. By default whole numbers are classes, ``(rows, outputs)`` of 0 and 1 are several labels,
            and other floats are regression; floats of 0 and 1 for one output need ``"multi_label"``.
        penalties: Values of C to choose from: the weight of the data against that of ½‖W‖². By default the paper's,
            100 from 1e-7 to 1e2.
        batches: Training batches to look at; an epoch by default. Needed where an epoch has no end.
        layers: Where the blocks and the head are, if they are not found by themselves.

    Raises:
        ValueError: The head is not one linear layer, is sharded or quantised; labels are not found or do not fit;
            several training loaders.
        ImportError: scikit-learn, of the extra ``probe``, is not there.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[LPFT(labels="labels")], logger=False)

    Reference:
        Kumar et al. 2022, "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution".
    """

    def __init__(
        self,
        labels: int | str | Callable[[Any], Any] = "labels",
        *,
        head: str | None = None,
        problem: Problem | None = None,
        penalties: Sequence[float] | None = None,
        batches: int | None = None,
        layers: Layers | None = None,
    ) -> None:
        if problem not in (None, "single_label", "multi_label", "regression"):
            raise ValueError(f'problem={problem!r} must be "single_label", "multi_label" or "regression", or None')
        if batches is not None and batches < 1:
            raise ValueError(f"batches={batches!r} must be 1 or more")
        self.labels = labels
        self.head = head
        self.problem: Problem | None = problem
        self.penalties = penalties
        self.batches = batches
        self.layers = layers or Layers()
        self.report: Report | None = None
        """What was fitted; None where nothing was."""
        self._done = False

    def head_path(self, module: LightningModule) -> str:
        """Path of the linear layer that is, or ends, the head.

        Raises:
            ValueError: There is none, or it is not clear which.
        """
        linears: dict[str, nn.Linear] = {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear)}
        if self.head is not None:
            named = [name for name in linears if f".{name}".endswith(f".{self.head}")]
            named = [self.head] if self.head in named else named
            if len(named) != 1:
                raise ValueError(
                    f"head={self.head!r} must name one nn.Linear, and names {len(named)}; there are: {_list(linears)}"
                )
            return named[0]
        groups = self.layers.of(module)
        trains = {p for p in groups.head if p.requires_grad}
        found = [name for name, linear in linears.items() if linear.weight in trains]
        if len(found) != 1 or not trains <= set(linears[found[0]].parameters()):
            inside = {name: linears[name] for name in found} or linears
            raise ValueError(
                "head= must name the linear layer that gives the logits: only where one layer is the whole head, and "
                f"trains, it is found by itself, and here the head has {len(trains)} tensors that train. There are: "
                f"{_list(inside)}"
            )
        return found[0]

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._done, self.report = False, None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._done or trainer.fit_loop.epoch_loop.batch_progress.total.ready > 0:
            return
        path = self.head_path(pl_module)
        layer: Any = pl_module.get_submodule(path)
        _check_whole(path, layer)
        inputs = HeadInputs(trainer, pl_module, path, self.labels)
        train = _gathered(trainer, inputs.collect(*self._training(trainer)))
        loader, limit = _validation(trainer)
        choice = None if loader is None else _gathered(trainer, inputs.collect(loader, "validation_step", limit))
        probe, rows, held_out = self._fit(trainer, layer, train, choice)
        with torch.no_grad():
            layer.weight.copy_(probe.weight)
            if layer.bias is not None:
                layer.bias.copy_(probe.bias)
        self._done = True
        self._tell(trainer, path, probe, rows, held_out)

    def _training(self, trainer: Trainer) -> tuple[Any, str, float]:
        loader = trainer.train_dataloader
        if isinstance(loader, list | tuple | dict):
            raise ValueError(f"LPFT needs one training data loader, and there are {len(loader)}")
        limit = trainer.num_training_batches if self.batches is None else self.batches
        if limit == float("inf"):
            raise ValueError(
                "LPFT looks at one epoch of training batches, and this one has no end that is known: say how many, "
                "batches=..."
            )
        return loader, "training_step", limit

    def _fit(self, trainer: Trainer, layer: nn.Linear, train: Any, choice: Any) -> tuple[LinearProbe, int, int]:
        """On rank 0, for all: also what goes wrong there, since ranks that wait for it would hang."""
        result: tuple[LinearProbe, int, int] | Exception | None = None
        if trainer.is_global_zero:
            try:
                probe = linear_probe(
                    *train,
                    outputs=layer.out_features,
                    problem=self.problem or _problem(train[1], layer.out_features),
                    validation=choice,
                    bias=layer.bias is not None,
                    penalties=self.penalties,
                )
                result = probe, len(train[1]), 0 if choice is None else len(choice[1])
            except (ValueError, ImportError) as error:
                result = error
        result = trainer.strategy.broadcast(result, src=0)
        if isinstance(result, Exception):
            raise result
        assert result is not None
        return result

    def _tell(self, trainer: Trainer, path: str, probe: LinearProbe, rows: int, held_out: int) -> None:
        if probe.absent:
            rank_zero_warn(
                f"LPFT: the training rows lack labels {list(probe.absent)} (for several labels: a 0 or a 1 of them), "
                "so their weights are zero and the model will not tell them apart before it has trained"
            )
        facts = {
            "head": path,
            "training rows": rows,
            "validation rows": held_out or "a fifth of them",
            "C": probe.penalty,
        }
        scores = {"train score": probe.train_score, "validation score": probe.validation_score}
        self.report = Report("LPFT: head fitted", {**facts, **scores, "fits that did not converge": probe.unconverged})
        rank_zero_info(str(self.report))
        numbers = {"lp_ft/C": probe.penalty, "lp_ft/train": probe.train_score, "lp_ft/val": probe.validation_score}
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=trainer.global_step)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"done": self._done}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._done = state_dict["done"]


def _list(linears: dict[str, nn.Linear]) -> str:
    listed = [f"{name} ({m.in_features} to {m.out_features})" for name, m in list(linears.items())[-8:]]
    return ", ".join(listed) or "none"


def _check_whole(path: str, layer: nn.Linear) -> None:
    weight = layer.weight
    whole = weight.shape == (layer.out_features, layer.in_features) and not hasattr(weight, "full_tensor")
    if not whole or not weight.is_floating_point():
        raise ValueError(
            f"LPFT writes the weights of {path!r}, and they are sharded or quantised: use a strategy that keeps whole "
            "models (DDP), and leave the head out of quantisation"
        )


def _problem(labels: Tensor, outputs: int) -> Problem:
    if labels.ndim == 2 and labels.shape[1] == outputs > 1 and bool(((labels == 0) | (labels == 1)).all()):
        return "multi_label"
    return "regression" if labels.is_floating_point() else "single_label"


def _validation(trainer: Trainer) -> tuple[Any, float]:
    if trainer.val_dataloaders is None and trainer.enable_validation:  # its first epoch of validation is a later one
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.setup_data()
        trainer.training = True
    if trainer.val_dataloaders is None:
        return None, 0
    return tree_leaves(trainer.val_dataloaders)[0], trainer.num_val_batches[0]


def _gathered(trainer: Trainer, rows: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The rows of all ranks, on rank 0; elsewhere a rank's own."""
    if trainer.world_size == 1:
        return rows
    parts: list[Any] | None = [None] * trainer.world_size if trainer.is_global_zero else None
    torch.distributed.gather_object(rows, parts, dst=0)
    if parts is None:
        return rows
    return torch.cat([features for features, _ in parts]), torch.cat([labels for _, labels in parts])
