"""One LightningModule for each head."""

from lightning_ft.modules.base import TransformerModule, load_checkpoint
from lightning_ft.modules.causal_lm import CausalLM
from lightning_ft.modules.checkpoint import Architecture
from lightning_ft.modules.cloze import Cloze, choose_pattern
from lightning_ft.modules.masked_lm import MaskedLM
from lightning_ft.modules.multi_task import MultiTask
from lightning_ft.modules.multiple_choice import MultipleChoice
from lightning_ft.modules.question_answering import QuestionAnswering
from lightning_ft.modules.seq2seq import Seq2Seq
from lightning_ft.modules.sequence_classification import SequenceClassification
from lightning_ft.modules.token_classification import TokenClassification

__all__ = [
    # heads
    "CausalLM",
    "Cloze",
    "MaskedLM",
    "MultiTask",
    "MultipleChoice",
    "QuestionAnswering",
    "Seq2Seq",
    "SequenceClassification",
    "TokenClassification",
    # what they are built from and with
    "Architecture",
    "TransformerModule",
    "choose_pattern",
    "load_checkpoint",
]
