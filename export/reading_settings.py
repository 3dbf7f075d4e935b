"""What a reader must know beside the head's own settings: how the tokenizer frames texts, and what tags mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lightning_ft.core.special_tokens import around
from lightning_ft.export.readers import READERS

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule
    from transformers import PreTrainedTokenizerBase

    from lightning_ft.export.heads import Head


def with_reading_settings(
    head: Head, tokenizer: PreTrainedTokenizerBase, given: Mapping[str, Any] | None = None
) -> Head:
    """A head with all the settings that its reader needs; of a task without a reader the head itself.

    Args:
        head: The head, with its final labels.
        tokenizer: The tokenizer that goes with it.
        given: What is to be taken for some of them, such as :func:`reading_settings`.

    Raises:
        ValueError: Labels that are no tags of the head's scheme, or a setting that the reader does not know.
    """
    given = given or {}
    if head.task not in READERS:
        if given:
            raise ValueError(f"settings: there is no reader of {head.task!r} to take them: put them into the head's")
        return head
    known = {**READERS[head.task].defaults, **head.settings, "max_length": None}
    if unknown := sorted(given.keys() - known.keys()):
        raise ValueError(f"settings: {', '.join(unknown)} is none of {head.task!r}: {', '.join(known)}")
    found: dict[str, Any] = {}
    if head.task == "token-classification":
        found = _tags(head)
    elif head.task == "question-answering":
        found = {"cls": tokenizer.cls_token_id}
    elif head.task == "fill-mask":
        before, after = around(tokenizer)
        cleans = bool(tokenizer.clean_up_tokenization_spaces) and not _keeps_spaces(tokenizer)
        found = {"mask": tokenizer.mask_token_id, "before": before, "after": after, "clean_up": cleans}
    elif head.task == "cloze":
        found = _cloze(head.settings, tokenizer)
    return replace(head, settings={**READERS[head.task].defaults, **head.settings, **found, **given})


def reading_settings(data: LightningDataModule) -> dict[str, Any]:
    """How a data module makes tokens of a row: settings with which a folder answers as ``lightning-ft predict``.

    Args:
        data: For :func:`lightning_ft.export.export_onnx`'s ``settings``.

    Returns:
        ``max_length``; with windows their ``stride``, of questions ``context_first``; of a cloze the demonstrations
        that it shows.

    Raises:
        TypeError: The data module is none of a single task's with a reader.
    """
    from lightning_ft import data as known

    if isinstance(data, known.QuestionAnsweringData):
        return {"max_length": data.max_length, "stride": data.stride, "context_first": data.context_first}
    if isinstance(data, known.TokenClassificationData):
        return {"max_length": data.max_length, "stride": data.stride}
    if isinstance(data, known.ClozeData):
        contexts, room = data.evaluation_contexts()
        return {"max_length": data.max_length, "contexts": contexts, "context_room": room}
    if isinstance(data, known.InstructionData) or getattr(data, "objective", None) == "clm":
        return {}  # training texts are chunks of a length that says nothing of prompts
    if isinstance(
        data, known.ClassificationData | known.MultipleChoiceData | known.LanguageModelingData | known.Seq2SeqData
    ):
        return {"max_length": data.max_length}
    raise TypeError(f"data: {type(data).__name__} is of no task whose rows an exported folder reads by itself")


def _tags(head: Head) -> dict[str, Any]:
    """What each tag means; nothing for tags of no scheme, such as parts of speech."""
    if (scheme := head.settings.get("scheme")) is None:
        return {}
    from lightning_ft.metrics.entity_f1 import tag_table  # its package loads transformers

    types, table = tag_table(head.labels, scheme)
    return {"types": types, "table": table.tolist()}


def _cloze(settings: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    before, after = around(tokenizer)
    if settings.get("decoder"):  # what ends a text would end the prompt; demonstrations stand apart by a blank line
        after = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    return {"mask_token": tokenizer.mask_token, "before": before, "after": after}


def _keeps_spaces(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether transformers leaves decoded texts alone though it is asked to clean them up: of BPE it does."""
    forced = getattr(tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return type(getattr(backend, "model", None)).__name__ == "BPE" and not forced
