"""What surgery must know of Hugging Face models; nothing is imported where there is none."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_FLAG = "_is_hf_initialized"
_MISSING = object()


def hf_models(module: nn.Module, path: str) -> list[tuple[str, Any]]:
    """Paths of the Hugging Face models that hold, or are, the module at ``path``, and they, outermost first."""
    library = sys.modules.get("transformers.modeling_utils")
    if library is None:  # nobody imported it, so there is none of its models
        return []
    parts = path.split(".")
    above = [".".join(parts[:length]) for length in range(len(parts) + 1)]
    found = [(name, module.get_submodule(name)) for name in above]
    return [(name, model) for name, model in found if isinstance(model, library.PreTrainedModel)]


def is_config(value: Any) -> bool:
    """Whether this is the configuration of a Hugging Face model."""
    library = sys.modules.get("transformers.configuration_utils")
    return library is not None and isinstance(value, library.PretrainedConfig)


@contextmanager
def initialisable(module: nn.Module) -> Iterator[None]:
    """Lift the marks by which transformers 5 passes over loaded weights, on modules and tensors, for a while."""
    holders: list[Any] = [*module.modules(), *module.parameters(), *module.buffers()]
    flags = [vars(holder).pop(_FLAG, _MISSING) for holder in holders]
    try:
        yield
    finally:
        for holder, flag in zip(holders, flags, strict=True):
            if flag is not _MISSING:
                setattr(holder, _FLAG, flag)
