"""What a model is asked, and what it shall answer, as texts: from an instruction or a conversation."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
"""Alpaca's, with one first sentence whether there is an input or not."""

_PLACE = re.compile(r"\{(\w*)\}")


def check_template(template: str, *, with_input: bool) -> None:
    """Refuse a template that would lose a column.

    Raises:
        ValueError: A placeholder is missing, or not known.
    """
    wanted = {"instruction", "input"} if with_input else {"instruction"}
    there = set(_PLACE.findall(template))
    if unknown := sorted(there - wanted):
        raise ValueError(
            f"template has the placeholder {{{unknown[0]}}}; it may have {_braces(wanted)}, and the answer follows it"
        )
    if missing := sorted(wanted - there):
        remedy = "" if missing == ["instruction"] else ", or set input=None if rows have none"
        raise ValueError(f"template has no placeholder {_braces(missing)}, whose text would be lost: add it{remedy}")


def _braces(names: Sequence[str] | set[str]) -> str:
    return " and ".join(f"{{{name}}}" for name in sorted(names, reverse=True))


def fill_template(template: str, instruction: str, extra: str) -> str:
    r"""A template's text; its paragraph that holds ``{input}`` is left out where there is no input.

    Example:
        >>> fill_template("Do: {instruction}\n\nWith: {input}\n\nDone:", "add", "")
        'Do: add\n\nDone:'
    """
    paragraphs = template.split("\n\n")
    kept = [text for text in paragraphs if extra or "{input}" not in text or "{instruction}" in text]
    values = {"instruction": instruction, "input": extra}
    # In one pass: the texts may hold braces of their own.
    return _PLACE.sub(lambda match: values[match[1]], "\n\n".join(kept))


def check_turns(turns: Any, *, learned: bool) -> list[dict[str, str]]:
    """A conversation: an optional system turn, then user and assistant in turn, the user first.

    Args:
        turns: A list of ``{"role": …, "content": …}``; other keys are not looked at.
        learned: Whether it must end with an answer. If not, an answer at the end is left out.

    Raises:
        ValueError: It is no such list.
    """
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"must be a list of one turn or more, got {turns!r}")
    checked: list[dict[str, str]] = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, Mapping) or not {"role", "content"} <= turn.keys():
            raise ValueError(f"turn {number} must have a role and a content, got {turn!r}")
        role, content = turn["role"], turn["content"]
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"turn {number} has the unknown role {role!r}; known: 'system', 'user', 'assistant'")
        if not isinstance(content, str) or not content.strip():
            raise ValueError(f"turn {number} ({role}) must have some text, got {content!r}")
        before = checked[-1]["role"] if checked else "system"
        expected = {"system": ("user",), "user": ("assistant",), "assistant": ("user",)}[before]
        if role not in expected and (role, number) != ("system", 0):
            raise ValueError(
                f"turn {number} is the {role}'s, and {expected[0]!r} must speak: let user and assistant alternate"
            )
        checked.append({"role": role, "content": content})
    if not learned and checked[-1]["role"] == "assistant":
        checked.pop()
    wanted = "assistant" if learned else "user"
    if checked[-1]["role"] != wanted:
        reason = "there is no answer to learn" if learned else "there is nothing to answer"
        raise ValueError(f"the last turn must be the {wanted}'s, got {checked[-1]['role']!r}: {reason}")
    return checked


def lacks_answer(turns: Any) -> bool:
    """Whether an answer of a conversation is empty; what is wrong otherwise, `check_turns` says."""
    said = [turn for turn in turns if isinstance(turn, Mapping)] if isinstance(turns, list) else []
    answers = [turn.get("content") for turn in said if turn.get("role") == "assistant"]
    return any(answer is None or (isinstance(answer, str) and not answer.strip()) for answer in answers)


def render_chat(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Mapping[str, str]], template: str | None
) -> list[str]:
    """A conversation up to each answer's begin and end: prompt, prompt + answer, … each the beginning of the next.

    Args:
        tokenizer: The tokenizer.
        turns: A checked conversation.
        template: A chat template in Jinja; None for the tokenizer's own.

    Raises:
        ValueError: The template refuses the conversation, or writes earlier turns otherwise when later ones follow.
    """
    from jinja2 import TemplateError

    def render(count: int, *, prompt: bool) -> str:
        text: str = tokenizer.apply_chat_template(
            list(turns[:count]), chat_template=template, add_generation_prompt=prompt, tokenize=False
        )
        return text

    ends = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    counts = [count for end in ends for count in (end, end + 1)]
    if turns[-1]["role"] == "user":
        counts.append(len(turns))
    try:
        texts = [render(count, prompt=number % 2 == 0) for number, count in enumerate(counts)]
    except TemplateError as error:
        raise ValueError(f"the chat template refuses the conversation ({error})") from None
    for number, (before, after) in enumerate(pairwise(texts)):
        if not after.startswith(before):
            raise ValueError(
                f"the chat template writes {before[-40:]!r} otherwise once turn {counts[number + 1] - 1} follows, so "
                "that the model would learn another text than it is asked: give such turns as rows of their own, or a "
                "template that leaves earlier turns as they were"
            )
    return texts
