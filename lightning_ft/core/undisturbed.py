"""Runs beside a training that leave its modes and random numbers as they were."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@contextmanager
def eval_mode(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Set the modules to eval mode, each for itself, and back to what each was in."""
    modes = [(module, module.training) for module in modules]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def same_randomness() -> Iterator[None]:
    """Whatever draws random numbers inside, the generators of Python, NumPy and torch are as before afterwards."""
    state = RandomState.now()
    try:
        yield
    finally:
        state.restore()


@dataclass(frozen=True)
class RandomState:
    """Where the generators of Python, NumPy and torch stand; of torch's devices, the one in use."""

    python: Any
    numpy: Any
    cpu: torch.Tensor
    cuda: torch.Tensor | None

    @classmethod
    def now(cls) -> RandomState:
        """Where they stand now."""
        numpy = sys.modules.get("numpy")
        in_use = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        return cls(
            random.getstate(),
            numpy.random.get_state() if numpy else None,
            torch.get_rng_state(),
            torch.cuda.get_rng_state() if in_use else None,
        )

    def restore(self) -> None:
        """Put them back to where they stood."""
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)


@contextmanager
def replay(state: RandomState) -> Iterator[None]:
    """Draw the same random numbers as were drawn from ``state`` on; afterwards go on as if none had been."""
    with same_randomness():
        state.restore()
        yield
