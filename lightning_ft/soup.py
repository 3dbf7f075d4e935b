"""Model soups: one checkpoint from several fine-tuned ones, at no cost when it is used."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from torch import Tensor, nn

from lightning_ft.core.files import atomic_file
from lightning_ft.core.report import Report
from lightning_ft.functional.averaging import add_to_mean_, check_alike, start_mean
from lightning_ft.modules.checkpoint import KEY, read_checkpoint

Path_ = str | os.PathLike[str]


Score = Callable[[Mapping[str, Tensor]], float]
"""The held-out score of a module that holds some weights."""


def soup(
    members: Sequence[Path_],
    out: Path_,
    *,
    score: Score | None = None,
    greedy: bool = False,
    mode: Literal["max", "min"] = "max",
    progress: Callable[[str], None] = lambda line: None,
) -> Report:
    """Write the mean of fine-tuned checkpoints as a checkpoint, θ̄ = (1/n) Σ θᵢ.

    All members must come from one pretrained model, at best with one head to begin with (LPFT): else they lie in
    different basins, and their mean is worse than each. ``greedy`` sorts the members by their held-out score and takes
    one in only if the mean with it is strictly better than without; the result is at least as good, on the held-out
    data, as the best member. Weights that are integers are the first member's. Members are mapped into memory from
    their files: beside the module that is scored, one copy of the weights is held.

    Args:
        members: Checkpoints of lightning_ft modules, or Hugging Face folders with safetensors; one at least must be a
            checkpoint, which says how the module is built.
        out: The checkpoint to write; it must not exist.
        score: Scores weights on held-out data: see :func:`scorer`. Without it nothing is scored.
        greedy: Take in only what improves the score.
        mode: Whether a high or a low score is better.
        progress: Is told each thing as it begins.

    Returns:
        The members, their scores, and which were taken.

    Raises:
        FileExistsError: ``out`` exists.
        FileNotFoundError: A member does not.
        ValueError: There are fewer than two members; one is of another head, model or labels than the first
            checkpoint; ``greedy`` has no ``score``.

    Reference:
        Wortsman et al. 2022, "Model soups: averaging weights of multiple fine-tuned models improves accuracy without
        increasing inference time".
    """
    if Path(out).exists():
        raise FileExistsError(f"{out} exists: name another file, or move it away")
    if len(members) < 2:
        raise ValueError(f"members names {len(members)} checkpoints: a soup has two or more")
    if greedy and score is None:
        raise ValueError("greedy=True scores each mixture on held-out data: pass score (on the command line --config)")
    names = [os.fspath(member) for member in members]
    pot = _Pot(names)
    scores: dict[str, float] = {}
    final: float | None
    if score is not None:
        for i, name in enumerate(names, 1):
            progress(f"scoring {i} of {len(names)}: {name}")
            scores[name] = score(pot.read(name))
    if greedy:
        assert score is not None
        mean, taken, final = _greedy(pot, scores, score, mode, progress)
    else:
        mean, taken = _uniform(pot, names, progress), set(names)
        final = None if score is None else score(mean)
    _write(Path(out), pot, mean, sorted(taken, key=names.index))
    order = sorted(scores, key=scores.__getitem__, reverse=mode == "max") if greedy else names
    rows = [{"member": name, "score": scores.get(name), "taken": name in taken} for name in order]
    kind = "greedy" if greedy else "uniform"
    return Report(f"Soup ({kind}): {out}", {"members taken": len(taken), "score": final}, rows)


def _uniform(pot: _Pot, names: Sequence[str], progress: Callable[[str], None]) -> dict[str, Tensor]:
    mean: dict[str, Tensor] = {}
    for i, name in enumerate(names, 1):
        progress(f"averaging {i} of {len(names)}: {name}")
        state = pot.read(name)
        if i == 1:
            mean = start_mean(state)
        else:
            add_to_mean_(mean, state, 1 / i)
    return mean


def _greedy(
    pot: _Pot, scores: Mapping[str, float], score: Score, mode: str, progress: Callable[[str], None]
) -> tuple[dict[str, Tensor], set[str], float]:
    sign = 1 if mode == "max" else -1
    order = sorted(scores, key=lambda name: sign * scores[name], reverse=True)
    mean, taken, best = start_mean(pot.read(order[0])), {order[0]}, scores[order[0]]
    for i, name in enumerate(order[1:], 2):
        progress(f"trying {i} of {len(order)}: {name}")
        state, weight = pot.read(name), 1 / (len(taken) + 1)
        tried = score(_Mixed(mean, state, weight))
        if sign * tried > sign * best:
            add_to_mean_(mean, state, weight)
            taken.add(name)
            best = tried
    return mean, taken, best


class _Mixed(Mapping[str, Tensor]):
    """mean + weight (state − mean), one tensor at a time as it is asked for."""

    def __init__(self, mean: Mapping[str, Tensor], state: Mapping[str, Tensor], weight: float) -> None:
        self.mean, self.state, self.weight = mean, state, weight

    def __getitem__(self, name: str) -> Tensor:
        mixed = {name: self.mean[name].clone()}
        add_to_mean_(mixed, {name: self.state[name]}, self.weight)
        return mixed[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.mean)

    def __len__(self) -> int:
        return len(self.mean)


class _Pot:
    """The members, read from their files and compared with the first checkpoint among them."""

    def __init__(self, names: Sequence[str]) -> None:
        if twice := {name for name in names if [Path(n).resolve() for n in names].count(Path(name).resolve()) > 1}:
            raise ValueError(f"members names {', '.join(sorted(twice))} twice: a checkpoint counts once")
        checkpoints = [name for name in names if not Path(name).is_dir()]
        if not checkpoints:
            raise ValueError(
                f"members={list(names)} are Hugging Face folders alone, which do not tell how the module is built: "
                "put a Lightning checkpoint of the same head among them"
            )
        self.first = checkpoints[0]
        self.stored: dict[str, Any] = read_checkpoint(self.first)[KEY]
        self._told = _Told.of_checkpoint(self.stored)
        for name in names:  # before any long work
            self.read(name)

    def read(self, name: str) -> dict[str, Tensor]:
        """A member's weights, mapped into memory.

        Raises:
            ValueError: They are not those of the same module.
        """
        if Path(name).is_dir():
            _Told.of_folder(Path(name), self._told).check(name, self._told, self.first)
            state = _read_folder(Path(name), self._state())
        else:
            checkpoint = read_checkpoint(name)
            _Told.of_checkpoint(checkpoint[KEY]).check(name, self._told, self.first)
            state = checkpoint["state_dict"]
        try:
            check_alike(self._state(), state)
        except ValueError as error:
            raise ValueError(f"{self.first} and {name} do not mix: {error}") from error
        return state

    def _state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = read_checkpoint(self.first)["state_dict"]
        return state


class _Told:
    """What weights must have in common to be mixed."""

    def __init__(self, head: str, config: Mapping[str, Any]) -> None:
        labels = config.get("id2label") or {}
        self.facts = {
            "the head": head,
            "the model": config.get("model_type"),
            "the labels": [labels[key] for key in sorted(labels, key=int)],
            "the problem": config.get("problem_type"),
        }

    @classmethod
    def of_checkpoint(cls, stored: Mapping[str, Any]) -> _Told:
        return cls(stored["class"], json.loads(stored["config"]))

    @classmethod
    def of_folder(cls, folder: Path, like: _Told) -> _Told:
        file = folder / "config.json"
        if not file.is_file():
            raise ValueError(f"{folder} is no Hugging Face folder: it has no config.json")
        told = cls(like.facts["the head"], json.loads(file.read_text(encoding="utf-8")))  # type: ignore[arg-type]
        if not told.facts["the labels"] and len(like.facts["the labels"] or "") == 2:
            told.facts["the labels"] = ["LABEL_0", "LABEL_1"]  # what a configuration leaves unsaid
        if told.facts["the problem"] is None:
            told.facts["the problem"] = like.facts["the problem"]
        return told

    def check(self, name: str, other: _Told, other_name: str) -> None:
        for what, value in self.facts.items():
            if value != other.facts[what]:
                raise ValueError(
                    f"{what} of {name} is {value}, that of {other_name} is {other.facts[what]}: a soup is made of runs "
                    "of one model on one task"
                )


def _read_folder(folder: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no safetensors: save it with save_pretrained")
    found = {f"model.{name}": tensor for file in files for name, tensor in load_file(file).items()}
    # Tied weights are in a folder once, in a checkpoint under each of their names; what else lacks is no weight.
    places: dict[tuple[Any, ...], Tensor] = {}
    for name, tensor in like.items():
        if name in found:
            places[_place(tensor)] = found[name]
    return {**found, **{n: places[_place(t)] for n, t in like.items() if n not in found and _place(t) in places}}


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride()


def _write(out: Path, pot: _Pot, mean: Mapping[str, Tensor], taken: list[str]) -> None:
    like = pot.read(pot.first)
    once: dict[tuple[Any, ...], Tensor] = {}  # tied weights stay tied, and are stored once
    state = {name: once.setdefault(_place(like[name]), tensor.to(like[name].dtype)) for name, tensor in mean.items()}
    checkpoint = {
        "state_dict": state,
        KEY: pot.stored,
        "soup": taken,
        "pytorch-lightning_version": lightning.__version__,
        "epoch": 0,
        "global_step": 0,
    }
    with atomic_file(out) as path:
        torch.save(checkpoint, path)


def scorer(trainer: Any, module: nn.Module, datamodule: Any, monitor: str) -> Score:
    """A score that ``Trainer.validate`` logs.

    Args:
        trainer: The trainer that validates.
        module: The module into which weights are put.
        datamodule: The held-out data.
        monitor: The name under which the score is logged, such as ``"val_accuracy"``.
    """

    def score(state: Mapping[str, Tensor]) -> float:
        own = module.state_dict()
        if own.keys() != state.keys():
            raise ValueError(
                f"--config builds another module than the members hold: it has {len(own)} tensors, they have "
                f"{len(state)}. Give the configuration of their run"
            )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])
        trainer.validate(module, datamodule=datamodule, verbose=False)
        if monitor not in trainer.callback_metrics:
            raise ValueError(
                f"monitor={monitor!r} is not logged in validation; logged are: {', '.join(trainer.callback_metrics)}"
            )
        return float(trainer.callback_metrics[monitor])

    return score
