from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_ft.core.layers import Layers
from lightning_ft.export.bake import baked
from lightning_ft.functional.diff_pruning import (
    SparseOffset,
    compact,
    diff_prune,
    prune_offsets,
    sparse_offsets,
)
from lightning_ft.functional.hard_concrete import HardConcrete, logistic_noise
from lightning_ft.functional.moment import Moment
from lightning_ft.functional.sparse_delta import load_sparse_delta, save_sparse_delta
from tests.strangers import Filtered
from tests.tiny import BERT, GPT2, tiny

GATES = HardConcrete(-0.1, 1.1, 2 / 3, 0.3)


def ids() -> dict[str, Tensor]:
    tokens = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(1))
    tokens[:, -1] = 2
    return {"input_ids": tokens}


def jolt(module: nn.Module, scale: float = 0.1) -> None:
    """Offsets as after a training."""
    with torch.no_grad():
        for offset in sparse_offsets(module):
            offset.delta.normal_().mul_(scale)
            offset.log_alpha.normal_()
            assert offset.group_log_alpha is not None
            offset.group_log_alpha.fill_(1.0)  # z is 0.69


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5"])
def test_starts_as_the_model_was_whatever_is_drawn(kind: str) -> None:
    model = tiny(kind)
    before = model(**ids()).logits
    groups = Layers().of(model)
    head = {id(p) for p in groups.parameters("head")}
    outside = sum(p.numel() for p in model.parameters() if id(p) not in head)
    report = diff_prune(model, seed=1)
    assert torch.equal(model(**ids()).logits, before)
    for offset in sparse_offsets(model):
        offset.train()
    assert torch.equal(model(**ids()).logits, before)
    assert Layers().of(model).names == groups.names
    assert report.facts["values"] == outside == sum(o.delta.numel() for o in sparse_offsets(model))
    # δ, a and a gate for each tensor, of everything but the head: biases, norms and embeddings, tied ones once.
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == head | {id(p) for o in sparse_offsets(model) for p in o.parameters()}
    model(**ids()).logits.sum().backward()
    assert all(o.delta.grad is not None and o.log_alpha.grad is not None for o in sparse_offsets(model))


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("drawn", [True, False])
def test_gradient_is_that_of_finite_differences(structured: bool, drawn: bool) -> None:
    weight = torch.randn(3, 4, dtype=torch.double, requires_grad=True)
    offset = SparseOffset(weight, GATES, structured=structured, moment=Moment(), key=3).double().train(drawn)
    with torch.no_grad():
        offset.delta.normal_()
        offset.log_alpha.normal_()
    gate = GATES.sample(offset.log_alpha, logistic_noise(offset.log_alpha, 1)) if drawn else offset.gate()
    assert (gate > 0).double().mean() > 0  # some of them open, and none on a kink
    assert torch.autograd.gradcheck(lambda *_: offset(weight), [weight, *offset.parameters()])


def plain_value(offset: SparseOffset, weight: Tensor, stamp: tuple[int, ...]) -> Tensor:
    """θ⁰ + z⊙δ by autograd, with the noise of one moment."""
    from lightning_ft.core.counter_random import random_key

    assert offset.group_log_alpha is not None
    parts = [
        GATES.sample(a, logistic_noise(a, random_key(offset.key, i, *stamp)))
        for i, a in enumerate((offset.log_alpha, offset.group_log_alpha))
    ]
    return weight + parts[0] * parts[1] * offset.delta


def test_gradients_of_two_micro_batches_belong_each_to_its_own_draw() -> None:
    """The authors map the accumulated gradient with the last z."""
    layer = nn.Linear(6, 5, bias=False)
    weight, moment = layer.weight, Moment()
    offset = SparseOffset(weight, GATES, structured=True, moment=moment, key=7)
    nn.utils.parametrize.register_parametrization(layer, "weight", offset, unsafe=True)
    with torch.no_grad():
        offset.delta.normal_()
    batches = torch.randn(2, 4, 6)
    expected: list[Any] = [0.0, 0.0, 0.0]
    for i, batch in enumerate(batches):
        loss = (batch @ plain_value(offset, weight, (0, i)).T).square().sum()
        gradients = torch.autograd.grad(loss, list(offset.parameters()))
        expected = [e + g for e, g in zip(expected, gradients, strict=True)]
    for i, batch in enumerate(batches):
        moment.begin(0, i)
        layer(batch).square().sum().backward()
    for parameter, gradient in zip(offset.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_each_moment_has_its_draw_and_each_tensor_too() -> None:
    model = Filtered(dropout=0)
    diff_prune(model, gates={"start": 0.0})
    jolt(model)
    moment = sparse_offsets(model)[0].moment
    layers = model.encoder.layers
    values = []
    for stamp in ((0, 1), (0, 2), (0, 1)):
        moment.begin(*stamp)
        values.append([layer.linear1.weight - layer.linear1.parametrizations.weight.original for layer in layers])
        assert layers[0].linear1.weight is layers[0].linear1.weight
    assert torch.equal(values[0][0], values[2][0])
    assert not torch.equal(values[0][0] == 0, values[1][0] == 0)
    assert not torch.equal(values[0][0] == 0, values[0][1] == 0)
    model.eval()
    assert torch.equal(layers[0].linear1.weight, layers[0].linear1.weight)
    torch.testing.assert_close(
        layers[0].linear1.weight - layers[0].linear1.parametrizations.weight.original,
        layers[0].linear1.parametrizations.weight[0].gate() * layers[0].linear1.parametrizations.weight[0].delta,
    )


@pytest.mark.parametrize("in_moment", [True, False])
def test_a_checkpointed_block_reads_the_same_draw(in_moment: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = tiny("bert").train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        diff_prune(model, gates={"start": 0.0}, seed=3)
        jolt(model)
        if checkpointing:
            # The newer name first: transformers warns about the older one from 5.20 on.
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        if in_moment:
            sparse_offsets(model)[0].moment.begin(1, 2)
        model(**ids()).logits.square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_tied_weight_is_one_weight_with_one_draw_and_baked_once() -> None:
    model = hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2, bos_token_id=1, eos_token_id=2)).train()
    diff_prune(model, gates={"start": 0.0}, layers={"head": []})
    jolt(model)
    assert len(sparse_offsets(model)) == len({id(o.delta) for o in sparse_offsets(model)})
    assert torch.equal(model.transformer.wte.weight, model.lm_head.weight)
    names = [name for name, _ in model.named_parameters()]
    assert "lm_head.parametrizations.weight.0.delta" not in names
    model.eval()
    before = model(**ids()).logits
    plain, _ = baked(model)
    assert plain.lm_head.weight is plain.transformer.wte.weight
    torch.testing.assert_close(plain(**ids()).logits, before, rtol=0, atol=1e-5)


# ---- the mask


def magnitudes(module: nn.Module) -> Tensor:
    return torch.cat([(o.gate() * o.delta).abs().flatten() for o in sparse_offsets(module)]).detach()


@pytest.mark.parametrize("share", [0.005, 0.1, 1.0])
def test_keeps_the_largest_of_all_tensors_together(share: float) -> None:
    model = tiny("bert")
    diff_prune(model)
    jolt(model)
    before, deltas = magnitudes(model), [(o.gate() * o.delta).clone() for o in sparse_offsets(model)]
    count = round(share * len(before))
    report = prune_offsets(model, share)
    assert report.facts["kept"] == count == sum(row["kept"] for row in report.rows)
    least = before.sort(descending=True).values[count - 1]
    for offset, delta in zip(sparse_offsets(model), deltas, strict=True):
        assert offset.fixed
        keep = offset.log_alpha == torch.inf
        assert torch.equal(keep, delta.abs() >= least)
        assert torch.equal(offset.delta, torch.where(keep, delta, 0))
        assert torch.equal(offset.gate(), keep.float())
    with pytest.raises(ValueError, match="pruned already"):
        prune_offsets(model, share)


def test_ties_are_settled_by_place() -> None:
    model = tiny("bert")
    diff_prune(model)
    report = prune_offsets(model, 0.01)  # every δ is zero
    assert report.facts["kept"] == round(0.01 * report.facts["values"])
    assert [row["kept"] for row in report.rows] == [report.facts["kept"]]


def test_a_fixed_mask_lets_kept_values_train_and_no_other() -> None:
    model = tiny("bert")
    before = model(**ids()).logits
    diff_prune(model)
    jolt(model)
    prune_offsets(model, 0.02)
    for offset in sparse_offsets(model):
        offset.train()  # there is nothing left to draw
    assert not torch.equal(model(**ids()).logits, before)
    model(**ids()).logits.square().sum().backward()
    for offset in sparse_offsets(model):
        assert offset.delta.grad is not None
        assert not offset.delta.grad[offset.log_alpha < 0].any()
        assert offset.log_alpha.grad is not None
        assert not offset.log_alpha.grad.any()
    assert any(bool(o.delta.grad.any()) for o in sparse_offsets(model) if o.delta.grad is not None)


def test_a_compact_state_is_small_and_loads_to_the_bit() -> None:
    model, fresh = tiny("t5"), tiny("t5")
    fresh.load_state_dict(model.state_dict())
    for one in (model, fresh):
        diff_prune(one)
    state = model.state_dict()
    assert compact(model, state) == state  # its offsets are dense yet
    jolt(model)
    prune_offsets(model, 0.01)
    state = compact(model, model.state_dict())
    assert not any(name.endswith(("delta", "log_alpha")) for name in state)
    places = [value for name, value in state.items() if name.endswith(".index")]
    assert {place.dtype for place in places} == {torch.int32}
    fresh.load_state_dict(state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name]), name


# ---- files


def pruned(share: float = 0.005, **config: Any) -> tuple[nn.Module, nn.Module]:
    """A pruned model, and one as it was."""
    torch.manual_seed(0)
    model = hf.AutoModelForSequenceClassification.from_config(hf.BertConfig(**{**BERT, "vocab_size": 2000, **config}))
    model.eval()
    fresh = copy.deepcopy(model)
    diff_prune(model)
    jolt(model)
    prune_offsets(model, share)
    with torch.no_grad():
        model.classifier.weight.normal_()  # the head has trained
    return model, fresh


def test_file_holds_eight_bytes_a_value_and_gives_the_same_logits(tmp_path: Path) -> None:
    model, fresh = pruned()
    report = save_sparse_delta(model, tmp_path / "task.safetensors")
    values, kept = report.facts["values"], report.facts["kept"]
    assert kept == round(0.005 * values)
    assert report.facts["changed"] <= kept
    assert report.facts["difference, bytes"] <= 8 * kept
    tensors = load_file(tmp_path / "task.safetensors")
    assert {t.dtype for name, t in tensors.items() if name.startswith("index")} == {torch.int32}
    assert (tmp_path / "task.safetensors").stat().st_size < 8 * kept + report.facts["head, bytes"] + 20_000
    loaded = load_sparse_delta(fresh, tmp_path / "task.safetensors")
    assert loaded.facts["kept"] == kept
    assert torch.equal(fresh(**ids()).logits, model(**ids()).logits)


def test_file_of_a_tied_model(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2, bos_token_id=1, eos_token_id=2)).eval()

    model, fresh = build(), build()
    diff_prune(model, layers={"head": []})
    jolt(model)
    prune_offsets(model, 0.01)
    save_sparse_delta(model, tmp_path / "task.safetensors")
    load_sparse_delta(fresh, tmp_path / "task.safetensors")
    assert fresh.lm_head.weight is fresh.transformer.wte.weight
    assert torch.equal(fresh(**ids()).logits, model(**ids()).logits)


def test_a_negative_zero_of_the_base_is_no_change(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tiny("bert")
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight.fill_(-0.0)
    diff_prune(model)
    prune_offsets(model, 0.001)
    assert save_sparse_delta(model, tmp_path / "task.safetensors").facts["difference, bytes"] == 0


def _another_base(model: nn.Module, fresh: nn.Module) -> None:
    with torch.no_grad():
        fresh.bert.embeddings.word_embeddings.weight[3, 3] += 1


def _altered(model: nn.Module, fresh: nn.Module) -> None:
    diff_prune(fresh)


def _other_head(model: nn.Module, fresh: nn.Module) -> None:
    fresh.classifier = nn.Linear(16, 5)


def _no_head(model: nn.Module, fresh: nn.Module) -> None:
    del fresh.classifier


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_another_base, "is a difference to weights with sha256 .* build it from the same pretrained weights"),
        (_altered, "module is altered by diff pruning: .* loaded into a freshly built one"),
        (_other_head, r"classifier.bias has shape \(2,\), the module's \(5,\)"),
        (_no_head, "changes classifier.bias, classifier.weight, and BertForSequenceClassification has no such"),
    ],
)
def test_refuses_another_module(change: Callable[..., None], message: str, tmp_path: Path) -> None:
    model, fresh = pruned()
    save_sparse_delta(model, tmp_path / "task.safetensors")
    change(model, fresh)
    with pytest.raises(ValueError, match=message):
        load_sparse_delta(fresh, tmp_path / "task.safetensors")


def test_refuses_other_files_and_dense_differences(tmp_path: Path) -> None:
    model = tiny("bert")
    with pytest.raises(FileNotFoundError, match=r"none.safetensors does not exist"):
        load_sparse_delta(model, tmp_path / "none.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is no sparse difference"):
        load_sparse_delta(model, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="has no offsets to prune"):
        prune_offsets(model, 0.5)
    diff_prune(model)
    with pytest.raises(ValueError, match="is not pruned yet"):
        save_sparse_delta(model, tmp_path / "task.safetensors")
    with pytest.raises(ValueError, match=r"BertForSequenceClassification is altered already .* use one such method"):
        diff_prune(model)


@pytest.mark.parametrize("share", [0.0, 1.5, -1.0])
def test_refuses_a_share_that_is_none(share: float) -> None:
    with pytest.raises(ValueError, match=r"share=.* must lie in \(0, 1\]"):
        prune_offsets(tiny("bert"), share)
