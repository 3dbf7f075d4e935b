"""What a head is built from, and the checkpoint that it can be built from again."""

from __future__ import annotations

import copy
import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_ft.functional.delta_checkpoint import from_delta

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

KEY = "lightning_ft"
"""Key of a Lightning checkpoint under which a head stores what it is built from."""


class Architecture:
    """A model by its configuration, mostly without pretrained weights, and the tokenizer that goes with it.

    Args:
        config: The model's configuration.
        tokenizer: What turns text into its inputs; needed only to save and to export.
        generation: The settings of its ``generate``; by default those that the configuration gives.
        weights: A pretrained folder with safetensors, whose weights take the place of random ones.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        tokenizer: PreTrainedTokenizerBase | None = None,
        generation: Mapping[str, Any] | None = None,
        weights: str | os.PathLike[str] | None = None,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.generation = generation
        self.weights = weights


def pack(
    name: str, arguments: Mapping[str, Any], model: PreTrainedModel, tokenizer: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """What a checkpoint stores beside the weights, in types that a weights-only load admits."""
    generation = model.generation_config.to_json_string(use_diff=False) if model.can_generate() else None
    return {
        "class": name,
        "arguments": dict(arguments),
        "config": model.config.to_json_string(use_diff=False),
        "generation": generation,
        "tokenizer": dict(tokenizer),
    }


def pack_tokenizer(tokenizer: PreTrainedTokenizerBase | None) -> dict[str, torch.Tensor]:
    """A tokenizer's files by their names."""
    if tokenizer is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        # As tensors: a weights-only checkpoint holds no bytes, and sentencepiece models are no text.
        contents = {path.relative_to(folder).as_posix(): bytearray(path.read_bytes()) for path in files}
        return {name: torch.frombuffer(data, dtype=torch.uint8) for name, data in contents.items() if data}


def unpack(stored: Mapping[str, Any], weights: str | None = None) -> Architecture:
    """The architecture that :func:`pack` stored.

    Args:
        stored: What it returned.
        weights: The pretrained folder over which a checkpoint was trained that lacks its base.

    Raises:
        FileNotFoundError: That folder is not there.
        ValueError: A tokenizer file would be written outside its folder, or the model is not one of transformers'.
    """
    from transformers import AutoConfig, AutoTokenizer

    if weights is not None and not Path(weights).is_dir():
        raise FileNotFoundError(
            f"the checkpoint keeps only what was trained over the weights in {weights}, which is not there any more: "
            "build the module with pretrained=... where they are now, and call "
            "lightning_ft.functional.load_altered(module, checkpoint)"
        )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(stored["config"], encoding="utf-8")
        root = Path(folder).resolve()
        for name, content in stored["tokenizer"].items():
            path = (root / name).resolve()
            if not path.is_relative_to(root):
                raise ValueError(f"the checkpoint names a tokenizer file {name!r} outside its folder: do not trust it")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.numpy().tobytes())
        config = json.loads(stored["config"])
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False) if stored["tokenizer"] else None
    generation = json.loads(stored.get("generation") or "null")
    try:
        return Architecture(AutoConfig.for_model(**config), tokenizer, generation, weights)
    except ValueError as error:
        raise ValueError(
            f"the checkpoint's model type {config.get('model_type')!r} is not one of transformers', so a checkpoint "
            "alone cannot rebuild it (code from the hub does not travel in it): build the module with its pretrained "
            "folder and trust_remote_code=True, and load the weights by trainer.fit(..., ckpt_path=...)"
        ) from error


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a checkpoint that one of our modules wrote, without running any code in it.

    Raises:
        FileNotFoundError: There is no such file, or it keeps differences to a base that is not there any more.
        ValueError: The file is not a checkpoint of a lightning_ft module.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if KEY not in checkpoint:
        raise ValueError(
            f"{path} was not written by a lightning_ft module (it has the keys {sorted(checkpoint)}): load it with the "
            "LightningModule class that wrote it"
        )
    whole: dict[str, Any] = from_delta(checkpoint, source=str(path))
    return whole


def load_model(
    model_class: Any,
    pretrained: str | os.PathLike[str] | Architecture,
    config_updates: Mapping[str, Any],
    *,
    trust_remote_code: bool,
    allow_pickle: bool,
    expect_head: bool = False,
) -> PreTrainedModel:
    """A model in fp32: pretrained weights where there are some, new ones for the head.

    With ``expect_head`` new weights are not what the caller wants, and a warning names them.

    Raises:
        OSError: The model is not there, or holds pickle files alone.
    """
    from transformers import AutoConfig, GenerationConfig

    if isinstance(pretrained, Architecture):
        config = copy.deepcopy(pretrained.config)
        for name, value in config_updates.items():
            setattr(config, name, value)
        model: PreTrainedModel = (
            model_class.from_config(config, dtype=torch.float32)
            if pretrained.weights is None
            else model_class.from_pretrained(
                pretrained.weights,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
            )
        )
        if pretrained.generation is not None and model.can_generate():
            model.generation_config = GenerationConfig.from_dict(dict(pretrained.generation))
        return model
    config = AutoConfig.from_pretrained(pretrained, trust_remote_code=trust_remote_code, **config_updates)
    try:
        model, loaded = model_class.from_pretrained(
            pretrained,
            config=config,
            dtype=torch.float32,
            use_safetensors=None if allow_pickle else True,
            trust_remote_code=trust_remote_code,
            # A head for another number of labels is a new head.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except OSError as error:
        if allow_pickle:
            raise
        raise OSError(
            f"pretrained={os.fspath(pretrained)!r} could not be loaded from safetensors. If it holds pickle weights "
            "alone and you trust them, pass allow_pickle=True"
        ) from error
    new = sorted([*loaded["missing_keys"], *(name for name, *_ in loaded["mismatched_keys"])])
    if expect_head and new:
        warnings.warn(
            f"pretrained={os.fspath(pretrained)!r} lacks weights of {model_class.__name__}, and random ones take their "
            f"place: {', '.join(new)}. What they compute must be learnt from nothing: take a checkpoint with this head",
            stacklevel=2,
        )
    return model


def local_weights(pretrained: str | os.PathLike[str]) -> str | None:
    """The folder of a pretrained model's safetensors on this machine; None where there are none."""
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

    if Path(pretrained).is_dir():
        files = (Path(pretrained) / name for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
        return str(Path(pretrained).absolute()) if any(file.is_file() for file in files) else None
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
        with suppress(OSError):
            if (found := cached_file(os.fspath(pretrained), name, local_files_only=True)) is not None:
                return str(Path(found).parent)
    return None


def plain(value: Any) -> Any:
    """A value that a weights-only checkpoint may hold."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # NumPy's and torch's arrays and scalars
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
