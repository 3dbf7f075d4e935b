"""Optimisers whose states take eight bits, in the place of torch's, with their groups, hooks and schedulers."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_ft.core.report import Report
from lightning_ft.functional.quantised_tensor import import_bitsandbytes

Rule = Literal["adam", "lion", "momentum"]
LION_BETAS = (0.9, 0.99)
_TORCHS_OWN = ("amsgrad", "capturable", "dampening", "decoupled_weight_decay", "differentiable", "foreach", "fused")


def eight_bit(
    optimizer: Optimizer,
    rule: Literal["same", "adamw", "lion"] = "same",
    *,
    full: Collection[nn.Parameter] = (),
    min_size: int = 4096,
    paged: bool = False,
    betas: tuple[float, float] | None = None,
) -> Optimizer:
    """An optimiser like this one, its states quantised in blocks of 256 values by a table of 256.

    It takes over the groups (the same dictionaries, with rates, decays and whatever else is in them) and the step
    hooks. Which states stay in 32 bits is decided for each parameter, not in bitsandbytes' process-wide table, which
    outlives optimisers and is ignored here.

    Args:
        optimizer: ``torch.optim``'s AdamW, Adam without decay, or SGD with momentum, that has not stepped yet.
        rule: ``"same"``; or ``"adamw"`` or ``"lion"`` in place of AdamW or Adam. Lion keeps rates and decays as they
            are.
        full: Parameters whose states stay in 32 bits.
        min_size: Parameters with fewer values than this keep states in 32 bits.
        paged: Let the states move between GPU and host memory. Without effect on the CPU.
        betas: In the place of the groups' own; for Lion 0.9 and 0.99 by default.

    Raises:
        TypeError: There is no such optimiser in 8 bits.
        ValueError: An option has no counterpart in 8 bits.

    Example:
        >>> weight = nn.Parameter(torch.ones(64, 64))
        >>> optimizer = eight_bit(torch.optim.AdamW([weight], lr=1e-3))
        >>> weight.sum().backward()
        >>> _ = optimizer.step()
        >>> optimizer.state[weight]["state1"].dtype
        torch.uint8

    Reference:
        Dettmers, Lewis, Shleifer and Zettlemoyer 2022, "8-bit Optimizers via Block-wise Quantization"; Chen et al.
        2023, "Symbolic Discovery of Optimization Algorithms" (Lion).
    """
    kind = _kind(optimizer, rule)
    for group in optimizer.param_groups:
        _check(group, optimizer, kind)
        for name in _TORCHS_OWN:
            group.pop(name, None)
        if kind != "momentum":
            group["betas"] = betas or (LION_BETAS if kind == "lion" else group["betas"])
    cls = _optimizer_class(1 if kind in ("lion", "momentum") else 2)
    new: Optimizer = cls(kind, optimizer.param_groups, full=full, min_size=min_size, paged=paged)
    new._optimizer_step_pre_hooks.update(optimizer._optimizer_step_pre_hooks)
    new._optimizer_step_post_hooks.update(optimizer._optimizer_step_post_hooks)
    return new


def _kind(optimizer: Optimizer, rule: str) -> Rule:
    kinds: dict[type, Rule] = {torch.optim.AdamW: "adam", torch.optim.Adam: "adam", torch.optim.SGD: "momentum"}
    kind = kinds.get(type(optimizer))
    if kind is None or (rule != "same" and kind != "adam"):
        known = "AdamW, Adam without decay or SGD with momentum" if rule == "same" else "AdamW or Adam without decay"
        raise TypeError(
            f"{rule!r} in 8 bits takes the place of torch.optim's {known}; this is {type(optimizer).__name__}: give "
            "the project one of these"
        )
    return "lion" if rule == "lion" else kind


def _check(group: dict[str, Any], optimizer: Optimizer, kind: Rule) -> None:
    wrong = [name for name in ("amsgrad", "maximize", "nesterov", "differentiable") if group.get(name)]
    wrong += ["dampening"] if group.get("dampening") else []
    if wrong:
        raise ValueError(
            f"{type(optimizer).__name__}({wrong[0]}={group[wrong[0]]!r}) has no counterpart in 8 bits: leave it out"
        )
    if kind == "momentum" and not group["momentum"]:
        raise ValueError("SGD without momentum has no state that 8 bits could save: give it momentum=0.9, or leave it")
    coupled = isinstance(optimizer, torch.optim.Adam) and not group.get("decoupled_weight_decay")
    if coupled and group["weight_decay"]:
        raise ValueError(
            f"Adam(weight_decay={group['weight_decay']}) adds the decay to the gradient, and 8-bit Adam decays the "
            "weights beside it, as AdamW: use torch.optim.AdamW, or weight_decay=0"
        )
    if any(isinstance(group[name], Tensor) for name in ("lr", "weight_decay")):
        raise ValueError("a rate that is a tensor has no counterpart in 8 bits: give a number")


@functools.cache
def _optimizer_class(states: int) -> Any:
    """Of bitsandbytes' two bases; a class only once that is imported."""
    bases = import_bitsandbytes().optim.optimizer
    base: Any = bases.Optimizer2State if states == 2 else bases.Optimizer1State

    class EightBit(base):
        def __init__(
            self, kind: str, groups: list[dict[str, Any]], *, full: Collection[nn.Parameter], min_size: int, paged: bool
        ) -> None:
            super().__init__(kind, groups, optim_bits=8, min_8bit_size=min_size, is_paged=paged)
            self._full = set(full)

        def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
            return {
                # Where schedulers cycle it, SGD's momentum is read at each step.
                "betas": (group["momentum"], 0.0) if self.optimizer_name == "momentum" else group["betas"],
                "eps": group["eps"],
                "weight_decay": group["weight_decay"],
                "lr": group["lr"],
                "optim_bits": 32 if group["params"][pindex] in self._full else 8,
                "min_8bit_size": self.args.min_8bit_size,
                "max_unorm": 0.0,
                "skip_zeros": False,
            }

        def check_overrides(self) -> None:
            """Nothing of the process-wide table."""

        def step(self, closure: Any = None) -> Any:
            self._opt_called = True  # what schedulers that were made for another optimiser look for
            return super().step(closure)

        step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]

        def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
            saved = state_dict["state"].values()
            if not all("state1" in state or self._FSDP_WRAPPED_QUANT_STATE_KEY in state for state in saved):
                raise ValueError(
                    "the checkpoint's optimiser states are not those of an 8-bit optimiser: resume with the optimiser "
                    "that it was written with, or start a new fit from its weights"
                )
            super().load_state_dict(state_dict, move_to_device)

    return EightBit


def repoint(scheduler: Any, old: Optimizer, new: Optimizer) -> None:
    """Let a scheduler, and those inside it, act on another optimiser with the same groups."""
    for name, value in vars(scheduler).items():
        if value is old:
            setattr(scheduler, name, new)
        elif isinstance(value, (list, tuple)):
            for inner in value:
                if hasattr(inner, "step") and hasattr(inner, "optimizer"):
                    repoint(inner, old, new)


def embedding_parameters(module: nn.Module) -> set[nn.Parameter]:
    """The weights of embeddings, also where an output layer shares them."""
    return {
        p
        for child in module.modules()
        if isinstance(child, (nn.Embedding, nn.EmbeddingBag))
        for p in child.parameters()
    }


def state_report(optimizers: Sequence[Optimizer], module: nn.Module) -> Report:
    """Bytes of the optimisers' states, and what they would take in 32 bits.

    Args:
        optimizers: After a step or more.
        module: Whose embeddings are told apart.
    """
    embeddings = embedding_parameters(module)
    rows: dict[str, dict[str, Any]] = {}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            names = [name for name in ("state1", "state2") if name in state]
            eight = any(state[name].dtype == torch.uint8 for name in names)
            kind = "embeddings" if parameter in embeddings else "8 bits" if eight else "32 bits"
            row = rows.setdefault(kind, {"states": kind, "tensors": 0, "values": 0, "bytes": 0, "bytes in 32 bits": 0})
            held = [state[name] for name in (*names, "absmax1", "absmax2") if name in state]
            values = {"tensors": 1, "values": parameter.numel(), "bytes in 32 bits": 4 * len(names) * parameter.numel()}
            values["bytes"] = sum(tensor.numel() * tensor.element_size() for tensor in held)
            row.update({name: row[name] + value for name, value in values.items()})
    table = [rows[kind] for kind in ("8 bits", "32 bits", "embeddings") if kind in rows]
    total, whole = (sum(row[name] for row in table) for name in ("bytes", "bytes in 32 bits"))
    facts = {"bytes": total, "bytes in 32 bits": whole, "share": round(total / whole, 4) if whole else 1.0}
    return Report("States of 8-bit optimisers", facts, table)
