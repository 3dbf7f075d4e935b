"""Which modules of a pretrained model were drawn anew, so that their old values mean nothing any more."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

# On the module and not on its parameters: a copy, a move or a sharded wrap makes new parameters of the same module.
_MARK = "_lightning_ft_fresh"


def mark_fresh(modules: Iterable[nn.Module], fresh: bool = True) -> None:
    """Say that the weights of these modules are new, or take that back.

    Args:
        modules: The modules, each with all that is below it.
        fresh: False removes the mark.
    """
    for module in modules:
        if fresh:
            setattr(module, _MARK, True)
        else:
            vars(module).pop(_MARK, None)


def fresh_parameters(module: nn.Module) -> set[nn.Parameter]:
    """The parameters below marked modules. Whatever pulls towards pretrained weights leaves them out.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1, bias=False))
        >>> mark_fresh([model[1]])
        >>> [name for name, p in model.named_parameters() if p in fresh_parameters(model)]
        ['1.weight']
    """
    return {p for child in module.modules() if vars(child).get(_MARK) for p in child.parameters()}
