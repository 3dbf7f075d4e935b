"""Data for fine-tuning: reading, tokenising, batching by length, resuming in the middle of an epoch."""

from lightning_ft.data.base import TextData
from lightning_ft.data.classification import ClassificationData
from lightning_ft.data.cloze import ClozeData
from lightning_ft.data.curriculum import Curriculum, CurriculumSampler, competence
from lightning_ft.data.encoding import EncodedRows, Padding, encode_once, tokenize, whole_batch
from lightning_ft.data.instructions import InstructionData
from lightning_ft.data.labels import encode_labels, infer_labels, read_labels
from lightning_ft.data.language_modeling import LanguageModelingData
from lightning_ft.data.loader import ResumableDataLoader
from lightning_ft.data.multi_task import MultiTaskData
from lightning_ft.data.multiple_choice import MultipleChoiceData
from lightning_ft.data.question_answering import QuestionAnsweringData
from lightning_ft.data.sampler import LengthBucketSampler, padding_waste
from lightning_ft.data.seq2seq import Seq2SeqData
from lightning_ft.data.sources import Source, read_source
from lightning_ft.data.token_classification import TokenClassificationData
from lightning_ft.data.windows import WindowRows

__all__ = [
    # data modules
    "TextData",
    "ClassificationData",
    "ClozeData",
    "InstructionData",
    "LanguageModelingData",
    "MultiTaskData",
    "MultipleChoiceData",
    "QuestionAnsweringData",
    "Seq2SeqData",
    "TokenClassificationData",
    # batching
    "Curriculum",
    "CurriculumSampler",
    "LengthBucketSampler",
    "ResumableDataLoader",
    "competence",
    "padding_waste",
    # rows
    "EncodedRows",
    "WindowRows",
    "Padding",
    "encode_once",
    "tokenize",
    "whole_batch",
    # reading
    "Source",
    "read_source",
    "read_labels",
    "infer_labels",
    "encode_labels",
]
