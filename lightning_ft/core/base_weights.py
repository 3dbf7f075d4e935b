"""Which parameters of a module are the untouched pretrained base: frozen, and not worth saving again."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from torch import nn

from lightning_ft.core.fresh import fresh_parameters

# On the owner and not on the parameter: a move, a quantisation or a sharded wrap makes new parameters of it.
_MARK = "_lightning_ft_base"


def mark_base(module: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Freeze parameters, and remember that they are the base's; those of modules drawn anew are left to train.

    Args:
        module: Where all owners of the parameters are looked for (a tied weight has several).
        parameters: What is to stay as it is.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        >>> mark_base(model, model[0].parameters())
        >>> sorted(base_names(model)), model[0].weight.requires_grad
        (['0.bias', '0.weight'], False)
    """
    chosen = set(parameters) - fresh_parameters(module)
    for parameter in chosen:
        parameter.requires_grad_(False)
        parameter.grad = None  # an optimiser moves what has a gradient, frozen or not
    for child in module.modules():
        if names := {name for name, p in child._parameters.items() if p in chosen}:
            setattr(child, _MARK, vars(child).get(_MARK, set()) | names)


def unmark_base(module: nn.Module) -> None:
    """Forget what :func:`mark_base` marked, since it was changed, as by a merge. Flags stay as they are."""
    for child in module.modules():
        vars(child).pop(_MARK, None)


def base_names(module: nn.Module) -> set[str]:
    """Names, as in ``named_parameters(remove_duplicate=False)``, of what :func:`mark_base` marked."""
    return {f"{path}{name}" for path, child in _marked(module) for name in vars(child)[_MARK]}


def base_keys(module: nn.Module, keys: Collection[str]) -> set[str]:
    """Which keys of a state dict hold the base: its parameters, and what goes with the quantised ones among them.

    Args:
        module: The module whose state dict it is.
        keys: Its keys.
    """
    names = base_names(module)
    # Beside a quantised weight lie its scales, under names of their own: all of such a layer that does not train.
    quantised = {
        path
        for path, child in _marked(module)
        if any(not child._parameters[name].is_floating_point() for name in vars(child)[_MARK])  # type: ignore[union-attr]
    }
    own = {name for name, _ in module.named_parameters(remove_duplicate=False)} - names
    return {
        key
        for key in keys
        if key in names or (key not in own and any(key.startswith(path) for path in quantised if path))
    }


def _marked(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, child in module.named_modules(remove_duplicate=False):
        if vars(child).get(_MARK):
            yield f"{path}." if path else "", child
