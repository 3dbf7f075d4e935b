"""ROUGE and chrF whose states are sums, and the text metrics by their names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.text import rouge_score
from torchmetrics.text import SacreBLEUScore
from typing_extensions import override

from lightning_ft.metrics.bert_score import BERTScore
from lightning_ft.metrics.meteor import METEOR

TextMetric = Literal["rouge", "bleu", "chrf", "meteor", "bertscore"]


def text_metrics(metrics: Sequence[TextMetric] | Mapping[TextMetric, Mapping[str, Any]]) -> dict[str, Metric]:
    """Metrics that compare texts with references, all from 0 to 1: ``update(texts, lists of references)``.

    Args:
        metrics: ``"rouge"`` (:class:`ROUGE`), ``"bleu"`` (SacreBLEU, 13a tokens, no smoothing), ``"chrf"``
            (:class:`ChrF`), ``"meteor"`` (:class:`METEOR`), ``"bertscore"`` (:class:`BERTScore`, which needs its
            ``model``): names, or each with the options of its class.

    Raises:
        ValueError: An unknown name or option, or ``"bertscore"`` without a model.

    Example:
        >>> sorted(text_metrics({"rouge": {}, "chrf": {"beta": 3.0}}))
        ['chrf', 'rouge']
    """
    options: dict[str, Mapping[str, Any]] = (
        {name: given or {} for name, given in metrics.items()}
        if isinstance(metrics, Mapping)
        else {name: {} for name in metrics}
    )
    classes = {"rouge": ROUGE, "bleu": SacreBLEUScore, "chrf": ChrF, "meteor": METEOR, "bertscore": BERTScore}
    if unknown := [name for name in options if name not in classes]:
        raise ValueError(f"metrics={list(options)}: {unknown[0]!r} is not one of {get_args(TextMetric)}")
    if "model" not in options.get("bertscore", {"model": ""}):
        raise ValueError(
            'metrics has "bertscore", which compares by an encoder: write metrics={"bertscore": {"model": ...}} with '
            "the folder of one (roberta-large with layer 17 is usual for English), or leave it out"
        )
    made: dict[str, Metric] = {}
    for name, given in options.items():
        try:
            made[name] = classes[name](**given)
        except TypeError as error:
            raise ValueError(f"metrics: {name} takes other options than {dict(given)}: {error}") from None
    return made


class ROUGE(Metric):
    """Mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L over texts; of several references the best counts.

    Words are runs of a-z and 0-9 in lower case, without stemming, as in the package ``rouge-score``: for a text in
    another script use :class:`ChrF`. The numbers are torchmetrics' own; its metric keeps a list for each text, and
    waits forever where processes have different numbers of them.

    Example:
        >>> metric = ROUGE()
        >>> metric.update(["my name is John"], [["is your name John"]])
        >>> {name: round(value.item(), 2) for name, value in metric.compute().items()}
        {'rouge1': 0.75, 'rouge2': 0.0, 'rougeL': 0.5}

    Reference:
        Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries".
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    keys = ("rouge1", "rouge2", "rougeL")
    sums: Tensor
    texts: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(len(self.keys), dtype=torch.float32), dist_reduce_fx="sum")
        self.add_state("texts", torch.tensor(0), dist_reduce_fx="sum")

    @override
    def update(self, texts: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        """Add texts.

        Args:
            texts: The generated texts.
            references: One reference or more for each of them.
        """
        if texts:
            means = rouge_score(texts, [list(part) for part in references], rouge_keys=self.keys)
            self.sums += torch.stack([means[f"{key}_fmeasure"] for key in self.keys]).to(self.device) * len(texts)
            self.texts += len(texts)

    @override
    def compute(self) -> dict[str, Tensor]:
        """``rouge1``, ``rouge2`` and ``rougeL``."""
        return dict(zip(self.keys, self.sums / self.texts, strict=True))


class ChrF(Metric):
    """Character n-gram F-score of a corpus, from 0 to 1; of several references the best counts.

    chrF = (1 + β²)·P·R / (β²·P + R), with P and R the means over n = 1 … 6 of the share of the texts' n-grams that
    are in the references, and the other way round; β = 2. White space is left out. The n-grams of all texts are
    counted together, as SacreBLEU does.

    Args:
        order: Longest n-gram, in characters.
        beta: Weight of recall.

    Example:
        >>> metric = ChrF()
        >>> metric.update(["the cat"], [["the bat"]])
        >>> round(metric.compute().item(), 3)
        0.281

    Reference:
        Popović 2015, "chrF: character n-gram F-score for automatic MT evaluation".
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    counts: Tensor

    def __init__(self, *, order: int = 6, beta: float = 2.0) -> None:
        super().__init__()
        if order < 1 or not beta > 0:
            raise ValueError(f"order={order} must be 1 or more, and beta={beta} above 0")
        self.order = order
        self.beta = beta
        # n-grams of the texts, of their references, and in both: 64-bit, since corpora have more than 2^24.
        self.add_state("counts", torch.zeros(3, order, dtype=torch.int64), dist_reduce_fx="sum")

    @override
    def update(self, texts: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        """Add texts.

        Args:
            texts: The generated texts.
            references: One reference or more for each of them.
        """
        for text, known in zip(texts, references, strict=True):
            grams = self._grams(text)
            each = [torch.tensor(_overlaps(grams, self._grams(other))) for other in known]
            self.counts += max(each, key=self._value).to(self.device)

    @override
    def compute(self) -> Tensor:
        """The score, a scalar."""
        return torch.tensor(self._value(self.counts), dtype=torch.float32, device=self.device)

    def _value(self, counts: Tensor) -> float:
        made, wanted, both = counts.cpu().double()
        there = (made > 0) & (wanted > 0)
        if not both.any():
            return 0.0
        precision, recall = (both / made)[there].mean(), (both / wanted)[there].mean()
        return float((1 + self.beta**2) * precision * recall / (self.beta**2 * precision + recall))

    def _grams(self, text: str) -> list[Counter[str]]:
        letters = "".join(text.split())
        sizes = range(1, self.order + 1)
        return [Counter(letters[i : i + n] for i in range(len(letters) - n + 1)) for n in sizes]


def _overlaps(made: list[Counter[str]], wanted: list[Counter[str]]) -> list[list[int]]:
    """n-grams of a text, of its reference, and in both, for each n."""
    both = [a & b for a, b in zip(made, wanted, strict=True)]
    # A reference shorter than n letters says nothing against a text's n-grams: they are not counted.
    fair = [a if b else Counter[str]() for a, b in zip(made, wanted, strict=True)]
    return [[grams.total() for grams in row] for row in (fair, wanted, both)]
