"""From prompts and answers to tokens, of which the answers are learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OverLong = Literal["truncate", "drop", "error"]
Tokens = tuple[list[int], list[bool]]
"""Tokens, and whether each belongs to an answer."""


def encode_answers(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[str]]) -> list[Tokens]:
    """Tokens of texts that grow by a prompt and an answer in turn.

    A prompt's tokens are those that it has alone, as when the model is asked. An answer's are those with which the
    whole goes on; where a token of the whole would reach over the border, those that the answer has alone.

    Args:
        tokenizer: The tokenizer; no special tokens are put around.
        rows: For each row the prompt, prompt + answer, prompt + answer + prompt, …
    """

    def encode(texts: list[str]) -> list[list[int]]:
        settings = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        ids: list[list[int]] = tokenizer(texts, **settings)["input_ids"] if texts else []
        return ids

    wholes = iter(encode([text for texts in rows for text in texts]))
    result = []
    for texts in rows:
        ids: list[int] = []
        answers: list[bool] = []
        text_before, before = "", list[int]()
        for number, text in enumerate(texts):
            whole = next(wholes)
            goes_on = whole[: len(before)] == before
            new = whole[len(before) :] if goes_on else encode([text[len(text_before) :]])[0]
            ids += new
            answers += [number % 2 == 1] * len(new)
            text_before, before = text, whole
        result.append((ids, answers))
    return result


def check_prompt(where: str, tokens: Tokens) -> Tokens:
    """Tokens that begin with a prompt.

    Raises:
        ValueError: The tokenizer made no token of the first prompt.
    """
    _, answers = tokens
    if not answers or answers[0]:
        raise ValueError(
            f"{where}: the tokenizer makes no token of the prompt, so that there is nothing to answer: remove the row, "
            "or put some text into the template"
        )
    return tokens


def frame(tokens: Tokens, before: Sequence[int], end: int, *, always: bool) -> Tokens:
    """Special tokens around: ``before`` the text, and ``end`` after its last answer, to which it belongs.

    Args:
        tokens: The tokens.
        before: What comes before them.
        end: What comes after them.
        always: If false, only where the last answer, or what a chat template put after it, does not hold ``end``.
    """
    ids, answers = tokens
    last = len(answers) - answers[::-1].index(False)
    ends = [end] if always or end not in ids[last:] else []
    return [*before, *ids, *ends], [*[False] * len(before), *answers, *[True] * len(ends)]


def fit_answer(where: str, tokens: Tokens, limit: int, *, over_long: OverLong, mask_prompt: bool) -> dict[str, Any]:
    """``input_ids``, ``labels`` and ``truncated`` of a row of at most ``limit`` tokens; longer only if it is to drop.

    Raises:
        ValueError: It is too long, and not to cut.
    """
    ids, answers = tokens
    prompt, drops = answers.index(True), over_long == "drop"
    if len(ids) > limit and not drops and (over_long == "error" or prompt >= limit):
        left = f"max_length={limit}" + (" leaves nothing of the answer" if prompt >= limit else " is less")
        raise ValueError(
            f"{where}: the prompt has {prompt} tokens, prompt and answer {len(ids)}, and {left}: raise it, remove the "
            'row, or set over_long="drop"'
        )
    labels = [token if answer or not mask_prompt else -100 for token, answer in zip(ids, answers, strict=True)]
    kept = len(ids) if drops else limit
    return {"input_ids": ids[:kept], "labels": labels[:kept], "truncated": len(ids) > kept}


def fit_prompt(where: str, ids: list[int], limit: int) -> list[int]:
    """A prompt to answer, which is never cut.

    Raises:
        ValueError: It has more than ``limit`` tokens.
    """
    if len(ids) > limit:
        raise ValueError(f"{where}: the prompt has {len(ids)} tokens, and max_length={limit}: raise it, or shorten it")
    return ids
