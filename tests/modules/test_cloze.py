"""The cloze head: the contract, scores and losses against the model's own logits, calibration, zero-shot, patterns."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import tokenizers as tk
import torch
import torch.nn.functional as F
import transformers as hf
from datasets import Dataset
from lightning.pytorch import Trainer
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor

from lightning_ft.data.cloze import ClozeData
from lightning_ft.functional.calibration import calibrate
from lightning_ft.modules import Architecture
from lightning_ft.modules.cloze import Cloze, choose_pattern
from tests.pretrained import CORPUS, Kind, check_head, config, pretrained, tokenizer

TEXTS = " ".join(CORPUS).split()
AUTO = {"bert": hf.AutoModelForMaskedLM, "roberta": hf.AutoModelForMaskedLM}
MASKED = ["{text} it was {mask} .", "so {mask} : {text}"]
DECODER = ["{text} it was {mask}", "is {text} : {mask}"]


def rows(count: int) -> Dataset:
    texts = [" ".join(TEXTS[i % 40 : i % 40 + 3 + i % 9]) for i in range(count)]
    return Dataset.from_dict({"text": texts, "label": ["pos" if i % 3 else "neg" for i in range(count)]})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, str] = {}

    def make(kind: Kind) -> str:
        if kind not in made:
            auto = AUTO.get(kind, hf.AutoModelForCausalLM)
            made[kind] = pretrained(tmp_path_factory.mktemp(kind), kind, auto)
        return made[kind]

    return make


def words(folder: str) -> dict[str, list[str]]:
    """Two words for one label and one for the other, each one token of the folder's tokenizer."""
    known = hf.AutoTokenizer.from_pretrained(folder)
    single = [word for word in sorted(set(TEXTS)) if word.isalpha() and len(known.tokenize(f" {word}")) == 1]
    return {"neg": single[:2], "pos": single[2:3]}


def task(folder: str, kind: Kind) -> dict[str, Any]:
    return {"patterns": MASKED if kind in AUTO else DECODER, "verbalizer": words(folder)}


def trainer(**options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", enable_checkpointing=False, **quiet, **options)


def randomise(module: Cloze, seed: int = 0) -> Cloze:
    """Weights at which labels, patterns and inputs make a difference."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return module


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2", "llama"])
def test_contract(kind: Kind, folder: Any, tmp_path: Path) -> None:
    path, more, extra = folder(kind), {}, {}
    if kind != "llama":  # what is drawn anew in each epoch must be drawn again on resuming
        more |= {"demonstrations": 1, "demonstration_draws": 2, "calibrate": True}
        extra |= {"calibrate": True}
    if kind == "bert":
        more |= {"unlabelled": rows(9)}
        extra |= {"auxiliary_mlm": 0.1}
    check_head(
        lambda: Cloze(path, **task(path, kind), learning_rate=1e-3, **extra),
        lambda: ClozeData(path, rows(16), rows(7), predict=rows(5), **task(path, kind), batch_size=8, **more),
        AUTO.get(kind, hf.AutoModelForCausalLM),
        tmp_path,
    )


def label_scores_by_hand(module: Cloze, batch: dict[str, Any]) -> Tensor:
    """Mean logits of words, from transformers' own full logits and the tokenizer's own ids."""
    known, scores = module.tokenizer, []
    assert known is not None
    with torch.no_grad():
        logits = module.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    for i, ids in enumerate(batch["input_ids"]):
        if module.decoder:
            at = int(torch.nonzero(batch["attention_mask"][i])[-1])
        else:
            [at] = torch.nonzero(ids == known.mask_token_id).flatten().tolist()
        means = []
        for given in words(known.name_or_path).values():
            spelt = [known(f"x {word}", add_special_tokens=False)["input_ids"][-1] for word in given]
            means.append(torch.stack([logits[i, at, id] for id in spelt]).mean())
        scores.append(torch.stack(means))
    return torch.stack(scores)


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2"])
def test_scores_and_loss_of_training(kind: Kind, folder: Any) -> None:
    path = folder(kind)
    module = randomise(Cloze(path, **task(path, kind))).eval()
    data = ClozeData(path, rows(9), **task(path, kind), batch_size=5)
    data.setup("fit")
    for batch in data.train_dataloader():
        scores = module(batch)
        expected = label_scores_by_hand(module, batch)
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
        loss, count = module.loss(scores, batch)
        torch.testing.assert_close(loss, F.cross_entropy(expected, batch["labels"]), rtol=1e-4, atol=1e-5)
        assert count == len(batch["labels"])


def test_a_word_has_other_tokens_in_another_pattern(folder: Any) -> None:
    path = folder("roberta")
    known = hf.AutoTokenizer.from_pretrained(path)
    letters = [letter for letter in "abcdefghijklmnopqrstuvwxyz" if f"Ġ{letter}" in known.get_vocab()][:2]
    settings = {
        "patterns": ["{text} : {mask} .", "{mask} : {text}"],
        "verbalizer": {"neg": letters[0], "pos": letters[1]},
    }
    module = randomise(Cloze(path, **settings)).eval()
    data = ClozeData(path, rows(5), **settings)
    data.setup("fit")
    for batch in data.train_dataloader():
        with torch.no_grad():
            logits = module.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        gap = logits[batch["input_ids"] == known.mask_token_id]
        spelt = [known.convert_tokens_to_ids([space + letter for letter in letters]) for space in ("Ġ", "")]
        expected = torch.stack([row[spelt[p]] for row, p in zip(gap, batch["pattern"].tolist(), strict=True)])
        torch.testing.assert_close(module(batch), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("calibrated", [False, True])
def test_evaluation_averages_over_patterns_and_draws(calibrated: bool, folder: Any) -> None:
    path = folder("bert")
    settings = {**task(path, "bert"), "calibrate": calibrated}
    module = randomise(Cloze(path, **settings)).eval()
    shown = {"demonstrations": 1, "demonstration_draws": 3}
    data = ClozeData(path, rows(12), rows(7), predict=rows(7), **settings, **shown, eval_batch_size=4)
    data.setup()
    probabilities, by_pattern, target = {}, {}, {}
    for batch in data.val_dataloader():
        p = label_scores_by_hand(module, batch).softmax(-1).view(-1, 3, 2, 2)
        if calibrated:
            p = calibrate(
                p, label_scores_by_hand_free(module, batch["content_free"]).softmax(-1).view(3, 3, 2, 2).mean(0)
            )
        for i, row in enumerate(batch["row"].tolist()):
            logs = p[i].log()
            probabilities[row] = logs.mean((0, 1)).softmax(-1)
            by_pattern[row] = logs.mean(0).softmax(-1)
            target[row] = int(batch["labels"][6 * i])
    order = sorted(target)
    expected = torch.stack([probabilities[row] for row in order])
    outputs = trainer().predict(copy.deepcopy(module), datamodule=data)
    values = {name: [value for out in outputs or [] for value in out[name]] for name in outputs[0]}  # type: ignore[index]
    torch.testing.assert_close(torch.tensor(values["probabilities"]), expected, rtol=1e-4, atol=1e-5)
    patterns = torch.stack([by_pattern[row] for row in order])
    torch.testing.assert_close(torch.tensor(values["pattern_probabilities"]), patterns, rtol=1e-4, atol=1e-5)
    assert values["row"] == order
    assert values["label"] == [("neg", "pos")[i] for i in expected.argmax(-1).tolist()]
    assert values["score"] == [max(row) for row in values["probabilities"]]

    [logged] = trainer().validate(module, datamodule=data, verbose=False)
    truth, guess = [target[row] for row in order], expected.argmax(-1).tolist()
    assert logged["val_accuracy"] == pytest.approx(accuracy_score(truth, guess))
    assert logged["val_f1"] == pytest.approx(f1_score(truth, guess, average="macro"))
    assert logged["val_mcc"] == pytest.approx(matthews_corrcoef(truth, guess), abs=1e-6)
    assert logged["val_loss"] == pytest.approx(F.nll_loss(expected.log(), torch.tensor(truth)).item(), rel=1e-4)
    for i in (0, 1):
        assert logged[f"val_accuracy_pattern{i}"] == pytest.approx(
            accuracy_score(truth, patterns[:, i].argmax(-1).tolist())
        )
        assert logged[f"val_loss_pattern{i}"] == pytest.approx(
            F.nll_loss(patterns[:, i].log(), torch.tensor(truth)).item(), rel=1e-4
        )


def label_scores_by_hand_free(module: Cloze, batch: dict[str, Any]) -> Tensor:
    """As above for inputs without content, where the text is the mask token, too: the gap is the marked one."""
    assert module.tokenizer is not None
    only = torch.where((batch["input_ids"] == module.tokenizer.mask_token_id) & (batch["mask_positions"] == 0))
    with torch.no_grad():
        logits = module.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert len(only[0]) == 6, "the last of the three inputs, for two patterns and three sets"
    ids = [
        [module.tokenizer.convert_tokens_to_ids(word) for word in g]
        for g in words(module.tokenizer.name_or_path).values()
    ]
    gap = logits[batch["mask_positions"].bool()]
    return torch.stack([gap[:, given].mean(-1) for given in ids], -1)


def test_calibration_is_found_anew_for_each_evaluation(folder: Any) -> None:
    path = folder("bert")
    settings = {**task(path, "bert"), "calibrate": True}
    module, runner = randomise(Cloze(path, **settings)), trainer()
    data = ClozeData(path, val=rows(9), test=rows(9), **settings, eval_batch_size=3)
    forwards: list[int] = []
    first = runner.validate(module, datamodule=data, verbose=False)
    randomise(module, seed=1)
    second = runner.validate(module, datamodule=data, verbose=False)
    new = Cloze(path, **settings)
    new.load_state_dict(module.state_dict())
    assert first != second == trainer().validate(new, datamodule=data, verbose=False)
    module.model.register_forward_hook(lambda *_: forwards.append(1))
    runner.test(module, datamodule=data, verbose=False)
    assert len(forwards) == 3 + 1, "three batches, and the inputs without content once"


def test_calibration_needs_its_inputs(folder: Any) -> None:
    path = folder("bert")
    module = Cloze(path, **task(path, "bert"), calibrate=True)
    with pytest.raises(ValueError, match=r"give ClozeData\(calibrate=True\)"):
        trainer().validate(module, datamodule=ClozeData(path, val=rows(4), **task(path, "bert")), verbose=False)


def test_auxiliary_loss_is_the_model_s_own(folder: Any) -> None:
    path = folder("bert")
    settings = task(path, "bert")
    module = randomise(Cloze(path, **settings, auxiliary_mlm=0.25)).eval()
    plain = randomise(Cloze(path, **settings)).eval()
    data = ClozeData(path, rows(9), **settings, unlabelled=rows(20).remove_columns("label"), batch_size=9)
    data.setup("fit")
    for batch in data.train_dataloader():
        texts = batch["unlabelled"]
        mlm = module.model(**texts).loss
        expected = 0.75 * plain.loss(plain(batch), batch)[0] + 0.25 * mlm
        torch.testing.assert_close(module.loss(module(batch), batch)[0], expected)
    texts["labels"] = torch.full_like(texts["labels"], -100)
    assert torch.isfinite(module.loss(module(batch), batch)[0])
    del batch["unlabelled"]
    with pytest.raises(ValueError, match=r"auxiliary_mlm=0.25 needs masked texts.*ClozeData\(unlabelled=\.\.\.\)"):
        module.loss(module(batch), batch)


def test_words_of_several_tokens(folder: Any) -> None:
    path = folder("bert")
    settings = {"patterns": "{text} was {mask} {mask} .", "verbalizer": {"neg": ["un bad", "bad"], "pos": "was great"}}
    known = hf.AutoTokenizer.from_pretrained(path)
    module = randomise(Cloze(path, **settings)).eval()
    data = ClozeData(path, rows(4), **settings)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    with torch.no_grad():
        logits = module.model(**{name: batch[name] for name in known.model_input_names}).logits.log_softmax(-1)
        scores = module(batch)
    for i, ids in enumerate(batch["input_ids"]):
        first, second = torch.nonzero(ids == known.mask_token_id).flatten().tolist()
        assert second == first + 1
        un, bad, was, great = known.convert_tokens_to_ids(["un", "bad", "was", "great"])
        long = [(logits[i, first, a] + logits[i, second, b]).item() for a, b in ((un, bad), (was, great))]
        expected = [(long[0] + logits[i, first, bad].item()) / 2, long[1]]
        assert scores[i].tolist() == pytest.approx(expected, rel=1e-4)


def test_learns_from_32_rows(folder: Any) -> None:
    path = folder("bert")
    table = Dataset.from_dict(
        {"text": [f"the film is {w} but" for w in ("great", "terrible") * 16], "label": ["pos", "neg"] * 16}
    )
    settings = {"patterns": "{text} it was {mask} .", "verbalizer": {"neg": "bad", "pos": "good"}}
    module, runner = Cloze(path, **settings, learning_rate=3e-3), trainer(max_epochs=25, check_val_every_n_epoch=25)
    data = ClozeData(path, table, table, **settings, batch_size=4)
    before = runner.validate(module, datamodule=data, verbose=False)[0]
    runner.fit(module, datamodule=data)
    after = runner.validate(module, datamodule=data, verbose=False)[0]
    assert after["val_accuracy"] == 1.0
    assert after["val_loss"] < 0.3 < before["val_loss"]
    assert not any("pattern" in name for name in after)


def test_choose_pattern(folder: Any) -> None:
    path = folder("bert")
    settings = task(path, "bert")
    module = randomise(Cloze(path, **settings), seed=2)
    data = ClozeData(path, val=rows(30), **settings)
    report = choose_pattern(module, data, trainer())
    alone = {}
    for pattern in MASKED:
        one = {**settings, "patterns": pattern}
        single = Cloze(path, **one)
        single.load_state_dict(module.state_dict(), strict=False)
        alone[pattern] = trainer().validate(single, datamodule=ClozeData(path, val=rows(30), **one), verbose=False)[0]
    for row in report.rows:
        assert row["accuracy"] == pytest.approx(alone[row["pattern"]]["val_accuracy"])
        assert row["loss"] == pytest.approx(alone[row["pattern"]]["val_loss"], rel=1e-4)
    ranked = sorted(alone, key=lambda name: (-alone[name]["val_accuracy"], alone[name]["val_loss"]))
    assert report.facts["best"] == ranked[0]
    assert report.to_json()
    with pytest.raises(ValueError, match="two or more to choose from"):
        choose_pattern(single, data, trainer())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"auxiliary_mlm": 1.0}, r"auxiliary_mlm=1.0 must lie in \[0, 1\)"),
        ({"verbalizer": {"pos": "good"}}, "two labels or more"),
        ({"verbalizer": {"pos": "good", "neg": "badland"}}, r"'badland' is \d tokens"),
        ({"patterns": []}, "one text or several"),
        ({"decoder": True}, r"end the pattern with one \{mask\}"),
        ({"decoder": True, "patterns": "{text} {mask}", "auxiliary_mlm": 0.1}, "a decoder reads no masks"),
    ],
)
def test_faulty_arguments(options: dict[str, Any], message: str) -> None:
    given = {"patterns": MASKED, "verbalizer": {"neg": "bad", "pos": "good"}, **options}
    with pytest.raises(ValueError, match=message):
        Cloze(Architecture(config("bert"), tokenizer("bert")), **given)


def test_an_architecture_needs_its_tokenizer() -> None:
    with pytest.raises(ValueError, match="Architecture without a tokenizer"):
        Cloze(Architecture(config("bert")), {"neg": "bad", "pos": "good"}, MASKED)


def test_another_verbalizer_is_refused_on_resuming(folder: Any, tmp_path: Path) -> None:
    path = folder("bert")
    settings, runner = task(path, "bert"), trainer(max_steps=1)
    runner.fit(Cloze(path, **settings), datamodule=ClozeData(path, rows(8), rows(2), **settings))
    runner.save_checkpoint(tmp_path / "a.ckpt")
    loaded = Cloze.load_from_checkpoint(tmp_path / "a.ckpt")
    assert (loaded.patterns, loaded.labels, loaded.decoder) == (MASKED, ["neg", "pos"], False)
    other = {**settings, "verbalizer": dict(reversed(settings["verbalizer"].items()))}
    with pytest.raises(ValueError, match="the checkpoint was trained with labels"):
        trainer(max_steps=2).fit(
            Cloze(path, **other), datamodule=ClozeData(path, rows(8), rows(2), **other), ckpt_path=tmp_path / "a.ckpt"
        )


def test_a_real_masked_model_knows_its_language(tmp_path: Path) -> None:
    """ALBERT of chemical reactions, from the package rxnmapper: which atom is missing, with no training at all."""
    spec = importlib.util.find_spec("rxnmapper")
    if spec is None or spec.origin is None:
        pytest.skip("the weights are not here: pip install --no-deps rxnmapper")
    source = Path(spec.origin).parent / "models" / "transformers" / "albert_heads_8_uspto_all_1310k"
    for name in ("config.json", "pytorch_model.bin"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    smiles(source / "vocab.txt").save_pretrained(tmp_path)
    holes = [  # acids, amides, nitriles, chlorides of acids: one atom is left out
        *(("CCC(=", ")O", "O"), ("c1ccccc1C(=", ")O", "O"), ("CC(C)C(=", ")O", "O"), ("COC(=", ")c1ccccc1", "O")),
        *(("CC(=O)", "C", "O"), ("CCOC(=", ")CC", "O"), ("c1ccc(C#", ")cc1", "N"), ("CCC#", "", "N")),
        *(("O=C(", ")c1ccccc1>>O=C(NC)c1ccccc1", "Cl"), ("O=S(=O)(", ")c1ccccc1>>O=S(=O)(NC)c1ccccc1", "Cl")),
        *(("c1cccc", "1O", "c"), ("CC(=O)c1c", "ccc1", "c")),
    ]
    left, right, label = zip(*holes, strict=True)
    table = Dataset.from_dict({"left": left, "right": right, "label": label})
    settings = {"patterns": "{left}{mask}{right}", "verbalizer": {atom: atom for atom in ("O", "N", "Cl", "c")}}
    module = Cloze(str(tmp_path), **settings, allow_pickle=True)
    [values] = trainer().test(module, datamodule=ClozeData(str(tmp_path), test=table, **settings), verbose=False)
    assert values["test_accuracy"] > 0.8


def smiles(vocabulary: Path) -> hf.PreTrainedTokenizerFast:
    """The model's own splitting into atoms and bonds, as a fast tokenizer."""
    tokens = vocabulary.read_text().split("\n")
    raw = tk.Tokenizer(tk.models.WordLevel({token: i for i, token in enumerate(tokens) if token}, unk_token="[UNK]"))
    atom = r"\[[^\]]+]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\|\/|:|~|@|\?|>>?|\*|\$|%[0-9]{2}|[0-9]"
    raw.pre_tokenizer = tk.pre_tokenizers.Split(tk.Regex(atom), "isolated")
    cls, sep = tokens.index("[CLS]"), tokens.index("[SEP]")
    raw.post_processor = tk.processors.BertProcessing(("[SEP]", sep), ("[CLS]", cls))
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return hf.PreTrainedTokenizerFast(tokenizer_object=raw, **names)
