"""SQuAD's exact match and F1, for questions with and without an answer."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from typing_extensions import override

_ARTICLES = re.compile(r"\b(a|an|the)\b", re.UNICODE)
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation and articles, words parted by single spaces.

    Example:
        >>> normalize_answer("The  Old-Town, an  inn.")
        'oldtown inn'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def squad_scores(prediction: str, answers: Sequence[str]) -> tuple[float, float]:
    """Exact match and F1 of words, each the best over the given answers, from 0 to 1.

    Answers of which normalisation leaves nothing do not count; a question without answers has the answer ``""``. Where
    prediction or answer has no words, both measures ask whether neither has any.

    Example:
        >>> squad_scores("the Eiffel Tower in Paris", ["Eiffel Tower", "tower"])
        (0.0, 0.6666666666666666)
        >>> squad_scores("", [])
        (1.0, 1.0)
    """
    golds = [words for words in (normalize_answer(answer).split() for answer in answers) if words] or [[]]
    words = normalize_answer(prediction).split()
    return float(words in golds), max(_f1(words, gold) for gold in golds)


def _f1(words: list[str], gold: list[str]) -> float:
    if not words or not gold:
        return float(words == gold)
    common = sum((Counter(words) & Counter(gold)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(words), common / len(gold)
    return 2 * precision * recall / (precision + recall)


class Threshold(NamedTuple):
    """The threshold that gives the highest score, and that score."""

    value: Tensor
    score: Tensor


def best_threshold(spans: Tensor, null_scores: Tensor, answerable: Tensor) -> Threshold:
    """The threshold on ``null_scores`` with the highest mean score; rows above it count as unanswered.

    It is one of the rows' scores, the lowest that is as good, or lies below all where answering nothing is best. The
    official script's search, but the score is always one that the threshold gives: rows of equal ``null_scores`` are
    answered together, and a span that normalises to nothing is right where there is no answer.

    Args:
        spans: Score of each row if it is answered, from 0 to 1, ``(rows,)``.
        null_scores: How much speaks for no answer, ``(rows,)``.
        answerable: Whether each row has an answer, ``(rows,)``: what it scores if it is not answered is 1 if not.

    Example:
        >>> scores, null = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([-2.0, 3.0, 1.0])
        >>> best_threshold(scores, null, torch.tensor([True, False, True]))
        Threshold(value=tensor(1.), score=tensor(1., dtype=torch.float64))
    """
    ordered, order = null_scores.sort()
    gains = (spans.double() - (~answerable).double())[order]
    totals = gains.cumsum(0)
    ends = torch.ones_like(ordered, dtype=torch.bool)
    ends[:-1] = ordered[1:] != ordered[:-1]
    best, index = totals.masked_fill(~ends, -torch.inf).max(0)
    nothing = (~answerable).sum()
    value = torch.where(best > 0, ordered[index], ordered[0] - 1)
    return Threshold(value, (nothing + best.clamp(min=0)) / len(spans))


class Squad(Metric):
    """Exact match and F1 of answers over batches, in percent, by the definitions of the official scripts.

    ``exact`` and ``f1`` over all rows; where some rows have no answer also ``has_ans_exact``, ``has_ans_f1``,
    ``no_ans_exact`` and ``no_ans_f1`` over the two kinds of rows, and with a threshold ``best_exact``,
    ``best_exact_thresh``, ``best_f1`` and ``best_f1_thresh``: what the best threshold gives. On SQuAD 1.1 this is its
    own script's measure, too, but for answers of which normalisation leaves nothing ("the").

    Args:
        threshold: A row whose ``null_scores`` lie above it counts as unanswered. Infinite: predictions are taken as
            they are. None: the threshold of the highest F1 of the rows seen, and an infinite one where all have an
            answer. It can be set anew at any time.

    Example:
        >>> metric = Squad()
        >>> metric.update(["the Eiffel Tower", "Rome"], [["Eiffel Tower"], ["the city of Rome"]])
        >>> {name: round(value.item(), 1) for name, value in metric.compute().items()}
        {'exact': 50.0, 'f1': 75.0}

    Reference:
        Rajpurkar et al. 2016, "SQuAD: 100,000+ Questions for Machine Comprehension of Text"; Rajpurkar et al. 2018,
        "Know What You Don't Know: Unanswerable Questions for SQuAD" (evaluate-v2.0.py).
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False

    def __init__(self, threshold: float | None = float("inf")) -> None:
        super().__init__()
        self.threshold = threshold
        self.rows: list[Tensor]
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    @override
    def update(
        self, predictions: Sequence[str], answers: Sequence[Sequence[str]], null_scores: Tensor | None = None
    ) -> None:
        """Add rows.

        Args:
            predictions: The answer to each row; with ``null_scores``, the one if there is any.
            answers: The right answers of each row; empty for a question without an answer.
            null_scores: How much speaks for no answer, ``(rows,)``.

        Raises:
            ValueError: The numbers of rows differ.
        """
        counts = (len(predictions), len(answers), len(predictions) if null_scores is None else len(null_scores))
        if len(set(counts)) > 1:
            raise ValueError(f"predictions, answers and null_scores are of {counts} rows: they must be of as many")
        if not len(predictions):
            return
        scores = [(*squad_scores(p, a), float(bool(a))) for p, a in zip(predictions, answers, strict=True)]
        rows = torch.tensor(scores, device=self.device)
        nulls = rows.new_full((len(rows), 1), -torch.inf) if null_scores is None else null_scores.to(rows)[:, None]
        self.rows.append(torch.cat([rows, nulls], 1))

    @override
    def compute(self) -> dict[str, Tensor]:
        exact, f1, answerable, nulls = dim_zero_cat(self.rows).cpu().unbind(1)
        has = answerable.bool()
        best_exact, best_f1 = (best_threshold(spans, nulls, has) for spans in (exact, f1))
        threshold = self.threshold
        if threshold is None:
            threshold = float("inf") if has.all() else best_f1.value.item()
        exact, f1 = (torch.where(nulls > threshold, 1 - answerable, scores) for scores in (exact, f1))
        results = {"exact": exact.double().mean(), "f1": f1.double().mean()}
        if not has.all():
            for kind, part in (("has_ans", has), ("no_ans", ~has)):
                if part.any():
                    results |= {f"{kind}_exact": exact[part].double().mean(), f"{kind}_f1": f1[part].double().mean()}
            if threshold != float("inf"):
                results |= {"best_exact": best_exact.score, "best_f1": best_f1.score}
        percent = {name: (100 * value).float() for name, value in results.items()}
        if "best_f1" in percent:
            percent |= {"best_exact_thresh": best_exact.value, "best_f1_thresh": best_f1.value}
        return {name: value.to(self.device) for name, value in percent.items()}
