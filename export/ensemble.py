"""Snapshot ensembles in one graph: every member runs, and their mean probability comes out."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_ft.export.wrappers import GraphWrapper
from lightning_ft.functional.snapshots import Answer, apply_delta, mean_answer

if TYPE_CHECKING:
    from lightning_ft.export.heads import Exportable, Wrap

BASE = "base.safetensors"
"""What :class:`~lightning_ft.callbacks.SnapshotEnsemble` calls the weights that its members differ from."""


class Ensemble(nn.Module):
    """Several models of one shape. What none of them changed is held once.

    Args:
        models: One or more, of one class.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(models)
        self.forward = models[0].forward  # its signature says what a graph reads; the graph itself calls each member

    @property
    def first(self) -> Any:
        """One of them, for what is the same of all."""
        return self.members[0]

    @property
    def config(self) -> Any:
        """Of each."""
        return self.first.config

    @property
    def base_model(self) -> Any:
        """The first one's."""
        return self.first.base_model

    def get_input_embeddings(self) -> nn.Module:
        """The first one's."""
        embeddings: nn.Module = self.first.get_input_embeddings()
        return embeddings


class MeanAnswer(GraphWrapper):
    """Logits whose softmax (sigmoid, value) is the mean of the members', under the name that one member's have.

    Args:
        ensemble: The members.
        wrap: Makes the graph of one.
        answer: What the logits mean.
    """

    def __init__(self, ensemble: Ensemble, wrap: Wrap, answer: Answer) -> None:
        super().__init__(ensemble)
        made = [wrap(member) for member in ensemble.members]
        if not all(isinstance(graph, GraphWrapper) for graph in made):
            raise ValueError("members: an ensemble averages answers, and this head writes text: export them one by one")
        self.graphs = nn.ModuleList(graph for graph in made if isinstance(graph, GraphWrapper))
        self._answer: Answer = answer
        first: Any = self.graphs[0]
        self.outputs = first.outputs
        self.per_token = first.per_token  # type: ignore[misc]
        if len(self.outputs) != 1:
            raise ValueError(
                f"members: an ensemble averages one tensor of logits, and this head gives {', '.join(self.outputs)}: "
                "export the members one by one"
            )

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        gap: Tensor | None = None,
        pattern: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Compute the members' mean answer; arguments as in one member's graph."""
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "gap": gap,
            "pattern": pattern,
            "token_type_ids": token_type_ids,
        }
        given = {name: value for name, value in inputs.items() if value is not None}
        return (mean_answer([graph(**given)[0] for graph in self.graphs], self._answer),)

    def _first(self) -> Any:
        return self.graphs[0]

    def axes(self, name: str) -> Mapping[int, str]:
        """As one member's."""
        axes: Mapping[int, str] = self._first().axes(name)
        return axes

    def sample(self, tokens: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """As one member's."""
        sample: dict[str, Tensor] = self._first().sample(tokens, generator)
        return sample


def member_files(members: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The members of a folder of snapshots, or those named.

    Raises:
        FileNotFoundError: There is none, or one is not there.
    """
    if isinstance(members, str | os.PathLike):
        found = sorted(Path(members).glob("cycle_*.safetensors"))
    else:
        found = [Path(member) for member in members]
    wanted = [*found, *{path.with_name(BASE) for path in found}]
    missing = [str(path) for path in wanted if not path.is_file()]
    if not found or missing:
        raise FileNotFoundError(
            f"members: expected the folder of a SnapshotEnsemble, or its cycle_*.safetensors with {BASE} beside them, "
            f"got {members}{f' without {missing[0]}' if missing else ''}"
        )
    return found


def ensemble(part: Exportable, members: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> Exportable:
    """What computes as :class:`~lightning_ft.callbacks.SnapshotEnsemble` answers, p̄ = (1/m) Σ softmax(z(x; θᵢ)).

    Args:
        part: The model that the members are snapshots of, one of lightning_ft's modules.
        members: Their folder, or their files.

    Raises:
        FileNotFoundError: There are no members.
        TypeError: ``part`` is no module of lightning_ft, whose weights the members name.
        ValueError: The members are of another module; the head has more than one output.
    """
    from safetensors.torch import load_file

    if part.module is None:
        raise TypeError(
            f"members: they are snapshots of a LightningModule, and {part.source} is none of lightning_ft's with its "
            "own head: give its checkpoint"
        )
    models = []
    for path in member_files(members):
        values = apply_delta(load_file(path), load_file(path.with_name(BASE)))
        models.append(_with(part.module, part.model, values, path))
    answer: Answer = getattr(part.module, "problem", "single_label")
    wrap = part.head.wrap
    head = replace(part.head, wrap=lambda model: MeanAnswer(model, wrap, answer))
    return replace(part, model=Ensemble(models), head=head)


def _with(module: nn.Module, model: nn.Module, values: Mapping[str, Tensor], path: Path) -> nn.Module:
    """A copy of the module's model with other weights; those that are the same are shared."""
    named = dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])
    memo: dict[int, Any] = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    for name, value in values.items():
        if name not in named or named[name].shape != value.shape:
            raise ValueError(f"members: {path} holds {name} {tuple(value.shape)}, which is not in the source's module")
        old = named[name]
        if not torch.equal(old.detach().cpu(), value):
            new = value.to(old.dtype)
            memo[id(old)] = nn.Parameter(new, False) if isinstance(old, nn.Parameter) else new
    return copy.deepcopy(model, memo)
