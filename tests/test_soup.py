"""Soups: of members with known scores, of checkpoints and folders, and from the command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from lightning_ft import cli
from lightning_ft.modules import Architecture, MaskedLM, SequenceClassification, load_checkpoint
from lightning_ft.modules.checkpoint import KEY
from lightning_ft.soup import soup
from tests.strangers import FILTERED
from tests.test_cli import project  # noqa: F401
from tests.tiny import BERT

LABELS = ["bad", "good"]


def member(path: Path, value: float, labels: list[str] | None = None, **config: Any) -> Path:
    """A checkpoint all of whose weights are ``value``."""
    module = SequenceClassification(Architecture(hf.BertConfig(**{**BERT, **config})), labels=labels or LABELS)
    return save(module, path, value)


def save(module: Any, path: Path, value: float) -> Path:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)
    checkpoint = {"state_dict": module.state_dict(), "pytorch-lightning_version": "2.6.0"}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)
    return path


def value(state: Mapping[str, Tensor]) -> float:
    (found,) = {float(t) for name in state for t in state[name].unique() if state[name].is_floating_point()}
    return found


def content(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def test_uniform_soup_of_one_and_three_is_two_and_its_checkpoint_opens(tmp_path: Path) -> None:
    members = [member(tmp_path / "1.ckpt", 1), member(tmp_path / "3.ckpt", 3)]
    said: list[str] = []
    report = soup(members, tmp_path / "soup.ckpt", progress=said.append)
    module = load_checkpoint(tmp_path / "soup.ckpt")
    assert all(torch.equal(p, torch.full_like(p, 2)) for p in module.parameters())
    assert module.labels == LABELS
    assert [row["taken"] for row in report.rows] == [True, True]
    assert len(said) == 2
    assert content(tmp_path / "soup.ckpt")["soup"] == [str(path) for path in members]
    # The members are as they were: they are mapped into memory from their files.
    assert value(content(members[0])["state_dict"]) == 1


@pytest.mark.parametrize(
    ("mode", "target", "taken", "final"),
    [
        # Sorted by |v - 3|: 3.5, 2, 5, 1. With 2: 2.75; with 5: 3.5, worse; with 1: 2.1667, worse.
        ("max", 3.0, {3.5, 2.0}, 2.75),
        ("min", 3.0, {3.5, 2.0}, 2.75),
        # Sorted: 1, 2, 3.5, 5. Nothing improves.
        ("max", 0.0, {1.0}, 1.0),
        # Sorted: 3.5, 2, 5, 1 by |v - 3.125|: 2.75 is as far from it as 3.5, and a tie is not an improvement;
        # with 5: 4.25, with 1: 2.25.
        ("max", 3.125, {3.5}, 3.5),
        # Sorted: 2, 3.5, 1, 5. With 3.5: 2.75; with 1: 2.1667; with 5: 2.875, worse.
        ("max", 2.4, {2.0, 3.5, 1.0}, 6.5 / 3),
    ],
)
def test_greedy_takes_what_strictly_improves(
    mode: Any, target: float, taken: set[float], final: float, tmp_path: Path
) -> None:
    values = {str(member(tmp_path / f"{v}.ckpt", v)): v for v in (1.0, 2.0, 3.5, 5.0)}
    sign = -1 if mode == "max" else 1
    tried: list[float] = []

    def score(state: Mapping[str, Tensor]) -> float:
        tried.append(value(state))
        return sign * abs(tried[-1] - target)

    report = soup(list(values), tmp_path / "soup.ckpt", score=score, greedy=True, mode=mode)
    assert {values[row["member"]] for row in report.rows if row["taken"]} == taken
    assert value(content(tmp_path / "soup.ckpt")["state_dict"]) == pytest.approx(final)
    assert report.facts["score"] == pytest.approx(sign * abs(final - target))
    expected = sorted((sign * abs(v - target) for v in values.values()), reverse=mode == "max")
    assert [row["score"] for row in report.rows] == expected
    assert len(tried) == 2 * len(values) - 1


def test_folders_may_be_among_the_members_and_tied_weights_stay_tied(tmp_path: Path) -> None:
    module = MaskedLM(Architecture(hf.BertConfig(**BERT)))
    first = save(module, tmp_path / "1.ckpt", 1)
    for parameter in module.parameters():
        torch.nn.init.constant_(parameter, 3)
    module.model.save_pretrained(tmp_path / "folder")
    soup([tmp_path / "folder", first], tmp_path / "soup.ckpt")
    state = content(tmp_path / "soup.ckpt")["state_dict"]
    assert value(state) == 2
    tied = [state[f"model.{name}.weight"] for name in ("bert.embeddings.word_embeddings", "cls.predictions.decoder")]
    assert tied[0].data_ptr() == tied[1].data_ptr()
    mixed = load_checkpoint(tmp_path / "soup.ckpt").model
    assert mixed.get_input_embeddings().weight is mixed.get_output_embeddings().weight


def test_refuses_what_does_not_mix(tmp_path: Path) -> None:
    one, out = member(tmp_path / "1.ckpt", 1), tmp_path / "soup.ckpt"

    def refused(message: str, *members: Path, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            soup(list(members), out, **options)
        assert not out.exists()

    three = member(tmp_path / "3.ckpt", 1, ["good", "bad"])
    refused(r"the labels of .*3.ckpt is \['good', 'bad'\], that of .*1.ckpt is \['bad', 'good'\]", one, three)
    deeper = member(tmp_path / "deep.ckpt", 1, num_hidden_layers=4)
    refused(
        r"1.ckpt and .*deep.ckpt do not mix: .* same keys: the second lacks nothing and has model.bert.encoder.layer.3",
        one,
        deeper,
    )
    wider = member(tmp_path / "wide.ckpt", 1, intermediate_size=64)
    refused(r"do not mix: .* has the shape \(32, 16\) in one state dict and \(64, 16\)", one, wider)
    other = save(MaskedLM(Architecture(hf.BertConfig(**BERT))), tmp_path / "mlm.ckpt", 1)
    refused("the head of .*mlm.ckpt is MaskedLM, that of .* is SequenceClassification", one, other)
    refused("names 1 checkpoints: a soup has two or more", one)
    refused("names .*1.ckpt.* twice", one, tmp_path / "." / "1.ckpt")
    refused("greedy=True scores each mixture", one, deeper, greedy=True)

    (folder := tmp_path / "folder").mkdir()
    refused("no Hugging Face folder: it has no config.json", one, folder)
    hf.BertConfig(**BERT).save_pretrained(folder)
    refused("labels of .*folder", one, folder)
    hf.BertConfig(**BERT, id2label=dict(enumerate(LABELS))).save_pretrained(folder)
    refused("folder holds no safetensors", one, folder)
    refused("Hugging Face folders alone", folder, tmp_path)
    refused("was not written by a lightning_ft module", one, strange(tmp_path / "strange.ckpt"))

    out.touch()
    with pytest.raises(FileExistsError, match=r"soup.ckpt exists: name another"):
        soup([one, three], out)
    with pytest.raises(FileNotFoundError, match=r"gone.ckpt does not exist"):
        soup([one, tmp_path / "gone.ckpt"], tmp_path / "new.ckpt")


def strange(path: Path) -> Path:
    FILTERED.fit(max_epochs=0).save_checkpoint(path)
    return path


@pytest.mark.filterwarnings("ignore")
def test_command_line(
    project: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(project)
    members = []
    for seed in (1, 2):
        module = SequenceClassification("model", labels=["negative", "positive"], head_seed=seed)
        checkpoint = {"state_dict": module.state_dict(), "pytorch-lightning_version": "2.6.0"}
        module.on_save_checkpoint(checkpoint)
        torch.save(checkpoint, f"{seed}.ckpt")
        members.append(f"{seed}.ckpt")
    (project / "train.jsonl").rename(project / "away.jsonl")  # scoring needs validation data alone

    def command(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["lightning-ft", *arguments])
        cli.main()
        return capsys.readouterr().out

    output = command("soup", *members, "--out", "uniform.ckpt")
    assert "Soup (uniform): uniform.ckpt" in output
    greedy = ("--greedy", "--config", "config.yaml", "--monitor", "val_loss", "--mode", "min")
    output = command("soup", *members, "--out", "greedy.ckpt", *greedy)
    assert "Soup (greedy): greedy.ckpt" in output
    final = float(next(line for line in output.splitlines() if " score: " in line).split()[-1])
    scores = [float(line.split()[1]) for line in output.splitlines() if line.strip()[:2] in ("1.", "2.")]
    assert scores == sorted(scores)
    assert final <= scores[0]
    assert not (project / "runs").exists()
    one, other, mixed = (content(Path(f"{name}.ckpt"))["state_dict"] for name in ("1", "2", "uniform"))
    mean = (one["model.classifier.weight"].double() + other["model.classifier.weight"].double()) / 2
    torch.testing.assert_close(mixed["model.classifier.weight"].double(), mean, rtol=1e-6, atol=1e-8)

    assert "test_accuracy" in command("test", "--config", "config.yaml", "--ckpt_path", "greedy.ckpt")
    assert "worst relative difference" in command("export", "greedy.ckpt", "served", "--max_length", "16")
    assert json.loads((project / "served" / "config.json").read_text())["id2label"]["1"] == "positive"
    with pytest.raises(SystemExit):
        command("soup", *members, "--out", "other.ckpt", "--greedy")
    assert "--config names the run's configuration" in capsys.readouterr().err
    with pytest.raises(ValueError, match="monitor='nothing' is not logged in validation; logged are: val_loss"):
        command("soup", *members, "--out", "other.ckpt", "--greedy", "--config", "config.yaml", "--monitor", "nothing")
    assert content(Path("greedy.ckpt"))[KEY]["class"] == "SequenceClassification"
