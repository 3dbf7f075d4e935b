"""Re-initialisation of a pretrained model's top layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lightning_ft.core.fresh import mark_fresh
from lightning_ft.core.layers import Layers
from lightning_ft.core.report import Report
from lightning_ft.functional._hugging_face import hf_models, initialisable


def reinit_layers(
    module: nn.Module,
    top: int = 1,
    *,
    groups: str | Sequence[str] | None = None,
    pooler: bool | str = True,
    init: Callable[[nn.Module], None] | None = None,
    seed: int = 0,
    layers: Layers | None = None,
) -> Report:
    """Draw the weights of the top blocks, and of the pooler, anew, in place.

    Inside a Hugging Face model its own ``_init_weights`` is the scheme (for BERT N(0, 0.02²), biases 0, norms 1; GPT-2
    scales the residual projections by 1/√(2L)); elsewhere each layer's ``reset_parameters``. transformers 5 marks
    loaded weights so that ``_init_weights`` passes over them in silence: the marks are lifted for the draw. All
    weights are overwritten with NaN first, so that a value that the scheme does not set cannot go unseen.

    Final norms, embeddings and the head are never touched unless ``groups`` names them. The draw depends on ``seed``
    alone and takes nothing from the global generators. The modules are marked, see
    :func:`lightning_ft.core.fresh.fresh_parameters`, and L2SP does not pull them back.

    Args:
        module: Any module, before it is wrapped for training on several devices and before adapters are added.
        top: Number of blocks from the top; the paper tries 1 to 6. 0 for none.
        groups: Instead of ``top``, what :meth:`LayerGroups.select` understands: ``"block.2..block.5"``.
        pooler: Also the pooler, where the layers after the blocks hold one (a module with a matrix whose path or class
            says so), as the paper does; or the path of the module that is it.
        init: Draws the parameters that a module itself holds, called for each module in a block, children first;
            instead of the model's scheme.
        seed: Seed of the draw; the same on all ranks.
        layers: Where the blocks and the head are, if they are not found by themselves.

    Returns:
        What was drawn, with the standard deviation of the matrices before and after.

    Raises:
        ValueError: ``top``, ``groups`` or ``pooler`` names what is not there; the layers are frozen, tied to others,
            quantised, sharded, on the meta device or hold adapters; the scheme leaves a parameter unset.

    Example:
        >>> class Encoder(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.tokens = nn.Embedding(9, 4)
        ...         self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))
        ...     def forward(self, ids):
        ...         hidden = self.tokens(ids)
        ...         for layer in self.layers:
        ...             hidden = layer(hidden)
        ...         return hidden
        >>> report = reinit_layers(Encoder(), top=2)
        >>> [row["module"] for row in report.rows], report.facts["parameters"]
        (['layers.1', 'layers.2'], 40)

    Reference:
        Zhang, Wu, Katiyar, Weinberger and Artzi 2021, "Revisiting Few-sample BERT Fine-tuning".
    """
    targets = reinit_targets(module, top, groups=groups, pooler=pooler, layers=layers)
    _refuse_shared(module, targets)
    _refuse(module, targets)
    names = {p: name for name, p in module.named_parameters()}
    before = {p: p.detach().clone() for path in targets for p in module.get_submodule(path).parameters()}
    try:
        with torch.no_grad(), _seeded(seed, {p.device for p in before}):
            for path in targets:
                target = module.get_submodule(path)
                for parameter in target.parameters():
                    parameter.fill_(torch.nan)
                with initialisable(target):
                    target.apply(init or _scheme(module, path))
        if unset := [names[p] for p in before if not bool(torch.isfinite(p).all())]:
            raise ValueError(
                f"the model's own initialisation leaves {', '.join(unset[:4])} ({len(unset)} tensors) unset: pass "
                "init=, a function that draws the parameters of the module that it is given"
            )
    except BaseException:
        with torch.no_grad():
            for parameter, value in before.items():
                parameter.copy_(value)
        raise
    mark_fresh(module.get_submodule(path) for path in targets)
    rows = [_row(path, group, module.get_submodule(path), before) for path, group in targets.items()]
    facts = {"parameters": sum(p.numel() for p in before), "tensors": len(before), "seed": seed}
    return Report("Re-initialised layers", facts, rows)


def reinit_targets(
    module: nn.Module,
    top: int = 1,
    *,
    groups: str | Sequence[str] | None = None,
    pooler: bool | str = True,
    layers: Layers | None = None,
) -> dict[str, str]:
    """Paths of the modules that :func:`reinit_layers` draws anew, each with the name of its group."""
    layers = layers or Layers()
    partition = layers.of(module)
    if top < 0:
        raise ValueError(f"top={top} must be a number of blocks, 0 or more")
    chosen = groups if groups is not None else f"top:{top}" if top else None
    names = () if chosen is None else partition.select(chosen)
    blocks = {} if layers.groups is not None else layers.block_paths(module)
    found: dict[str, str] = {}
    for name in names:
        paths = blocks.get(name) or _covering(module, set(partition.parameters(name)))
        covered = {p for path in paths for p in module.get_submodule(path).parameters()}
        if name not in blocks and (bare := [n for n, p in partition.named_parameters(name) if p not in covered]):
            raise ValueError(f"groups={groups!r}: {', '.join(bare)} are no whole module, so no scheme draws them")
        found |= dict.fromkeys(paths, name)
    if isinstance(pooler, str):
        if not pooler or pooler not in dict(module.named_modules()):
            raise ValueError(f"pooler={pooler!r} must be the path of a module; there is none of that name")
        found.setdefault(pooler, "tail")
    elif pooler and "tail" in partition:
        for path in _covering(module, set(partition.parameters("tail"))):
            if _is_pooler(path, module.get_submodule(path)):
                found.setdefault(path, "tail")
    return found


def _covering(module: nn.Module, members: set[nn.Parameter], path: str = "") -> list[str]:
    """Paths of the largest modules whose parameters all are among ``members``."""
    if (own := set(module.parameters())) and own <= members and path:
        return [path]
    children = module.named_children() if own & members else ()
    return [found for name, child in children for found in _covering(child, members, f"{path}.{name}".strip("."))]


def _is_pooler(path: str, module: nn.Module) -> bool:
    # A norm has no matrix; and a last projection (OPT's) is as little a pooler as a norm is.
    return "pool" in f"{path} {type(module).__name__}".lower() and any(p.ndim > 1 for p in module.parameters())


def _refuse(module: nn.Module, targets: dict[str, str]) -> None:
    chosen = {child for path in targets for child in module.get_submodule(path).modules()}
    for path in targets:
        for name, child in module.get_submodule(path).named_modules(prefix=path):
            if type(child).__module__.partition(".")[0] == "peft" or hasattr(child, "parametrizations"):
                raise ValueError(
                    f"{name} is a {type(child).__name__} and not a plain layer: re-initialise before adapters or "
                    "parametrisations are added, and train those layers in full (a frozen random layer learns nothing)"
                )
        for name, parameter in module.get_submodule(path).named_parameters(prefix=path):
            if parameter.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
                raise ValueError(f"{name} is quantised ({parameter.dtype}): load it unquantised to re-initialise it")
            if parameter.device.type == "meta" or isinstance(parameter, DTensor):
                where = "on the meta device" if parameter.device.type == "meta" else "sharded"
                raise ValueError(
                    f"{name} is {where}: call reinit_layers where the module builds its model, when the weights are "
                    "loaded and before they are sharded"
                )
            if not parameter.requires_grad:
                raise ValueError(f"{name} is frozen, and a frozen random layer learns nothing: thaw it first")
    inside = {p for child in chosen for p in child._parameters.values() if p is not None}
    outside = [child for child in module.modules() if child not in chosen]
    if tied := inside & {p for child in outside for p in child._parameters.values() if p is not None}:
        names = [name for name, p in module.named_parameters(remove_duplicate=False) if p in tied]
        raise ValueError(f"{' and '.join(names)} are one tied tensor, only partly in the layers to re-initialise")


def _refuse_shared(module: nn.Module, targets: dict[str, str]) -> None:
    for path in targets:
        above, _, name = path.rpartition(".")
        if name != "0" or len(module.get_submodule(above)._modules) > 1:
            continue
        configs = [model.config for _, model in hf_models(module, path)]
        # A decoder may have one block of its own where the encoder has many.
        alone = [c for c in configs if not getattr(c, "is_encoder_decoder", False)]
        depth = max((getattr(config, "num_hidden_layers", 1) for config in alone), default=1)
        if depth > 1:
            raise ValueError(
                f"{path} is the one block that all {depth} layers share: to draw it anew is to begin from nothing. "
                "Pass top=0 to draw the pooler alone"
            )


def _scheme(module: nn.Module, path: str) -> Callable[[nn.Module], None]:
    """How the innermost Hugging Face model around ``path`` draws its weights; else how torch's layers do."""
    models = hf_models(module, path)
    return models[-1][1]._init_weights if models else _reset


def _reset(module: nn.Module) -> None:
    if not module._parameters:
        return
    reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    if reset is None:
        raise ValueError(
            f"{type(module).__name__} has parameters and no reset_parameters: pass init=, a function that draws the "
            "parameters of the module that it is given"
        )
    reset()


@contextmanager
def _seeded(seed: int, devices: set[torch.device]) -> Iterator[None]:
    """Seed the default generators of these devices, and of no other, for a while."""
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        torch.default_generator.manual_seed(seed)
        for device in devices - {torch.device("cpu")}:
            backend, index = torch.get_device_module(device), device.index or 0
            stack.enter_context(torch.random.fork_rng(devices=[index], device_type=device.type))
            if hasattr(backend, "default_generators"):
                backend.default_generators[index].manual_seed(seed)
            else:
                backend.manual_seed(seed)
        yield


def _row(path: str, group: str, module: nn.Module, before: dict[nn.Parameter, torch.Tensor]) -> dict[str, Any]:
    parameters = list(module.parameters())
    matrices = [p for p in parameters if p.ndim > 1] or parameters
    return {
        "group": group,
        "module": path,
        "tensors": len(parameters),
        "parameters": sum(p.numel() for p in parameters),
        "std before": _std([before[p] for p in matrices]),
        "std after": _std(matrices),
    }


def _std(tensors: Sequence[torch.Tensor]) -> float:
    return float(torch.cat([tensor.detach().flatten().float() for tensor in tensors]).std())
