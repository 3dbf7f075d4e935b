"""A model's parameters as one proven partition in depth order."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, permutations
from typing import final

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from lightning_ft.core.data_flow import first_fed
from lightning_ft.core.sharding import (
    full_shapes,
    named_plain_modules,
    named_plain_parameters,
    plain_class,
    plain_name,
    unwrapped,
)

Named = tuple[str, nn.Parameter]
Shapes = Mapping[nn.Parameter, torch.Size]


@final
class LayerGroups:
    """The parameters of ``module`` in depth order: ``embeddings``, ``block.0`` ... ``block.L-1``, ``tail``, ``head``.

    Use :meth:`of`, which finds the groups; this constructor takes them ready-made. Empty groups are left out.

    Args:
        module: The module whose parameters are grouped.
        groups: Group name to ``(parameter name, parameter)`` pairs, bottom to top.
        shared: Names of groups that one forward pass runs several times.

    Raises:
        ValueError: A parameter of ``module`` is in no group, in two groups, or a stranger to ``module``. Parameters
            are told apart by identity: two of equal value are two.

    Example:
        >>> from torch import nn
        >>> class Encoder(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.norm = nn.LayerNorm(4)
        ...         self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))
        ...         self.tokens = nn.Embedding(9, 4)
        ...     def forward(self, ids):
        ...         hidden = self.tokens(ids)
        ...         for layer in self.layers:
        ...             hidden = layer(hidden)
        ...         return self.norm(hidden)
        >>> model = nn.ModuleDict({"classifier": nn.Linear(4, 2), "encoder": Encoder()})
        >>> groups = LayerGroups.of(model)
        >>> groups
        group       tensors  parameters   share
        embeddings        1          36   38.3%
        block.0           2          20   21.3%
        block.1           2          20   21.3%
        tail              2           8    8.5%
        head              2          10   10.6%
        >>> groups.name_of(model["classifier"].bias), groups.depth_of(model["encoder"].tokens.weight)
        ('head', 0)
    """

    def __init__(
        self, module: nn.Module, groups: Mapping[str, Iterable[Named]], *, shared: Collection[str] = ()
    ) -> None:
        self.shared = tuple(name for name in groups if name in shared)
        """Blocks that one forward pass runs several times (ALBERT's), so that they stand at no one depth."""
        members = {name: tuple(pairs) for name, pairs in groups.items()}
        self._members = {name: pairs for name, pairs in members.items() if pairs}
        # Parameters hash by identity, and a dict looks at identity before it ever compares values.
        self._depth: dict[nn.Parameter, int] = {}
        for depth, (group, pairs) in enumerate(self._members.items()):
            for name, parameter in pairs:
                if parameter in self._depth:
                    raise ValueError(f"groups: {name!r} is in {self.name_of(parameter)!r} and again in {group!r}")
                self._depth[parameter] = depth
        owned = {parameter: name for name, parameter in named_plain_parameters(module)}
        if missing := [name for parameter, name in owned.items() if parameter not in self._depth]:
            raise ValueError(f"groups must hold every parameter of the module; in no group: {_some(missing)}")
        if extra := [name for pairs in members.values() for name, parameter in pairs if parameter not in owned]:
            raise ValueError(f"groups may hold parameters of the module only; strangers: {_some(extra)}")
        self._shapes = full_shapes(module)

    @classmethod
    def of(
        cls,
        module: nn.Module,
        *,
        blocks: str | Sequence[str] | None = None,
        head: str | Sequence[str] | None = None,
        groups: Mapping[str, str] | None = None,
    ) -> LayerGroups:
        """Find the groups of ``module`` by structure and data flow, never by the names of models or attributes.

        The *blocks* are the children of the outermost ``ModuleList`` or ``Sequential`` whose children are of one class,
        carry parameters and sit with an input embedding. The *backbone* is the smallest module that owns both and runs
        on token ids. Inside it, what feeds block 0 is ``embeddings``, what block ``i`` feeds on the way to the next
        block is part of ``block.i``, and what follows the last block is ``tail``; all outside is ``head``. A weight
        tied between groups belongs to the earliest.

        What feeds what is read off the autograd graph of one forward pass of a copy on the meta device: no weight is
        read and ``module`` is not run. Parameters that the pass never meets are placed by registration order.

        Several block lists, each with its own embedding: if one feeds the other (encoder-decoder), they are stacked
        as ``encoder.block.0`` ... ``decoder.block.0`` ..., prefixed with the attribute where their paths part, and
        the final norm of the lower stack belongs to its last block. If not (bi-encoder), they are merged by depth:
        ``block.i`` holds block ``i`` of each.

        A sharded model has the groups, and the names, that it had before: FSDP2 (``fully_shard``), FSDP1 with
        ``use_orig_params=True``, and activation checkpointing in between are seen through.

        Args:
            module: Any module: a model, a LightningModule that holds one, a peft-wrapped, compiled or sharded one.
            blocks: Path of the block list, such as ``"backbone.layers"``; several are stacked in the order given.
            head: Path of each module that is the head. All the rest is then backbone.
            groups: For models without a block list: group name to regular expression, bottom to top. Each
                parameter name must be matched (``re.search``) by exactly one; anchor with ``^`` where needed.

        Raises:
            ValueError: No block list, or several that cannot be told apart; a path or a regular expression that
                matches nothing; a parameter matched by none or by two; FSDP1 with ``use_orig_params=False``.
        """
        names = list(named_plain_parameters(module, remove_duplicate=False))
        if not names:
            raise ValueError(f"module must have parameters, and {type(module).__name__} has none yet: build it first")
        if groups is not None:
            if blocks is not None or head is not None:
                raise ValueError("groups= says all by itself: pass it without blocks= and head=")
            labels, depth, runs = list(groups), _depth_by_regex(names, groups), Counter[int]()
        else:
            paths = _paths(module, "blocks", blocks), _paths(module, "head", head)
            labels, depth, runs = _depth_by_structure(module, *paths, full_shapes(module))
        members: dict[str, list[Named]] = {label: [] for label in labels}
        for name, parameter in named_plain_parameters(module):
            members[labels[depth[parameter]]].append((name, parameter))
        return cls(module, members, shared=[labels[i] for i, count in runs.items() if count > 1])

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the groups, bottom to top."""
        return tuple(self._members)

    def named_parameters(self, name: str) -> tuple[Named, ...]:
        """Names, as in ``module.state_dict()``, and parameters of one group."""
        if name not in self._members:
            raise ValueError(f"name must be one of {', '.join(self._members)}; got {name!r}")
        return self._members[name]

    def parameters(self, name: str) -> tuple[nn.Parameter, ...]:
        """Parameters of one group."""
        return tuple(parameter for _, parameter in self.named_parameters(name))

    @property
    def head(self) -> tuple[nn.Parameter, ...]:
        """Parameters of the head; none where there is no head, as in a language model with a tied one."""
        return self.parameters("head") if "head" in self else ()

    def select(self, what: str | Sequence[str]) -> tuple[str, ...]:
        """Names of the groups that ``what`` speaks of, bottom to top.

        Args:
            what: A group's name (``"head"``); ``"all"``; ``"blocks"``; ``"top:2"`` or ``"bottom:2"``, so many blocks
                from either end; ``"block.2..block.5"``, a range with both its ends; or a regular expression that whole
                names match. Or a list of these.

        Raises:
            ValueError: Something matches no group, or asks for more blocks than there are.

        Example:
            >>> from torch import nn
            >>> tower = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
            >>> groups = LayerGroups.of(tower, groups={"block.0": "^0", "block.1": "^1", "head": "^2"})
            >>> groups.select("top:1"), groups.select(["head", "block.0"]), groups.select("block.0..head")
            (('block.1',), ('block.0', 'head'), ('block.0', 'block.1', 'head'))
        """
        patterns = [what] if isinstance(what, str) else list(what)
        chosen = {name for pattern in patterns for name in self._matching(pattern)}
        if not chosen:
            raise ValueError(f"must name one group or more of {', '.join(self._members)}; got {what!r}")
        return tuple(name for name in self._members if name in chosen)

    def _matching(self, pattern: str) -> Sequence[str]:
        names = list(self._members)
        blocks = [name for name in names if name not in ("embeddings", "tail", "head")]
        if pattern in self._members:
            return [pattern]
        if pattern in ("all", "blocks"):
            return names if pattern == "all" else blocks
        if match := re.fullmatch(r"(top|bottom):(\d+)", pattern):
            count = int(match[2])
            if not 1 <= count <= len(blocks):
                raise ValueError(f"{pattern!r} must ask for 1 to {len(blocks)} blocks, which are all that there are")
            return blocks[-count:] if match[1] == "top" else blocks[:count]
        ends = pattern.split("..")
        if len(ends) == 2 and all(end in self._members for end in ends):
            first, last = (names.index(end) for end in ends)
            if first > last:
                raise ValueError(f"{pattern!r} must go from bottom to top: write {ends[1]}..{ends[0]}")
            return names[first : last + 1]
        found = [name for name in names if re.fullmatch(pattern, name)]
        if not found:
            raise ValueError(f"{pattern!r} matches none of the groups {', '.join(names)}")
        return found

    def depth_of(self, parameter: nn.Parameter) -> int:
        """Index into :attr:`names` of the group that holds ``parameter``, found by identity."""
        if parameter not in self._depth:
            raise ValueError(
                f"parameter of shape {tuple(parameter.shape)} is in no group: the module was changed after the groups "
                "were taken (surgery, wrapping, a re-made head); call LayerGroups.of again"
            )
        return self._depth[parameter]

    def name_of(self, parameter: nn.Parameter) -> str:
        """Name of the group that holds ``parameter``, found by identity."""
        return self.names[self.depth_of(parameter)]

    def shape_of(self, parameter: nn.Parameter) -> torch.Size:
        """Shape of the whole parameter, of which this process may hold a piece (FSDP1) or nothing."""
        return self._shapes[parameter]

    def size(self, name: str) -> int:
        """Number of values in one group, over all processes that share it."""
        return sum(self.shape_of(parameter).numel() for parameter in self.parameters(name))

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __contains__(self, name: object) -> bool:
        return name in self._members

    def __repr__(self) -> str:
        sizes = {name: self.size(name) for name in self}
        width, total = max(map(len, sizes), default=5), max(sum(sizes.values()), 1)
        rows = [f"{name:<{width}}  {len(self._members[name]):7}  {n:10}  {n / total:6.1%}" for name, n in sizes.items()]
        return "\n".join([f"{'group':<{width}}  tensors  parameters   share", *rows])


def block_paths(module: nn.Module, *, blocks: str | Sequence[str] | None = None) -> dict[str, list[str]]:
    """Which modules are the blocks: group name, as in :class:`LayerGroups`, to paths, bottom to top.

    A group of :class:`LayerGroups` holds parameters, among them some that only feed a block or follow a stack (an
    encoder's final norm); surgery works on the blocks alone. A merged group (bi-encoder) has one path an encoder.

    Args:
        module: Any module, as for :meth:`LayerGroups.of`.
        blocks: Path of the block list; several are stacked in the order given.

    Raises:
        ValueError: No block list, or several that cannot be told apart.
    """
    given = _paths(module, "blocks", blocks)
    stacks, stacked = (_given_stacks(module, given), True) if given else _find_stacks(module, full_shapes(module))
    paths = given or [stack.path for stack in stacks]
    labels = _block_labels(module, paths, stacked)
    members = [[f"{path}.{name}".strip(".") for name in module.get_submodule(path)._modules] for path in paths]
    if stacked:
        return {label: [path] for label, path in zip(labels, chain(*members), strict=True)}
    return {label: list(parallel) for label, *parallel in zip(labels, *members, strict=True)}


@dataclass
class _Stack:
    """Blocks in depth order, and the paths of the modules that may be their backbone, innermost first."""

    path: str
    blocks: list[nn.Module]
    owners: list[str]


def _depth_by_regex(names: Sequence[Named], groups: Mapping[str, str]) -> dict[nn.Parameter, int]:
    patterns = {group: re.compile(pattern) for group, pattern in groups.items()}
    matches = {name: [group for group, pattern in patterns.items() if pattern.search(name)] for name, _ in names}
    for group, pattern in groups.items():
        if not any(group in found for found in matches.values()):
            raise ValueError(f"groups[{group!r}] = {pattern!r} matches no parameter; there are: {_some(matches)}")
    if wrong := {name: found for name, found in matches.items() if len(found) != 1}:
        listed = _some(f"{name} ({' and '.join(found) or 'none'})" for name, found in wrong.items())
        raise ValueError(f"groups must match each parameter with exactly one regular expression; got {listed}")
    rank = {group: depth for depth, group in enumerate(groups)}
    return _lowest((parameter, rank[matches[name][0]]) for name, parameter in names)


def _depth_by_structure(
    module: nn.Module, blocks: list[str], heads: list[str], shapes: Shapes
) -> tuple[list[str], dict[nn.Parameter, int], Counter[int]]:
    """Names of the groups, for each parameter the index of its group, and how often each group is run."""
    stacks, stacked = (_given_stacks(module, blocks), True) if blocks else _find_stacks(module, shapes)
    paths = blocks or [stack.path for stack in stacks]
    if trapped := [path for path in paths if any(_inside(path, h) for h in heads)]:
        raise ValueError(f"head= must lie outside the blocks, and holds {_some(trapped)}: name a smaller module")
    sizes = [len(stack.blocks) for stack in stacks]
    starts = [1 + sum(sizes[:i]) if stacked else 1 for i in range(len(stacks))]
    labels = ["embeddings", *_block_labels(module, paths, stacked), "tail", "head"]
    tail, head = len(labels) - 2, len(labels) - 1
    named = list(named_plain_parameters(module, remove_duplicate=False))
    backed = {p for name, p in named if not any(_inside(name, path) for path in heads)}
    depth = _lowest(
        (p, start + i)
        for stack, start in zip(stacks, starts, strict=True)
        for i, block in enumerate(stack.blocks)
        for p in block.parameters()
    )
    runs = Counter[int]()
    for stack, start, size in zip(stacks, starts, sizes, strict=True):
        after = start + size - 1 if stacked and stack is not stacks[-1] else tail
        alone = Counter[int]()
        around = _around(module, stack, backed - depth.keys(), bool(heads), shapes, alone)
        runs |= Counter({start + i: count for i, count in alone.items()})  # the higher of two, where stacks are merged
        depth |= {p: 0 if k == 0 else start + k - 1 if k < size else after for p, k in around.items()}
    return labels, {p: depth.get(p, tail if heads and p in backed else head) for _, p in named}, runs


def _block_labels(module: nn.Module, paths: list[str], stacked: bool) -> list[str]:
    sizes = [len(list(_at(module, path).children())) for path in paths]
    if len(paths) == 1 or not stacked:
        return [f"block.{i}" for i in range(sizes[0])]
    stems = [path.split(".")[_parting(paths)] for path in paths]
    if len(set(stems)) < len(stems):
        stems = [f"stack.{i}" for i in range(len(stems))]
    return [f"{stem}.block.{i}" for stem, size in zip(stems, sizes, strict=True) for i in range(size)]


def _around(
    module: nn.Module, stack: _Stack, rest: set[nn.Parameter], headed: bool, shapes: Shapes, runs: Counter[int]
) -> dict[nn.Parameter, int]:
    """Which block each parameter of ``rest`` in the backbone feeds first; the number of blocks if it feeds none.

    ``runs`` counts how often each block is run in one forward pass.
    """
    errors = []
    for owner in stack.owners:
        backbone = _at(module, owner)
        runs.clear()
        feeds, error = first_fed(backbone, stack.blocks, shapes, runs)
        if feeds:
            break
        errors.append(f"{plain_class(backbone).__name__}.forward: {error!r}"[:200])
    else:
        inner, outer = (_at(module, stack.owners[i]) for i in (0, -1))
        if not headed and set(_embeddings(outer)) != set(_embeddings(inner)):
            raise ValueError(
                f"head= must name the head here: the backbone of {stack.path!r} may be any of {_some(stack.owners)}, "
                f"and none runs on dummy token ids ({'; '.join(errors)})"
            )
        backbone = outer if headed else inner
    order = list(backbone.parameters())
    within = {p for block in stack.blocks for p in block.parameters()}
    # Unmet in a whole run is unused; unmet in one that broke off above block 0 can only come later.
    first = 0 if feeds and error else next(i for i, p in enumerate(order) if p in within)
    embedded = {p for embedding in _embeddings(backbone) for p in embedding.parameters()}
    around = {
        p: 0 if p in embedded else feeds.get(p, 0 if i < first else len(stack.blocks))
        for i, p in enumerate(order)
        if p in rest
    }
    if not feeds and around.keys() - embedded:
        warnings.warn(
            f"LayerGroups placed {len(around.keys() - embedded)} tensors around {stack.path!r} by registration order, "
            f"since the backbone does not run on dummy token ids ({'; '.join(errors)}); look at print(groups), and "
            "if it is wrong name the groups by groups=",
            stacklevel=4,
        )
    return around


def _given_stacks(module: nn.Module, paths: list[str]) -> list[_Stack]:
    stacks: list[_Stack] = []
    for path in paths:
        blocks = _at(module, path)
        owners = _owners(module, path) or [""]
        if stacks and stacks[-1].owners[0] == owners[0]:
            stacks[-1].blocks += blocks.children()
        else:
            stacks.append(_Stack(path, list(blocks.children()), owners))
    return stacks


def _find_stacks(module: nn.Module, shapes: Shapes) -> tuple[list[_Stack], bool]:
    """The stacks of blocks, bottom to top, and whether each feeds the next."""
    owners: dict[str, list[str]] = {}
    for path, child in named_plain_modules(module):
        if _is_block_list(child) and not any(_inside(path, other) for other in owners):
            owners |= {path: above} if (above := _owners(module, path)) else {}
    smallest = {path: above[0] for path, above in owners.items()}
    # A list of heads or metrics reaches an embedding only through a module that holds a whole backbone.
    found = [path for path, a in smallest.items() if not any(a != b and _inside(b, a) for b in smallest.values())]
    # A list of bare layers (per-label Linears) gives way to a list of blocks made of layers.
    found = [path for path in found if any(unwrapped(c)._modules for c in _at(module, path).children())] or found
    if not found:
        raise ValueError(
            "blocks= must name the list of blocks here: no ModuleList or Sequential of same-class children lies beside "
            f"an nn.Embedding. Lists: {_some(_lists(module))}. Without a block list pass groups={{name: regex}}"
        )
    if len({smallest[path] for path in found}) < len(found):
        raise ValueError(
            f"blocks= must name the list of blocks here, or several bottom to top: found {_some(found)} in one backbone"
        )
    stacks = []
    for path in found:
        alone = [o for o in owners[path] if not any(_inside(other, o) for other in found if other != path)]
        stacks.append(_Stack(path, list(_at(module, path).children()), alone or owners[path][:1]))
    if len(stacks) == 1:
        return stacks, True
    stacks, stacked = _arrange(module, stacks, shapes)
    if not stacked and len({len(stack.blocks) for stack in stacks}) > 1:
        sizes = _some(f"{stack.path} ({len(stack.blocks)})" for stack in stacks)
        raise ValueError(
            f"blocks= must name one of the parallel encoders, or several to stack: only equal numbers of blocks are "
            f"merged by depth; found {sizes}"
        )
    return stacks, stacked


def _arrange(module: nn.Module, stacks: list[_Stack], shapes: Shapes) -> tuple[list[_Stack], bool]:
    """Bottom to top if some stack feeds another. Where that cannot be run, sharing weights says that it does."""
    parting = _parting([stack.path for stack in stacks])
    common = _at(module, ".".join(stacks[0].path.split(".")[:parting]))
    feeds, error = first_fed(common, [stack.blocks[0] for stack in stacks], shapes)
    inside = [{p for block in stack.blocks for p in block.parameters()} for stack in stacks]
    below = [sum(any(feeds.get(p) == i for p in other) for other in inside) for i in range(len(stacks))]
    if error is None or any(below):
        return [stacks[i] for i in sorted(range(len(stacks)), key=below.__getitem__)], any(below)
    owned = [p for stack in stacks for p in set(_at(module, stack.owners[0]).parameters())]
    return stacks, len(set(owned)) < len(owned)


def _paths(module: nn.Module, argument: str, given: str | Sequence[str] | None) -> list[str]:
    paths = [plain_name(path) for path in ([given] if isinstance(given, str) else given or ())]
    known = dict(named_plain_modules(module, remove_duplicate=False))
    lists = _lists(module)
    if argument == "blocks" and any(_inside(a, b) for a, b in permutations(paths, 2)):
        raise ValueError(f"blocks= must name distinct lists, none inside another; got {_some(paths)}")
    for path in paths:
        if argument == "blocks" and path not in lists:
            raise ValueError(f"blocks= must name a ModuleList or Sequential; got {path!r}; there are: {_some(lists)}")
        if path not in known or not path:
            children = [name for name in known if name.count(".") < 2 and name]
            raise ValueError(f"{argument}= must name a submodule; got {path!r}; there are: {_some(children)}")
    return paths


def _lists(module: nn.Module) -> list[str]:
    return [
        path
        for path, child in named_plain_modules(module, remove_duplicate=False)
        if isinstance(child, (nn.ModuleList, nn.Sequential)) and any(True for _ in child.parameters())
    ]


def _is_block_list(module: nn.Module) -> bool:
    children = list(module.children())
    return (
        isinstance(module, (nn.ModuleList, nn.Sequential))
        and not isinstance(module, ParametrizationList)  # of one weight, not of layers
        and len({plain_class(child) for child in children}) == 1
        and all(any(True for _ in child.parameters()) for child in children)
    )


def _at(module: nn.Module, path: str) -> nn.Module:
    return unwrapped(module.get_submodule(path))


def _embeddings(module: nn.Module) -> Iterator[nn.Embedding]:
    return (child for child in module.modules() if isinstance(child, nn.Embedding))


def _owners(module: nn.Module, path: str) -> list[str]:
    """Paths of the modules above ``path`` that hold an embedding outside it, innermost first; the root is ``""``."""
    parts, inside = path.split("."), set(_at(module, path).modules())
    ancestors = [".".join(parts[:i]) for i in reversed(range(len(parts)))] if path else []
    return [owner for owner in ancestors if not set(_embeddings(_at(module, owner))) <= inside]


def _parting(paths: list[str]) -> int:
    """How many leading components the paths share."""
    levels = zip(*(path.split(".") for path in paths), strict=False)
    return next(i for i, level in enumerate(levels) if len(set(level)) > 1)


def _inside(path: str, owner: str) -> bool:
    return f"{path}.".startswith(f"{owner}.") or not owner


def _lowest(ranks: Iterable[tuple[nn.Parameter, int]]) -> dict[nn.Parameter, int]:
    lowest: dict[nn.Parameter, int] = {}
    for parameter, rank in ranks:
        lowest[parameter] = min(rank, lowest.get(parameter, rank))
    return lowest


def _some(names: Iterable[str], most: int = 8) -> str:
    listed = list(names)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "") or "none"
