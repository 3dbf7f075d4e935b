"""What is exported: a model, what its graph computes, and what a reader of the outputs must know."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from torch import nn

from lightning_ft.export.bake import baked, core_model, unwrapped
from lightning_ft.export.ensemble import ensemble
from lightning_ft.export.graphs import Graphs
from lightning_ft.export.wrappers import Choices, Features, GraphWrapper, LabelScores, Logits, Spans, TokenLogits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lightning_ft.modules import TransformerModule

Wrap = Callable[[Any], GraphWrapper | Graphs]


@dataclass(frozen=True)
class Head:
    """What a graph computes, and how its outputs are read; written beside it as ``head.json``.

    Args:
        task: Its name, as Hugging Face names tasks: ``"text-classification"``, ``"token-classification"``,
            ``"question-answering"``, ``"multiple-choice"``, ``"fill-mask"``, ``"cloze"``, ``"feature-extraction"``,
            ``"text-generation"``, ``"text2text-generation"``, or one of your own.
        wrap: Makes the graph of a model, or several.
        labels: Names of the classes, by index; none where there are no classes.
        settings: What else a reader of the outputs needs; JSON-able.
    """

    task: str
    wrap: Wrap
    labels: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Everything but the code."""
        return {"task": self.task, "labels": list(self.labels), "settings": dict(self.settings)}


@dataclass(frozen=True)
class Exportable:
    """A trained model with all that an export needs.

    Args:
        model: In any mode, on any device.
        tokenizer: The one that it was trained with.
        head: What is to be computed.
        source: Where it came from: a path, or a class.
        module: The module of lightning_ft that computes the same, if there is one: it knows the task's metrics.
        reference: The model that the source holds, where ``model`` was made of it: what the graph is compared with.
        baked: What was done to make it.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    head: Head
    source: str
    module: TransformerModule | None = None
    reference: nn.Module | None = None
    baked: tuple[str, ...] = ()

    @property
    def original(self) -> nn.Module:
        """What the source computes with."""
        return self.model if self.reference is None else self.reference

    @property
    def models(self) -> list[nn.Module]:
        """Both, or the one."""
        return [self.model] if self.reference is None else [self.model, self.reference]


def open_source(
    source: str | os.PathLike[str] | nn.Module,
    *,
    head: Head | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    members: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
) -> dict[str, Exportable]:
    """What a checkpoint, a folder or a module holds: by task for several heads, else one under ``""``.

    Args:
        source: A Lightning checkpoint of a lightning_ft module, a Hugging Face folder with safetensors, a lightning_ft
            module, a Hugging Face model, or any other module (with ``head``, whose wrapper takes it).
        head: What to export of it; by default what its class is for.
        tokenizer: The one that it was trained with; by default the one that is there.
        members: Snapshots of the source, by :class:`~lightning_ft.callbacks.SnapshotEnsemble`, which answer together:
            their folder, or their files.

    Raises:
        FileNotFoundError: There is no such file or folder.
        OSError: The folder has no safetensors.
        TypeError: What the source holds cannot be exported without a ``head``.
        ValueError: There is no tokenizer.
    """
    from lightning_ft.modules import TransformerModule

    origin = type(source).__name__ if isinstance(source, nn.Module) else os.fspath(source)
    result = {}
    for name, (part, there) in read_models(source).items():
        # A head of the user's own is given the module itself, unless it is one of ours.
        module = part if isinstance(part, TransformerModule) else None
        whole = part if module is None else module.model
        # A head of the user's own may want all of a peft model.
        model = core_model(whole) if head is None else unwrapped(whole)
        used = tokenizer or there
        chosen = head or (hf_head(model, used) if module is None else own_head(module, tokenizer))
        if used is None:
            raise ValueError(f"tokenizer: {origin} holds none: pass the one that the model was trained with")
        # With a head of the user's own the graph computes something else than the module does.
        plain, done = baked(model)
        kept = model if done else None
        result[name] = Exportable(plain, used, chosen, origin, module if head is None else None, kept, tuple(done))
        if members:
            result[name] = ensemble(result[name], members)
    return result


def read_models(
    source: str | os.PathLike[str] | nn.Module,
) -> dict[str, tuple[nn.Module, PreTrainedTokenizerBase | None]]:
    """The modules that a source holds, with their tokenizers: by task for several heads, else one under ``""``."""
    from lightning_ft.modules import MultiTask, TransformerModule

    module, tokenizer = (unwrapped(source), None) if isinstance(source, nn.Module) else _read(Path(source))
    parts: Mapping[str, nn.Module] = module.heads if isinstance(module, MultiTask) else {"": module}
    return {
        name: (part, part.tokenizer if isinstance(part, TransformerModule) else tokenizer)
        for name, part in parts.items()
    }


def own_head(module: TransformerModule, tokenizer: PreTrainedTokenizerBase | None = None) -> Head:
    """The head of a lightning_ft module.

    Args:
        module: The module.
        tokenizer: In place of its own.

    Raises:
        TypeError: There is none for its class.
    """
    from lightning_ft import modules
    from lightning_ft.export import generative_heads

    if isinstance(module, modules.SequenceClassification):
        labels = () if module.problem == "regression" else tuple(module.labels)
        return Head("text-classification", Logits, labels, {"problem": module.problem})
    if isinstance(module, modules.TokenClassification):
        return Head("token-classification", TokenLogits, tuple(module.labels), {"scheme": module.scheme})
    if isinstance(module, modules.QuestionAnswering):
        threshold = module.no_answer_threshold.item()
        settings: dict[str, Any] = {
            "n_best": module.n_best,
            "max_answer_length": module.max_answer_length,
            "no_answer": module.no_answer,
            # JSON knows no infinity: every question is answered.
            "no_answer_threshold": threshold if math.isfinite(threshold) else None,
        }
        return Head("question-answering", Spans, settings=settings)
    if isinstance(module, modules.MultipleChoice):
        return Head("multiple-choice", Choices)
    if isinstance(module, modules.MaskedLM):
        return Head("fill-mask", TokenLogits, settings={"top_k": module.top_k})
    if isinstance(module, modules.Cloze):
        settings = {
            "patterns": list(module.patterns),
            "words": dict(module.hparams["verbalizer"]),
            "decoder": module.decoder,
            "masks": module.masks,
            "calibrate": module.calibrate,
        }
        return Head("cloze", partial(LabelScores, words=module.words), tuple(module.labels), settings)
    if isinstance(module, modules.CausalLM):
        return generative_heads.causal_head(module, tokenizer)
    if isinstance(module, modules.Seq2Seq):
        return generative_heads.seq2seq_head(module)
    raise TypeError(f"a {type(module).__name__} has no head here: give a `head` with a GraphWrapper of your own")


_HF: dict[str, Head | None] = {
    "ForSequenceClassification": Head("text-classification", Logits),
    "ForTokenClassification": Head("token-classification", TokenLogits),
    "ForQuestionAnswering": Head("question-answering", Spans),
    # XLNet's other one is a beam search, whose outputs are no logits of tokens.
    "ForQuestionAnsweringSimple": Head("question-answering", Spans),
    "ForMultipleChoice": Head("multiple-choice", Choices),
    "ForMaskedLM": Head("fill-mask", TokenLogits),
    "Model": Head("feature-extraction", Features),
    # Other heads that end in Model, too.
    "HeadModel": None,
    "HeadsModel": None,
}
"""How the name of a Hugging Face class ends, to its head."""

_GENERATES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "MTModel")
"""How those end that write text."""


def hf_head(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None) -> Head:
    """The head of a Hugging Face model, by its class.

    Args:
        model: The model.
        tokenizer: Its tokenizer, which knows what prompts of a model that writes text look like.

    Raises:
        TypeError: It is not one of transformers', or of a class that is not known.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model: expected a transformers PreTrainedModel or a module of lightning_ft, got {type(model).__name__}: "
            "give a `head` with a GraphWrapper of your own, or the `.model` of a LightningModule"
        )
    if type(model).__name__.endswith(_GENERATES):
        from lightning_ft.export.generative_heads import hf_generative_head

        return hf_generative_head(model, tokenizer)
    head = _by_name(type(model).__name__)
    if head.task not in ("text-classification", "token-classification"):
        return head
    labels = tuple(model.config.id2label[index] for index in range(model.config.num_labels))
    if head.task == "token-classification":
        scheme = _scheme(labels)
        return replace(head, labels=labels, settings={} if scheme is None else {"scheme": scheme})
    problem = _problem(model.config)
    return replace(head, labels=() if problem == "regression" else labels, settings={"problem": problem})


def _scheme(labels: Sequence[str]) -> str | None:
    """The first scheme whose tags all labels are, and of which one may begin an entity.

    None where there is none: parts of speech.
    """
    from lightning_ft.metrics.entity_f1 import Scheme, tag_table

    for scheme in get_args(Scheme):
        with suppress(ValueError):
            _, table = tag_table(labels, scheme)
            if table[:, 1].any():
                return str(scheme)
    return None


def _problem(config: Any) -> str:
    """Of a classifier; where its configuration does not say, one output is a number, and several are classes."""
    if config.problem_type is None:
        return "regression" if config.num_labels == 1 else "single_label"
    from lightning_ft.modules.sequence_classification import PROBLEM_TYPES

    return {name: problem for problem, name in PROBLEM_TYPES.items()}[config.problem_type]


def _by_name(name: str) -> Head:
    """By the longest ending: every class of transformers ends in something."""
    fits = [ending for ending in _HF if name.endswith(ending)]
    head = _HF[max(fits, key=len)] if fits else None
    if head is None:
        known = ", ".join(f"…{ending}" for ending in [*(name for name, given in _HF.items() if given), *_GENERATES])
        raise TypeError(f"model: {name} is none of {known}: give a `head` with a GraphWrapper of your own")
    return head


def _read(path: Path) -> tuple[nn.Module, PreTrainedTokenizerBase | None]:
    """The module that a file or a folder holds."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give a checkpoint, or a Hugging Face folder")
    if path.is_file():
        from lightning_ft.modules import load_checkpoint

        return load_checkpoint(path), None
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"{path} is a folder without a config.json: give a Hugging Face folder, or the checkpoint's file"
        )
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(path)
    names = config.architectures or ["no class"]
    kind = getattr(transformers, names[0], None)
    if kind is None:
        raise TypeError(f"{path}: its config.json names {names[0]}, which transformers does not have: load it yourself")
    if (module := _ours(path, names[0], config)) is not None:
        return module, None
    model = kind.from_pretrained(path, dtype=torch.float32, use_safetensors=True)
    return model, transformers.AutoTokenizer.from_pretrained(path) if _has_tokenizer(path) else None


def _ours(path: Path, name: str, config: Any) -> TransformerModule | None:
    """The module of lightning_ft for a folder, which knows the task's metrics; None where there is none."""
    from lightning_ft import modules

    if not _has_tokenizer(path):
        return None
    labels = [config.id2label[index] for index in range(config.num_labels)]
    module: TransformerModule | None = None
    if name.endswith("ForSequenceClassification"):
        problem = _problem(config)
        given = None if problem == "regression" else labels
        module = modules.SequenceClassification(path, given, problem=problem)  # type: ignore[arg-type]
    elif name.endswith("ForTokenClassification"):
        scheme = _scheme(labels)
        if scheme is not None:
            module = modules.TokenClassification(path, labels, scheme=scheme)  # type: ignore[arg-type]
    elif name.endswith(("ForQuestionAnswering", "ForQuestionAnsweringSimple")):
        module = modules.QuestionAnswering(path)
    elif name.endswith("ForMultipleChoice"):
        module = modules.MultipleChoice(path)
    elif name.endswith("ForMaskedLM"):
        module = modules.MaskedLM(path)
    elif name.endswith(("ForCausalLM", "LMHeadModel")) and not config.is_encoder_decoder:
        module = modules.CausalLM(path)
    elif name.endswith(("ForConditionalGeneration", "MTModel")) and config.is_encoder_decoder:
        module = modules.Seq2Seq(path)
    return module if module is not None and type(module.model).__name__ == name else None


def _has_tokenizer(path: Path) -> bool:
    return any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
