"""Where the tokens of a model's input are embedded, and which of them may be touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_ft.core.layers import Layers
from lightning_ft.core.sharding import plain_name, unwrapped
from lightning_ft.core.sub_layers import modules_above
from lightning_ft.core.token_embeddings import token_embeddings


@dataclass(frozen=True)
class TokenInputs:
    """What tells the input's embeddings where they are not found, and which tokens are left alone.

    Args:
        embedding: Path of the module, or modules, that embed the tokens of the input: ``"encoder.tokens"``.
        exclude: Ids of tokens that are never perturbed, such as ``tokenizer.all_special_ids``. Padding never is.
        layers: Where the blocks are, by which embeddings are found.

    Example:
        >>> TokenInputs(exclude=[101, 102]).exclude
        [101, 102]
    """

    embedding: str | Sequence[str] | None = None
    exclude: Sequence[int] = ()
    layers: Layers | None = None

    def of(self, module: nn.Module) -> InputEmbeddings:
        """The embeddings of a module's input, found by structure and by a run on the meta device.

        Of an encoder-decoder they are the encoder's. One table that both look up is called for the encoder first.

        Raises:
            ValueError: They are not found; a path names no module.
        """
        if self.embedding is not None:
            known = {plain_name(path): child for path, child in module.named_modules(remove_duplicate=False)}
            paths = [self.embedding] if isinstance(self.embedding, str) else list(self.embedding)
            if missing := [path for path in paths if not path or path not in known]:
                raise ValueError(
                    f"inputs: embedding={missing[0]!r} must be the path of a module; embeddings are: "
                    f"{', '.join(p for p, child in known.items() if isinstance(child, nn.Embedding)) or 'none'}"
                )
            return InputEmbeddings(tuple(dict.fromkeys(known[path] for path in paths)), False)
        try:
            return _found(module, self.layers or Layers())
        except ValueError as error:
            only = {child for child in module.modules() if isinstance(child, nn.Embedding)}
            if len(only) == 1:
                return InputEmbeddings(tuple(only), False)
            raise ValueError(
                f"the embeddings of the input are not found in {type(module).__name__} ({error}): name them, "
                'inputs=TokenInputs(embedding="encoder.tokens")'
            ) from error


@dataclass(frozen=True)
class InputEmbeddings:
    """Args:
    modules: The modules that embed the tokens of the input.
    first_call: Whether only the first call of them in a call of the model does; later ones embed the output.
    """

    modules: tuple[nn.Module, ...]
    first_call: bool


def as_token_inputs(inputs: TokenInputs | Mapping[str, Any] | None) -> TokenInputs:
    """Token inputs, or their plain arguments, or nothing given, as :class:`TokenInputs`."""
    return inputs if isinstance(inputs, TokenInputs) else TokenInputs(**(inputs or {}))


def _found(module: nn.Module, layers: Layers) -> InputEmbeddings:
    paths = layers.block_paths(module)
    # "encoder.block.0" … "decoder.block.0" …: the first stack is what the input enters.
    lowest = next(iter(paths)).rpartition("block.")[0]
    bottom = [several for label, several in paths.items() if label.rpartition("block.")[0] == lowest]
    towers = zip(*bottom, strict=True)
    found = dict.fromkeys(child for tower in towers for child in _of_tower(module, tower))
    return InputEmbeddings(tuple(found), len(bottom) < len(paths))


def _of_tower(module: nn.Module, blocks: Sequence[str]) -> list[nn.Embedding]:
    """The token embeddings in the smallest module around the blocks that holds any."""
    error: ValueError | None = None
    for owner in reversed(modules_above(blocks)):
        inside = [path[len(owner) :].lstrip(".") for path in blocks]
        around = unwrapped(module.get_submodule(owner))
        if not any(isinstance(child, nn.Embedding) for child in around.modules()):
            continue
        try:
            return token_embeddings(around, inside)
        except ValueError as reason:
            error = error or reason
    raise error or ValueError("no nn.Embedding lies beside its blocks")
