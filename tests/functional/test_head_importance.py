"""Heads of attention: found, gated, measured, silenced, in models of which nothing is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from lightning_ft.functional.attention_heads import HeadProjection, find_heads
from lightning_ft.functional.head_importance import (
    HeadScores,
    _lowest,
    gated,
    head_importance,
    prune_heads,
    silence_heads,
)
from tests.strangers import Encoder, Filtered, Manual, dataset
from tests.strangers import pretrained as pretrained_weights
from tests.tiny import LLAMA, tiny

FOUND = {
    "bert": (3, "attention.output.dense"),
    "distilbert": (3, "attention.out_lin"),
    "roberta": (3, "attention.output.dense"),
    "deberta": (3, "attention.output.dense"),
    "electra": (3, "attention.output.dense"),
    "albert": (1, "attention.dense"),
    "gpt2": (3, "attn.c_proj"),
    "llama": (3, "self_attn.o_proj"),
    "qwen3": (3, "self_attn.o_proj"),
    "modernbert": (3, "attn.Wo"),
    "t5": (9, "Attention.o"),
    "bart": (9, "attn.out_proj"),
}
MEASURED = ["bert", "distilbert", "gpt2", "llama", "t5"]


def batch(rows: int = 4) -> dict[str, Tensor]:
    ids = torch.randint(3, 50, (rows, 7), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = 2
    return {"input_ids": ids, "labels": torch.arange(rows) % 2}


def loss_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["input_ids"]).logits, batch["labels"])


def wider(kind: str) -> nn.Module:
    """Larger weights than those that models begin with, so that heads matter."""
    torch.manual_seed(1)
    model = tiny(kind)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, 0.3)
    return model


def projections(model: nn.Module) -> list[HeadProjection]:
    return find_heads(model, lambda: loss_of(model, batch()))


def constant(*values: float) -> Any:
    return lambda projection, rows: torch.tensor(values)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", FOUND)
def test_projections_are_found_by_what_flows_into_them(kind: str, attention: str) -> None:
    model = tiny(kind)
    model.config._attn_implementation = attention
    count, name = FOUND[kind]
    found = projections(model)
    assert len(found) == count
    assert all(name in p.name or ("EncDecAttention" in p.name and kind == "t5") for p in found)
    assert {(p.heads, p.width, p.called) for p in found} == {(2, 8, True)}


def test_queries_in_groups_count_as_heads() -> None:
    model = hf.LlamaForSequenceClassification(hf.LlamaConfig(**{**LLAMA, "num_attention_heads": 4, "head_dim": 6}))
    assert {(p.heads, p.width) for p in projections(model)} == {(4, 6)}


@pytest.mark.parametrize("kind", FOUND)
def test_gates_of_one_change_nothing_and_of_zero_silence(kind: str) -> None:
    """The oracle of ξ = 0 is a model whose matching columns are 0."""
    model, ids = wider(kind).eval(), batch()["input_ids"]
    found = projections(model)
    with torch.no_grad():
        full = model(ids).logits
        with gated(found, constant(1.0, 1.0)):
            assert torch.equal(model(ids).logits, full)
        with gated(found, constant(1.0, 0.0)):
            silent = model(ids).logits
        assert torch.equal(model(ids).logits, full)
        assert not torch.allclose(silent, full, atol=1e-3)
        for p in found:
            columns = p.weight if isinstance(p.layer, nn.Linear) else p.weight.T
            columns[:, 8:16] = 0
        torch.testing.assert_close(model(ids).logits, silent, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", MEASURED)
def test_importance_is_that_of_examples_one_by_one(kind: str) -> None:
    """The oracle: batches of one, one gate a head, autograd."""
    model, rows = wider(kind), batch(5)
    found = projections(model)
    scores = head_importance(model, [rows], loss=loss_of)
    model.eval()
    expected = {p.name: torch.zeros(2) for p in found}
    for i in range(5):
        one = {name: value[i : i + 1] for name, value in rows.items()}
        gates = {p: torch.ones(2, requires_grad=True) for p in found}
        with gated(found, lambda p, rows, gates=gates: gates[p]):
            loss = loss_of(model, one)
        for p, gradient in zip(gates, torch.autograd.grad(loss, list(gates.values())), strict=True):
            expected[p.name] += gradient.abs()
    assert scores.examples == 5
    assert scores.loss == pytest.approx(float(loss_of(model, rows).detach()), rel=1e-5)
    for name, values in expected.items():
        torch.testing.assert_close(scores.importance[name], values / values.norm(), rtol=1e-4, atol=1e-5)
        assert float(scores.importance[name].norm()) == pytest.approx(1)


def test_examples_cancel_out_in_the_gradient_of_a_batch() -> None:
    """What is measured is another thing: the oracle above can fail."""
    model, rows = wider("bert").eval(), batch(8)
    found = projections(model)
    gates = {p: torch.ones(2, requires_grad=True) for p in found}
    with gated(found, lambda p, rows: gates[p]):
        loss = loss_of(model, rows)
    batched = [g.abs() / g.norm() for g in torch.autograd.grad(loss, list(gates.values()))]
    scores = head_importance(model, [rows], loss=loss_of).importance
    assert any(not torch.allclose(scores[p.name], g, atol=0.02) for p, g in zip(found, batched, strict=True))


def test_a_gradient_is_a_finite_difference() -> None:
    model, rows = wider("bert").double().eval(), batch(1)
    found = projections(model)[:1]
    gates = torch.ones(2, dtype=torch.float64, requires_grad=True)
    with gated(found, lambda *_: gates):
        loss = loss_of(model, rows)
    (gradient,) = torch.autograd.grad(loss, [gates])
    for head in range(2):
        values = []
        for step in (1e-5, -1e-5):
            moved = torch.ones(2, dtype=torch.float64)
            moved[head] += step
            with gated(found, lambda *_, moved=moved: moved), torch.no_grad():
                values.append(float(loss_of(model, rows)))
        assert (values[0] - values[1]) / 2e-5 == pytest.approx(float(gradient[head]), rel=1e-4, abs=1e-9)


def test_multihead_attention_of_torch_is_measured_row_by_row() -> None:
    """In a LightningModule, by its own training step; its oracle are columns of zeros and a weight's gradient."""
    module, (tokens, labels) = Filtered(), [t[:6] for t in dataset().tensors]
    scores = head_importance(module, [[tokens, labels]])
    names = [f"encoder.layers.{i}.self_attn.out_proj" for i in range(3)]
    assert list(scores.importance) == names
    module.eval()
    expected = {name: torch.zeros(2) for name in names}
    for i in range(6):
        weights = [module.get_submodule(name).weight for name in names]
        loss = F.cross_entropy(module(tokens[i : i + 1]), labels[i : i + 1])
        for name, w, g in zip(names, weights, torch.autograd.grad(loss, weights), strict=True):
            expected[name] += (w * g).sum(0).view(2, 4).sum(1).abs()  # ∂L/∂ξ = Σ W ⊙ ∂L/∂W over a head's columns
    for name, values in expected.items():
        torch.testing.assert_close(scores.importance[name], values / values.norm(), rtol=1e-4, atol=1e-5)
    assert not any("weight" in vars(child) for child in module.modules())
    found = find_heads(module, lambda: module(tokens))
    with torch.no_grad():
        with gated(found, constant(0.0, 1.0)):
            silent = module(tokens)
        silence_heads(found, {name: [0] for name in names})
        torch.testing.assert_close(module(tokens), silent, rtol=0, atol=1e-6)


def test_the_module_is_left_as_it_was() -> None:
    model = wider("bert").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    head_importance(model, [batch(), batch(3)], loss=loss_of, limit=5)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_it_stops_at_a_number_of_examples_and_takes_frozen_models() -> None:
    model = wider("bert").requires_grad_(False)
    rows = batch(8)
    first = {name: value[:5] for name, value in rows.items()}
    limited = head_importance(model, [rows, rows], loss=loss_of, limit=5)
    whole = head_importance(model, [first], loss=loss_of)
    assert limited.examples == 5
    for name, values in whole.importance.items():
        torch.testing.assert_close(limited.importance[name], values)


def test_uneven_batches_count_each_example_once() -> None:
    model, rows = wider("gpt2"), batch(7)
    parts = [{name: value[i:j] for name, value in rows.items()} for i, j in ((0, 4), (4, 5), (5, 7))]
    whole, apart = (head_importance(model, batches, loss=loss_of) for batches in ([rows], parts))
    for name, values in whole.importance.items():
        torch.testing.assert_close(apart.importance[name], values, rtol=1e-4, atol=1e-5)
    assert apart.loss == pytest.approx(whole.loss)


def test_choices_of_one_example_are_added_up() -> None:
    """An example of two rows in the model, as in multiple choice."""
    model = wider("bert").eval()

    def loss(model: Any, rows: dict[str, Tensor]) -> Tensor:
        scores = model(rows["input_ids"].flatten(0, 1)).logits[:, 0].view(-1, 2)
        return F.cross_entropy(scores, rows["labels"])

    rows = {"input_ids": batch(6)["input_ids"].view(3, 2, 7), "labels": torch.tensor([0, 1, 1])}
    whole = head_importance(model, [rows], loss=loss)
    found = find_heads(model, lambda: loss(model, rows))
    expected = {p.name: torch.zeros(2) for p in found}
    for i in range(3):
        gates = {p: torch.ones(2, requires_grad=True) for p in found}
        with gated(found, lambda p, rows, gates=gates: gates[p]):  # one gate for both of an example's rows
            value = loss(model, {n: v[i : i + 1] for n, v in rows.items()})
        for p, gradient in zip(gates, torch.autograd.grad(value, list(gates.values())), strict=True):
            expected[p.name] += gradient.abs()
    for name, values in expected.items():
        torch.testing.assert_close(whole.importance[name], values / values.norm(), rtol=1e-4, atol=1e-5)


# ---- silencing


def test_rounds_keep_a_head_in_each_layer_and_take_the_least_needed_first() -> None:
    config = hf.BertConfig(
        vocab_size=50, hidden_size=32, num_attention_heads=8, intermediate_size=32, num_hidden_layers=3
    )
    torch.manual_seed(0)
    model = hf.BertForSequenceClassification(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, 0.2)
    first = head_importance(model, [batch(6)], loss=loss_of)
    least = first.ranking()[:2]
    report, left = prune_heads(model, [batch(6)], 0.875, loss=loss_of)
    silent = {name: sorted(heads) for name, heads in left.silent.items()}
    assert report.facts["silent"] == sum(map(len, silent.values())) == 21  # all but one of each layer
    assert report.facts["heads"] == 24
    assert len(report.facts["loss by round"]) == 11 + 1  # two heads a round
    assert all(len(heads) <= 7 for heads in silent.values())
    assert all(head in silent[name] for name, head, _ in least)
    for name, heads in silent.items():
        weight = model.get_submodule(name).weight.view(32, 8, 4)
        assert [h for h in range(8) if not weight[:, h].any()] == heads
    assert {(name, head) for name, head, _ in left.ranking()} == {
        (row["layer"], head) for row in report.rows for head in range(8) if head not in silent.get(row["layer"], [])
    }
    assert report.facts["loss by round"][0] == pytest.approx(first.loss)
    assert report.facts["loss by round"][-1] == pytest.approx(left.loss)


def test_the_last_head_of_a_layer_stays_though_it_is_least_needed() -> None:
    scores = HeadScores({"a.o": torch.tensor([0.1]), "b.o": torch.tensor([0.8, 0.6])}, 4, 0.5)
    assert _lowest(scores, {}, {"a.o": 1, "b.o": 2}, 3) == [("b.o", 1)]


def test_a_picture_and_a_table(tmp_path: Path) -> None:
    scores = HeadScores({"a.o": torch.tensor([0.6, 0.8]), "b.o": torch.tensor([1.0, 0.0, 0.0])}, 4, 0.5, {"b.o": [1]})
    assert [(name, head) for name, head, _ in scores.ranking()] == [("b.o", 2), ("a.o", 0), ("a.o", 1), ("b.o", 0)]
    assert scores.report().rows[0] == {"rank": 1, "layer": "b.o", "head": 2, "importance": 0.0}
    scores.plot(tmp_path / "heads.png")
    assert (tmp_path / "heads.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match=r"must end in \.png"):
        scores.plot(tmp_path / "heads.txt")


# ---- refusals


def test_refuses_bad_shares_and_heads() -> None:
    model = wider("bert")
    found = projections(model)
    name = found[0].name
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match=rf"share={share} must be in \(0, 1\)"):
            prune_heads(model, [batch()], share, loss=loss_of)
    with pytest.raises(ValueError, match=r"per_round=2 must be in \(0, 1\)"):
        prune_heads(model, [batch()], 0.5, per_round=2, loss=loss_of)
    with pytest.raises(ValueError, match=r"share=0.9 of 6 heads leaves fewer than one for each of 3 layers"):
        prune_heads(model, [batch()], 0.9, loss=loss_of)
    with pytest.raises(ValueError, match=r"\[2\]\} must name heads of one of"):
        silence_heads(found, {name: [2]})
    with pytest.raises(ValueError, match=r"'no': \[0\]\} must name heads of one of"):
        silence_heads(found, {"no": [0]})
    with pytest.raises(ValueError, match="would leave no head there"):
        silence_heads(found, {name: [0, 1]})
    with pytest.raises(ValueError, match="limit=0 must be 1 or more"):
        head_importance(model, [batch()], loss=loss_of, limit=0)
    with pytest.raises(ValueError, match="batches gave no example"):
        head_importance(model, [], loss=loss_of)
    with pytest.raises(ValueError, match="heads='no' must name a linear layer; there are: bert"):
        head_importance(model, [batch()], loss=loss_of, heads={"no": 2})
    with pytest.raises(ValueError, match=r"reads 16 units, which are no multiple of 3 heads"):
        head_importance(model, [batch()], loss=loss_of, heads={name: 3})


def test_refuses_rows_that_are_no_examples() -> None:
    model = wider("bert")
    uneven = {**batch(), "extra": torch.ones(3)}
    with pytest.raises(ValueError, match="the rows of this batch cannot be told apart"):
        head_importance(model, [uneven], loss=loss_of)

    def packed(model: Any, rows: dict[str, Tensor]) -> Tensor:
        return model(rows["input_ids"].view(7, 4)).logits.square().mean()

    with pytest.raises(ValueError, match="is called with 7 rows for a batch of 4"):
        head_importance(model, [batch()], loss=packed)


def test_refuses_what_has_no_attention_and_steps_of_its_own() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.layer(batch).sum()

    with pytest.raises(ValueError, match=r"no output projection of attention was found in Plain.*attn_implementation"):
        head_importance(Plain(), [torch.ones(2, 4)])
    with pytest.raises(ValueError, match="steps its optimisers in training_step"):
        head_importance(Manual(), [dataset().tensors])
    with pytest.raises(ValueError, match="no output projection of attention was found in XLNet"):
        head_importance(wider("xlnet"), [batch()], loss=loss_of)  # its projection is an einsum


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_refuses_adapters_and_quantised_weights() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["attention.output.dense"])
    adapted = peft.get_peft_model(wider("bert"), config)
    with pytest.raises(ValueError, match="is part of an adapter of peft: merge it"):
        head_importance(adapted, [batch()], loss=loss_of)
    encoder = pretrained_weights(Encoder)
    layer = encoder.layers[0].self_attn.out_proj
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="has quantised or parametrised weights"):
        find_heads(encoder, lambda: None)
