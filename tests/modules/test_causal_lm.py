"""CausalLM: the contract, the loss of transformers, the end that is learned, generation, packing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from datasets import Dataset
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_ft.data.instructions import InstructionData
from lightning_ft.modules import Architecture
from lightning_ft.modules import causal_lm as module_under_test
from lightning_ft.modules.causal_lm import CausalLM
from tests.pretrained import CORPUS, check_head, config, pretrained, tokenizer
from tests.tiny import GPT2, WIDE

TEMPLATE = "{instruction}\n"
WORDS = " ".join(CORPUS).split()


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    return pretrained(tmp_path_factory.mktemp("gpt2"), "gpt2", hf.AutoModelForCausalLM)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return pretrained(tmp_path_factory.mktemp("llama"), "llama", hf.AutoModelForCausalLM)


def rows(count: int) -> Dataset:
    spans = [(i % 30, 2 + i % 5, 1 + i % 7) for i in range(count)]
    return Dataset.from_dict(
        {
            "instruction": [" ".join(WORDS[at : at + ask]) for at, ask, _ in spans],
            "output": [" ".join(WORDS[at + ask : at + ask + say]) for at, ask, say in spans],
        }
    )


def data(folder: str, *args: Any, **options: Any) -> InstructionData:
    return InstructionData(folder, *args, **{"input": None, "template": TEMPLATE, "max_length": 64} | options)


def batch_of(folder: str, count: int, **options: Any) -> dict[str, Tensor]:
    made = data(folder, rows(count), batch_size=count, **options)
    made.setup("fit")
    return next(iter(made.train_dataloader()))


def trainer(**options: Any) -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(accelerator="cpu", **{**quiet, **options})


@pytest.fixture(scope="module", autouse=True)
def _exported() -> Any:
    """`load_checkpoint` finds heads by their names in `lightning_ft.modules`."""
    from lightning_ft import modules

    absent = not hasattr(modules, "CausalLM")
    if absent:
        modules.CausalLM = CausalLM  # type: ignore[attr-defined]
    yield
    if absent:
        del modules.CausalLM  # type: ignore[attr-defined]


@pytest.mark.parametrize("packing", [False, True])
def test_contract(gpt2: str, llama: str, tmp_path: Path, packing: bool) -> None:
    folder = llama if packing else gpt2
    count = 72 if packing else 48

    def make() -> InstructionData:
        return data(folder, rows(count), rows(5), predict=rows(5), batch_size=2 if packing else 8, packing=packing)

    check_head(
        lambda: CausalLM(folder, learning_rate=1e-3, max_new_tokens=4),
        make,
        hf.AutoModelForCausalLM,
        tmp_path,
    )


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_loss_is_that_of_transformers(kind: str, gpt2: str, llama: str) -> None:
    folder = {"gpt2": gpt2, "llama": llama}[kind]
    module, batch = CausalLM(folder).eval(), batch_of(folder, 7)
    loss, tokens = module.loss(module(batch), batch)
    given = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    torch.testing.assert_close(loss, module.model(**given).loss, rtol=0, atol=1e-6)
    assert tokens == (batch["labels"][:, 1:] != -100).sum()


def test_loss_of_low_precision_is_summed_in_fp32(gpt2: str) -> None:
    module, batch = CausalLM(gpt2), batch_of(gpt2, 3)
    logits = torch.randn(*batch["labels"].shape, 400).bfloat16()
    loss, _ = module.loss(logits, batch)
    chosen = batch["labels"][:, 1:] != -100
    expected = torch.nn.functional.cross_entropy(logits[:, :-1][chosen].double(), batch["labels"][:, 1:][chosen])
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=0, atol=1e-6)


def test_a_batch_without_a_label_costs_nothing(gpt2: str) -> None:
    module, batch = CausalLM(gpt2), batch_of(gpt2, 3)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    logits = module(batch)
    loss, tokens = module.loss(logits, batch)
    loss.backward()
    assert (loss.item(), tokens) == (0.0, 0)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in module.parameters() if p.grad is not None)
    module.update_metrics(module.val_metrics, logits, batch)


def test_the_end_is_learned_although_it_is_also_the_padding(gpt2: str) -> None:
    """The loss of a whole batch is that of each row's tokens by hand, its end among them."""
    words = hf.AutoTokenizer.from_pretrained(gpt2)
    module = CausalLM(gpt2).eval()
    assert module.model.config.pad_token_id == words.eos_token_id
    batch = batch_of(gpt2, 6)
    assert (batch["attention_mask"] == 0).any()
    given, total, count, ends = rows(6), 0.0, 0, 0
    for row in range(6):
        prompt = words(given[row]["instruction"] + "\n")["input_ids"]
        whole = words(given[row]["instruction"] + "\n" + given[row]["output"])["input_ids"]
        ids = [*whole, words.eos_token_id]
        assert ids[: len(prompt)] == prompt
        logits = module.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        for place in range(len(prompt), len(ids)):
            total -= logits[place - 1, ids[place]].item()
            count += 1
            ends += ids[place] == words.eos_token_id
    loss, tokens = module.loss(module(batch), batch)
    assert (tokens, ends) == (count, 6)
    assert loss.item() == pytest.approx(total / count, abs=1e-5)


def test_metrics_are_those_of_all_tokens(gpt2: str) -> None:
    module = CausalLM(gpt2)
    made = data(gpt2, val=rows(11), eval_batch_size=3)
    (logged,) = trainer().validate(module, datamodule=made, verbose=False)
    batch = batch_of(gpt2, 11)
    logits = module.eval()(batch)[:, :-1]
    labels = batch["labels"][:, 1:]
    loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels)
    right = (logits.argmax(-1) == labels)[labels != -100].float().mean()
    assert logged["val_perplexity"] == pytest.approx(loss.exp().item(), rel=1e-5)
    assert logged["val_accuracy"] == pytest.approx(right.item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_gives_the_same(kind: str, side: str, gpt2: str, llama: str, tmp_path: Path) -> None:
    folder = {"gpt2": gpt2, "llama": llama}[kind]
    module = CausalLM(folder, max_new_tokens=6).eval()
    assert module.tokenizer is not None
    module.tokenizer.padding_side = side
    texts = [torch.tensor(words) for words in ([11, 12, 13, 14, 15, 16], [21, 22], [31, 32, 33])]
    padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=0, padding_side=side)
    batch = {"input_ids": padded, "attention_mask": (padded > 0).long()}
    with torch.no_grad():
        logits = module(batch)
        for row, text in enumerate(texts):
            alone = module.model(input_ids=text[None]).logits[0]
            torch.testing.assert_close(logits[row][padded[row] > 0], alone, rtol=0, atol=1e-5)
        assert module.predictions(batch)["text"] == [
            module.predictions({"input_ids": text[None], "attention_mask": torch.ones(1, len(text)).long()})["text"][0]
            for text in texts
        ]


def scripted(module: CausalLM, after: dict[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the model say after each token the one that is written here."""
    size = module.model.config.vocab_size
    table = torch.zeros(size, size)
    for token, following in after.items():
        table[token, following] = 9.0
    forward = module.model.forward

    def scripted_forward(*args: Any, **kwargs: Any) -> Any:
        outputs = forward(*args, **kwargs)
        outputs.logits = table[kwargs["input_ids"]][:, -outputs.logits.shape[1] :]
        return outputs

    monkeypatch.setattr(module.model, "forward", scripted_forward)


def test_predictions_hold_the_answer_alone_and_stop_at_its_end(gpt2: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = CausalLM(gpt2, max_new_tokens=5).eval()
    words = module.tokenizer
    assert words is not None
    end, a, b, c = words.eos_token_id, *words.convert_tokens_to_ids(["a", "b", "c"])
    scripted(module, {a: b, b: end, end: c, c: c}, monkeypatch)
    batch = {"input_ids": torch.tensor([[c, a], [c, end]]), "attention_mask": torch.tensor([[1, 1], [1, 0]])}
    assert module.predictions(batch)["text"] == ["b", "ccccc"]
    # The model's own end and the tokenizer's differ, as in base models with a chat format.
    module.model.generation_config.eos_token_id = [b]
    assert module.predictions(batch)["text"] == ["b", "ccccc"]
    assert module.model.generation_config.eos_token_id == [b]
    words.eos_token = "c"
    assert module.predictions(batch)["text"] == ["b", "c"]


def test_drawing_and_beams(gpt2: str) -> None:
    batch = batch_of(gpt2, 3, val=None)

    def texts(**options: Any) -> list[str]:
        torch.manual_seed(3)
        return CausalLM(gpt2, max_new_tokens=8, **options).eval().predictions(batch)["text"]

    greedy = texts()
    assert texts(temperature=1e-4) == greedy
    assert texts(temperature=5.0, top_p=1e-6) == greedy
    assert texts(temperature=5.0) == texts(temperature=5.0) != greedy
    module = CausalLM(gpt2, max_new_tokens=8, num_beams=3).eval()
    assert module._generation().num_beams == 3
    ids, prompts = (batch_of(gpt2, 3, val=None)[name] for name in ("input_ids", "attention_mask"))
    left = {"input_ids": ids, "attention_mask": prompts}
    asked: list[Any] = []
    module.model.generate = lambda **given: asked.append(given["generation_config"]) or ids  # type: ignore[assignment]
    module.predictions(left)
    assert [settings.num_beams for settings in asked] == [3]


def test_generation_settings_of_the_folder_stay_as_they_were(gpt2: str, tmp_path: Path) -> None:
    model = hf.AutoModelForCausalLM.from_pretrained(gpt2)
    model.generation_config.update(do_sample=True, temperature=0.6, top_k=20, top_p=0.9, max_length=50)
    model.save_pretrained(tmp_path / "model")
    tokenizer("gpt2").save_pretrained(tmp_path / "model")
    module = CausalLM(tmp_path / "model", max_new_tokens=4, gradient_checkpointing=True)
    made = data(str(tmp_path / "model"), rows(8), rows(4), predict=rows(4), batch_size=4)
    trainer(max_epochs=1).fit(module, datamodule=made)
    trainer().predict(module, datamodule=made)
    module.save_pretrained(tmp_path / "saved")
    saved, before = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("saved", "model"))
    assert saved.get("use_cache") == before.get("use_cache")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.config.use_cache
    assert (again.generation_config.temperature, again.generation_config.top_k) == (0.6, 20)
    # Greedy, although the folder would have us draw.
    batch = batch_of(str(tmp_path / "model"), 3)
    assert module.eval().predictions(batch) == module.predictions(batch)
    # Nor do its settings narrow what we draw from.
    drawing = CausalLM(tmp_path / "model", temperature=1.5)._generation()
    assert (drawing.temperature, drawing.top_p, drawing.top_k) == (1.5, 1.0, 0)


def test_gradient_checkpointing_trains_the_same(llama: str) -> None:
    def gradients(**options: Any) -> list[Tensor]:
        module = CausalLM(Architecture(config("llama", attention_dropout=0.0), tokenizer("llama")), **options)
        batch = batch_of(llama, 5)
        module.loss(module(batch), batch)[0].backward()
        return [p.grad for p in module.parameters() if p.grad is not None]

    for with_it, without in zip(gradients(gradient_checkpointing=True), gradients(), strict=True):
        torch.testing.assert_close(with_it, without)


def test_a_packed_epoch_has_the_gradient_of_an_unpacked_one(gpt2: str) -> None:
    module = CausalLM(gpt2).eval()
    gradients, losses = [], []
    for packing in (False, True):
        batch = batch_of(gpt2, 12, packing=packing)
        assert ("position_ids" in batch) == packing
        module.zero_grad()
        loss, tokens = module.loss(module(batch), batch)
        loss.backward()
        losses.append((loss.item(), tokens))
        gradients.append([p.grad.clone() for p in module.parameters() if p.grad is not None])
    assert losses[0][1] == losses[1][1]
    assert losses[0][0] == pytest.approx(losses[1][0], abs=1e-5)
    for plain, packed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, packed, rtol=1e-3, atol=1e-6)


def test_a_model_that_reads_across_documents_is_refused(llama: str) -> None:
    falcon = hf.FalconConfig(**{**WIDE, "vocab_size": 400}, num_hidden_layers=2)
    module = CausalLM(Architecture(falcon, tokenizer("llama")))
    made = data(llama, rows(20), packing=True)
    with pytest.raises(ValueError, match=r"FalconForCausalLM with 'sdpa' attention reads across .*: set packing=False"):
        trainer(max_epochs=1, limit_val_batches=0).fit(module, datamodule=made)


def test_the_check_is_made_once(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    check = module_under_test.keeps_documents_apart
    monkeypatch.setattr(module_under_test, "keeps_documents_apart", lambda *args: calls.append(1) or check(*args))
    module, batch = CausalLM(llama), batch_of(llama, 12, packing=True)
    module(batch)
    module(batch)
    module(batch_of(llama, 3))
    assert calls == [1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 and num_beams=1 must be 1 or more"),
        ({"num_beams": 0}, "num_beams=0 must be 1 or more"),
        ({"temperature": -1.0}, r"temperature=-1.0 must be 0 or more, and top_p=1.0 lie in \(0, 1\]"),
        ({"temperature": 1.0, "top_p": 1.5}, r"top_p=1.5 lie in \(0, 1\]"),
        ({"top_p": 0.9}, "temperature=0 draws none: set temperature=1.0"),
    ],
)
def test_contradicting_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CausalLM("-", **options)


def test_predictions_that_cannot_be_are_refused(gpt2: str) -> None:
    batch = {"input_ids": torch.ones(1, 5, dtype=torch.long), "attention_mask": torch.tensor([[0, 1, 1, 1, 1]])}
    with pytest.raises(ValueError, match="prompt of 4 tokens and max_new_tokens=128 exceed the model's 128 positions"):
        CausalLM(gpt2).predictions(batch)
    bare = CausalLM(Architecture(hf.GPT2Config(**GPT2)))
    with pytest.raises(ValueError, match="text needs a tokenizer"):
        bare.predictions(batch)


def test_eight_instructions_are_learned_by_heart(real_data: Path, tmp_path: Path) -> None:
    """A real tokenizer and real weights: an answer is generated exactly, and ends where it should."""
    folder = Path(os.environ.get("LIGHTNING_FT_MODELS", real_data.parent / "models")) / "aidreams260k"
    if not folder.is_dir():
        pytest.skip(f"the tiny Llama is not at {folder}: set LIGHTNING_FT_MODELS")
    words = hf.AutoTokenizer.from_pretrained(folder)
    lines = [json.loads(line) for line in (real_data / "alpaca" / "train.jsonl").read_text().splitlines()]
    short = [
        line for line in lines if not line["input"] and len(words(line["instruction"] + line["output"]).input_ids) < 56
    ]
    chosen = Dataset.from_list([{name: line[name] for name in ("instruction", "output")} for line in short[:8]])
    assert len(chosen) == 8
    module = CausalLM(folder, learning_rate=3e-3, schedule="constant", weight_decay=0.0, max_new_tokens=64)
    made = data(str(folder), chosen, predict=chosen, packing=True, batch_size=8, max_length=64)
    trainer(max_epochs=120, limit_val_batches=0).fit(module, datamodule=made)
    (columns,) = trainer().predict(module, datamodule=made) or []
    assert [text.strip() for text in columns["text"]] == [line["output"].strip() for line in short[:8]]
