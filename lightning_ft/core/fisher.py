"""The diagonal Fisher information of a model's parameters: how much the old data has to say about each."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_ft.core.files import atomic_file

Variant = Literal["exact", "sampled", "empirical"]
_KEY = "lightning_ft.fisher"


@dataclass(frozen=True)
class Fisher:
    """Fᵢ = 1/n Σₓ E_y (∂ log p(y|x) / ∂θᵢ)², one non-negative value for each value of each parameter.

    Args:
        tensors: F by parameter name (without the names of wrappers), fp32, in the parameters' shapes.
        examples: n, over how many examples it is the mean; those of all tasks after :meth:`merge`.
        variant: Whose y: ``"exact"`` or ``"sampled"`` the model's own, ``"empirical"`` the data's.
        weights: Sum of squares of each parameter when F was computed, by name: a fingerprint.
        gammas: What earlier tasks' F was multiplied by at each :meth:`merge`, the first one first.

    Raises:
        ValueError: An unknown variant.

    Example:
        >>> old = Fisher({"weight": torch.tensor([0.16, 0.64])}, 2, "exact")
        >>> new = Fisher({"weight": torch.tensor([0.04, 0.16])}, 3, "exact")
        >>> both = old.merge(new, gamma=0.5)
        >>> both.examples, round(both.trace(), 4), both.gammas
        (5, 0.6, (0.5,))
    """

    tensors: Mapping[str, Tensor]
    examples: int
    variant: Variant
    weights: Mapping[str, float] | None = None
    gammas: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.variant not in get_args(Variant):
            raise ValueError(f"variant={self.variant!r} must be one of {', '.join(get_args(Variant))}")

    def trace(self) -> float:
        """Σᵢ Fᵢ: its size, which differs between variants, and with it the strength that suits them."""
        return math.fsum(float(tensor.sum(dtype=torch.float64)) for tensor in self.tensors.values())

    def check_weights(self, found: Mapping[str, float]) -> None:
        """Compare the weights at which F was computed with those that it is to hold in place.

        Args:
            found: Sum of squares of some of the parameters, by name.

        Raises:
            ValueError: They are others.
        """
        known = self.weights or {}
        other = [n for n, square in found.items() if n in known and not math.isclose(square, known[n], rel_tol=1e-5)]
        if other:
            raise ValueError(
                f"the Fisher information was computed at other weights than the fit starts from: {other[0]} and "
                f"{len(other) - 1} more of {len(found)} differ. It says what matters near the solution of the old "
                "task: start from that solution, or compute it anew for these weights"
            )

    def merge(self, new: Fisher, gamma: float = 1.0) -> Fisher:
        """γ F + F_new: what to protect after one more task (online EWC).

        Args:
            new: F of the task that was learned last, at the weights that came out.
            gamma: γ, how much of the earlier tasks stays: 1 adds up, 0.9 to 0.95 forgets slowly.

        Raises:
            ValueError: γ is outside [0, 1], or the two are of different variants or parameters.

        Reference:
            Schwarz et al. 2018, "Progress & Compress: A scalable framework for continual learning".
        """
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma={gamma!r} must lie in [0, 1]: 1 keeps earlier tasks whole, 0 forgets them")
        if self.variant != new.variant:
            raise ValueError(
                f"variant={new.variant!r} cannot be added to variant={self.variant!r}, which is of another size: "
                "compute both alike"
            )
        shapes = [{name: tuple(tensor.shape) for name, tensor in f.tensors.items()} for f in (self, new)]
        if different := sorted({name for name, _ in shapes[0].items() ^ shapes[1].items()}):
            raise ValueError(
                f"the two are of different parameters, among them {different[:3]}: compute both for the same ones "
                "(parameters=...), without the tasks' own heads"
            )
        merged = {
            name: tensor.to(new.tensors[name].device) * gamma + new.tensors[name]
            for name, tensor in self.tensors.items()
        }
        gammas = (*self.gammas, float(gamma), *new.gammas)
        return replace(new, tensors=merged, examples=self.examples + new.examples, gammas=gammas)

    def normalised(self) -> Fisher:
        """F divided by its mean, so that one strength λ suits models and variants alike. Published λ are for F as is.

        Raises:
            ValueError: F is 0 everywhere.
        """
        mean = self.trace() / max(1, sum(tensor.numel() for tensor in self.tensors.values()))
        if not mean > 0:
            raise ValueError(
                f"the trace is {self.trace()}: of a Fisher information that is 0 there is no normalised one"
            )
        return replace(self, tensors={name: tensor / mean for name, tensor in self.tensors.items()})

    def clipped(self, quantile: float) -> Fisher:
        """F with no value above its own quantile: a few values far above the rest make a decoupled pull unstable.

        Args:
            quantile: Share of all values that are at most the limit, such as 0.999.

        Raises:
            ValueError: ``quantile`` is outside (0, 1].
        """
        if not 0 < quantile <= 1:
            raise ValueError(f"quantile={quantile!r} must lie in (0, 1]: 0.999 cuts the highest value of each thousand")
        values = torch.cat([tensor.detach().flatten().cpu() for tensor in self.tensors.values()])
        limit = float(values.kthvalue(max(1, math.ceil(quantile * values.numel()))).values)
        return replace(self, tensors={name: tensor.clamp(max=limit) for name, tensor in self.tensors.items()})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all; what is no tensor goes into its metadata.

        Args:
            path: The file to write or replace.
        """
        from safetensors.torch import save_file

        facts = {
            "variant": self.variant,
            "examples": self.examples,
            "gammas": list(self.gammas),
            "weights": None if self.weights is None else dict(self.weights),
        }
        tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in self.tensors.items()}
        with atomic_file(path) as temporary:
            save_file(tensors, temporary, metadata={_KEY: json.dumps(facts)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Fisher:
        """Read what :meth:`save` wrote, onto the CPU.

        Raises:
            ValueError: The file holds something else.
            FileNotFoundError: There is no such file.
        """
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            facts = (file.metadata() or {}).get(_KEY)
            if facts is None:
                raise ValueError(
                    f"{path} is no Fisher information: it has no metadata {_KEY!r}. See lightning-ft fisher"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
        stored = json.loads(facts)
        return cls(tensors, stored["examples"], stored["variant"], stored["weights"], tuple(stored["gammas"]))
