"""Normalisation layers, known by what they are."""

from __future__ import annotations

from torch import nn

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises: one of torch's classes, or all its parameters are vectors and it has an epsilon.

    Example:
        >>> is_norm(nn.LayerNorm(4)), is_norm(nn.Linear(4, 4))
        (True, False)
    """
    if isinstance(module, _NORMS):
        return True
    parameters = list(module.parameters())
    vectors = bool(parameters) and all(p.ndim == 1 for p in parameters)
    return vectors and any(isinstance(getattr(module, name, None), float) for name in ("eps", "variance_epsilon"))


def norm_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Parameters of all normalisation layers in ``module``, each once."""
    found = {id(p): p for layer in module.modules() if is_norm(layer) for p in layer.parameters()}
    return list(found.values())


def tied_embeddings(module: nn.Module) -> dict[str, nn.Parameter]:
    """Weights that an embedding shares with a layer of another kind, such as a language model's output layer."""
    owners: dict[nn.Parameter, list[tuple[str, bool]]] = {}
    for path, layer in module.named_modules():
        for name, parameter in layer._parameters.items():
            if parameter is not None:
                owners.setdefault(parameter, []).append((f"{path}.{name}", isinstance(layer, nn.Embedding)))
    return {
        f"{next(n for n, embeds in where if embeds)} = {next(n for n, embeds in where if not embeds)}": parameter
        for parameter, where in owners.items()
        if {embeds for _, embeds in where} == {True, False}
    }
