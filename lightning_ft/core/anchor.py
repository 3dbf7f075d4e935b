"""The pretrained weights θ⁰, kept while θ moves away from them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lightning_ft.core.sharding import sum_of_squares


class Anchor:
    """Reference tensors by parameter name, with a fingerprint that tells one set of weights from another.

    Args:
        tensors: Name to reference value. They are kept as they are: pass copies that nothing else writes to.

    Example:
        >>> layer = torch.nn.Linear(2, 1)
        >>> anchor = Anchor.capture(layer.named_parameters())
        >>> sorted(anchor.tensors)
        ['bias', 'weight']
        >>> anchor.check(anchor.fingerprint())
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)

    @classmethod
    def capture(cls, named_parameters: Iterable[tuple[str, Tensor]]) -> Anchor:
        """Copy the present values, detached, on their device and in their dtype."""
        return cls({name: parameter.detach().clone() for name, parameter in named_parameters})

    def like(self, named_parameters: Iterable[tuple[str, Tensor]]) -> list[Tensor]:
        """The references of these parameters, in their order, moved to their device and dtype.

        Raises:
            ValueError: A parameter has no reference of its name, or one of another shape or sharded in another way.
        """
        references = []
        for name, parameter in named_parameters:
            if name not in self.tensors:
                raise ValueError(
                    f"{name} trains now and did not when the anchor was taken: thaw or add it before the fit starts"
                )
            reference = self.tensors[name].to(device=parameter.device, dtype=parameter.dtype)
            if reference.shape != parameter.shape:
                raise ValueError(
                    f"the anchor of {name} has shape {tuple(reference.shape)}, the parameter "
                    f"{tuple(parameter.shape)}: capture it where the parameter has its final shape"
                )
            if getattr(reference, "placements", None) != getattr(parameter, "placements", None):
                raise ValueError(
                    f"the anchor of {name} was taken before the model was sharded (or sharded in another way), and "
                    "holds other values than this process's part of it: capture it after sharding"
                )
            self.tensors[name] = reference
            references.append(reference)
        return references

    def fingerprint(self) -> dict[str, float]:
        """Number of tensors, number of values and their sum of squares: plain numbers, safe in any checkpoint.

        Of sharded weights it is that of the whole, however they are sharded: call it on all processes.
        """
        return {
            "tensors": len(self.tensors),
            "values": sum(tensor.numel() for tensor in self.tensors.values()),
            "sum_of_squares": self._sum_of_squares(),
        }

    def _sum_of_squares(self) -> float:
        sharded = [tensor for tensor in self.tensors.values() if hasattr(tensor, "placements")]
        squares = [
            # On the CPU: not every accelerator has float64.
            float(torch.linalg.vector_norm(tensor.cpu(), dtype=torch.float64)) ** 2
            for tensor in self.tensors.values()
            if not hasattr(tensor, "placements")
        ]
        return math.fsum([*squares, float(sum_of_squares(sharded, dtype=torch.float64)) if sharded else 0.0])

    def check(self, expected: Mapping[str, float]) -> None:
        """Compare with the fingerprint of an earlier run.

        Raises:
            ValueError: The weights are not those that the earlier run was anchored to.
        """
        found = self.fingerprint()
        # The order of a parallel sum differs between machines, so the last digits may.
        if any(not math.isclose(found[key], expected[key], rel_tol=1e-6) for key in found):
            raise ValueError(
                f"the model to resume starts from weights with fingerprint {found}, but the interrupted run was "
                f"anchored to {dict(expected)}: build the model from the same pretrained weights "
                "(not from a fine-tuned checkpoint) and let Trainer.fit(ckpt_path=...) restore the rest"
            )
