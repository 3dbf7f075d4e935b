"""The pretrained weights θ⁰, kept while θ moves away from them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_ft.core.sharding import local, squares_over_processes

Storage = Literal["device", "cpu", "bf16", "disk"]
"""Where reference weights are kept: beside the parameters, in main memory, beside them at half the size, in a file."""


class Anchor:
    """Reference tensors by parameter name, with a fingerprint that tells one set of weights from another.

    Args:
        tensors: Name to reference value. They are kept as they are: pass copies that nothing else writes to.
        storage: How they are kept, which :meth:`move` respects.
        squares: Name to the sum of squares of the value at its full precision (of this process's part), where a
            tensor is stored at less; by default of the tensors themselves.

    Example:
        >>> layer = torch.nn.Linear(2, 1)
        >>> anchor = Anchor.capture(layer.named_parameters())
        >>> sorted(anchor.tensors)
        ['bias', 'weight']
        >>> anchor.check(anchor.fingerprint())
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        storage: Storage = "device",
        squares: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.tensors = dict(tensors)
        self.storage = storage
        self.squares = {name: _square(t) for name, t in tensors.items()} if squares is None else dict(squares)

    @classmethod
    def capture(cls, named_parameters: Iterable[tuple[str, Tensor]], storage: Storage = "device") -> Anchor:
        """Copy the present values, detached.

        Args:
            named_parameters: Names and parameters.
            storage: ``"device"``, on their device and in their dtype; ``"cpu"``, in main memory, from where a pull
                copies them at each step; ``"bf16"``, on their device, rounded to bfloat16 (relative error 2⁻⁹: a
                pull cannot tell the weights from the pretrained ones below that). ``"disk"`` is for who owns a file.

        Raises:
            ValueError: ``storage`` is another one; ``"cpu"`` for parameters sharded over other devices.
        """
        if storage not in get_args(Storage)[:3]:
            raise ValueError(f"storage={storage!r} must be one of {get_args(Storage)[:3]} here")
        parameters = dict(named_parameters)
        squares = {name: _square(p) for name, p in parameters.items()}
        return cls({name: _stored(name, p.detach(), storage) for name, p in parameters.items()}, storage, squares)

    def select(self, names: Collection[str]) -> Anchor:
        """The same tensors, not copied, of some names."""
        squares = {name: self.squares[name] for name in names}
        return Anchor({name: self.tensors[name] for name in names}, self.storage, squares)

    def like(self, named_parameters: Iterable[tuple[str, Tensor]]) -> list[Tensor]:
        """The references of these parameters, in their order, where and how they are stored.

        Raises:
            ValueError: A parameter has no reference of its name, or one of another shape or sharded in another way.
        """
        return [self._reference(name, parameter) for name, parameter in named_parameters]

    def _reference(self, name: str, parameter: Tensor) -> Tensor:
        if name not in self.tensors:
            raise ValueError(
                f"{name} trains now and did not when the anchor was taken: thaw or add it before the fit starts"
            )
        reference = self.tensors[name]
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
        return reference

    def move(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Follow parameters to the device (and dtype) where they train now, as the storage has it."""
        if self.storage in ("cpu", "disk"):
            return
        for name, parameter in named_parameters:
            if (reference := self.tensors.get(name)) is not None:
                dtype = parameter.dtype if self.storage == "device" else reference.dtype
                self.tensors[name] = reference.to(device=parameter.device, dtype=dtype)

    def squares_of_whole(self) -> dict[str, float]:
        """The sum of squares of each value at its full precision, over all processes: call it on all of them."""
        return {
            name: squares_over_processes([self.squares[name]], like=[tensor]) for name, tensor in self.tensors.items()
        }

    def fingerprint(self) -> dict[str, float]:
        """Number of tensors, number of values and their sum of squares: plain numbers, safe in any checkpoint.

        The same wherever and how precisely the references are stored. Of sharded weights it is that of the whole,
        however they are sharded: call it on all processes.
        """
        return {
            "tensors": len(self.tensors),
            "values": sum(tensor.numel() for tensor in self.tensors.values()),
            "sum_of_squares": squares_over_processes(
                [self.squares[name] for name in self.tensors], like=list(self.tensors.values())
            ),
        }

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


def _stored(name: str, tensor: Tensor, storage: Storage) -> Tensor:
    if storage == "cpu" and hasattr(tensor, "placements") and tensor.device.type != "cpu":
        raise ValueError(
            f'storage="cpu" does not serve {name}, which is sharded over processes: each holds its own part of the '
            'anchor only, so keep it there ("device", or "bf16" at half the size)'
        )
    if storage == "bf16" and tensor.is_floating_point() and tensor.element_size() > 2:
        return tensor.to(torch.bfloat16)
    return tensor.to("cpu", copy=True) if storage == "cpu" else tensor.clone()


def _square(tensor: Tensor) -> Tensor:
    """The sum of squares of this process's part, in float64 on the CPU: not every accelerator has float64."""
    values = local(tensor.detach()).cpu()
    if not values.is_floating_point():  # packed weights
        values = values.double()
    norm: Tensor = torch.linalg.vector_norm(values, dtype=torch.float64)
    return norm.square()
