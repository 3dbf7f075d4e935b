"""Folders of tiny random models with real tokenizers, made offline; and the contract that every head keeps."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import tokenizers as tk
import torch
import transformers as hf
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from lightning_ft.callbacks import ExactResume
from lightning_ft.data import TextData
from lightning_ft.modules import TransformerModule, load_checkpoint
from tests.tiny import BART, GPT2, LLAMA, SEQ2SEQ, T5

Kind = Literal["bert", "roberta", "gpt2", "llama", "t5", "bart"]
CORPUS = [
    "the film is a dull but well made story about people who sing in London .",
    "Anna Smith lives in New York and works for Acme since 1999 , doesn't she ?",
    "question : what is it ? answer : it was great , terrible , good , bad , yes , no , maybe or unlikely .",
    "summarise : a long text about many things can be said in few words .",
    "The quick brown fox jumps over the lazy dog ; café naïve Straße 東京 12.5 % .",
]


def tokenizer(kind: Kind) -> hf.PreTrainedTokenizerFast:
    """A tokenizer of the family's own make: WordPiece, byte-level BPE or Unigram, trained on `CORPUS`.

    From files, since two trainings give different vocabularies.
    """
    return copy.deepcopy(_stored(kind))


@functools.cache
def _stored(kind: Kind) -> hf.PreTrainedTokenizerFast:
    file = {"llama": "gpt2", "bart": "roberta"}.get(kind, kind)
    raw = tk.Tokenizer.from_file(str(Path(__file__).parent / "tokenizers" / f"{file}.json"))
    inputs = ["input_ids", "attention_mask"]
    names: dict[str, Any]
    if kind == "bert":
        inputs.insert(1, "token_type_ids")
        special = ("pad_token", "[PAD]"), ("unk_token", "[UNK]"), ("cls_token", "[CLS]"), ("sep_token", "[SEP]")
        names = {**dict(special), "mask_token": "[MASK]"}
    elif kind == "t5":
        sentinels = [f"<extra_id_{i}>" for i in range(20)]
        names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "extra_special_tokens": sentinels}
    elif kind in ("gpt2", "llama"):  # one special token that is begin and end, and no pad token
        names = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    else:
        names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
        names |= {"cls_token": "<s>", "sep_token": "</s>"}
    result = hf.PreTrainedTokenizerFast(tokenizer_object=raw, model_input_names=inputs, **names)
    if kind in ("roberta", "bart"):
        result.mask_token = tk.AddedToken("<mask>", lstrip=True, special=True)
    return result


def config(kind: Kind, **options: Any) -> hf.PreTrainedConfig:
    """A tiny configuration, width 16 (head size 8), three blocks, dropout 0.1, for the tokenizer of the same kind."""
    words = tokenizer(kind)
    known = {
        "vocab_size": len(words),
        "pad_token_id": words.pad_token_id,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
    }
    wide = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "max_position_embeddings": 130,
    }
    settings: dict[str, Any] = {
        "bert": {**wide, **known},
        "roberta": {**wide, **known, "type_vocab_size": 1},
        "gpt2": {**GPT2, **known, "n_positions": 128},
        "llama": {**LLAMA, **known, "attention_dropout": 0.1, "max_position_embeddings": 128},
        "t5": {**SEQ2SEQ, **T5, **known, "decoder_start_token_id": 0},
        "bart": {**SEQ2SEQ, **BART, **known, "max_position_embeddings": 128, "decoder_start_token_id": 2},
    }[kind]
    return hf.AutoConfig.for_model(kind, **{**settings, **options})


def pretrained(folder: Path, kind: Kind, auto_class: Any, **options: Any) -> str:
    """A folder with a tiny random model of a family, under a head, and its tokenizer: what `from_pretrained` opens."""
    torch.manual_seed(0)
    auto_class.from_config(config(kind, **options)).save_pretrained(folder)
    tokenizer(kind).save_pretrained(folder)
    return str(folder)


class _Stop(Callback):
    def __init__(self, epoch: int, batch: int) -> None:
        self.at = (epoch, batch)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if (trainer.current_epoch, args[-1]) == self.at:
            raise KeyboardInterrupt


def _trainer(folder: Path, *callbacks: Callback) -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_epochs=2,
        accumulate_grad_batches=2,
        val_check_interval=0.5,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[ExactResume("1 steps", dirpath=folder), *callbacks],
    )


def _fit(trainer: Trainer, module: TransformerModule, data: Any, ckpt_path: Path | None = None) -> bool:
    """Whether the run went to its end."""
    try:
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    except (KeyboardInterrupt, SystemExit):  # Lightning makes an exit of an interrupt
        return False
    return True


def check_head(
    make_module: Callable[[], TransformerModule],
    make_data: Callable[[], TextData],
    auto_class: Any,
    folder: Path,
    *,
    inputs: tuple[str, ...] = ("input_ids", "attention_mask", "token_type_ids", "position_ids"),
) -> None:
    """The contract of every head: fits, resumes exactly, predicts, loads from its checkpoint, and opens elsewhere.

    Args:
        make_module: A new module, with dropout.
        make_data: New data with train, val and predict rows, whose epoch has an even number of batches, four or more.
        auto_class: The Auto class that opens the saved folder.
        folder: An empty folder.
        inputs: What of a validation batch the model takes, to compare logits on.
    """
    whole, data = make_module(), make_data()
    start = {name: value.clone() for name, value in whole.state_dict().items()}
    assert _fit(_trainer(folder / "whole"), whole, data)
    batches = len(data.train_dataloader())
    assert batches >= 4
    assert batches % 2 == 0
    # Rows of an embedding that no text asks for stand still, and so may a pooler that the head does not read.
    still = [name for name, p in whole.named_parameters() if torch.equal(p, start[name]) and "pooler" not in name]
    assert not still, f"not trained: {still}"

    # Killed on the first epoch's last batch, on which a validation falls, and in the middle of an epoch.
    for place in ((0, batches - 1), (1, 1)):
        files = folder / f"killed{place[0]}"
        assert not _fit(_trainer(files, _Stop(*place)), make_module(), make_data())
        resumed = make_module()
        assert _fit(_trainer(files), resumed, make_data(), files / "last.ckpt")
        _assert_same(whole.state_dict(), resumed.state_dict())

    loaded = load_checkpoint(folder / "whole" / "last.ckpt").eval()
    whole.eval()
    _assert_same(whole.state_dict(), loaded.state_dict())
    predictor = _trainer(folder / "unused")
    rows = [_columns(out) for out in predictor.predict(copy.deepcopy(whole), datamodule=make_data()) or []]
    again = [_columns(out) for out in predictor.predict(loaded, datamodule=make_data()) or []]
    assert rows == again
    assert [row for part in rows for row in part["row"]] == list(range(sum(len(part["row"]) for part in rows)))

    whole.save_pretrained(folder / "saved")
    reopened = auto_class.from_pretrained(folder / "saved").eval()
    data = make_data()
    data.setup("validate")
    batch = next(iter(data.val_dataloader()))
    given = {name: batch[name] for name in inputs if name in batch}
    with torch.no_grad():
        ours, theirs = whole.model(**given), reopened(**given)
    compared = [name for name, value in theirs.items() if isinstance(value, Tensor) and "logits" in name]
    assert compared
    for name in compared:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0)
    assert hf.AutoTokenizer.from_pretrained(folder / "saved")("the film")["input_ids"]


def _columns(out: Any) -> dict[str, Any]:
    assert len({len(values) for values in out.values()}) == 1, "columns of different lengths"
    return dict(out)


def _assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, f"not bit-equal: {different}"
