"""Blocks that are dropped: what is left is the model without them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_ft.callbacks import ExactResume, GradualUnfreezing, LayerRemoval
from lightning_ft.callbacks.layer_drop import LayerDrop
from lightning_ft.core.layers import Layers
from lightning_ft.data import ClassificationData
from lightning_ft.export import export_onnx
from lightning_ft.functional.layer_drop import DroppableBlocks, draw_dropped
from lightning_ft.functional.layer_removal import remove_layers
from lightning_ft.modules import SequenceClassification, load_checkpoint
from tests.pretrained import Kind, pretrained
from tests.strangers import (
    BATCHES,
    FILTERED,
    STRANGERS,
    Encoder,
    Filtered,
    Stranger,
    dataset,
    identical,
    outcome,
    weights,
)
from tests.strangers import pretrained as pretrained_weights
from tests.tiny import LLAMA, TINY, tiny

KINDS: tuple[Kind, ...] = ("bert", "gpt2", "llama", "t5")
DROPPABLE = [kind for kind in TINY if kind != "albert"]
each_stranger = pytest.mark.parametrize("stranger", STRANGERS, ids=lambda s: s.name)


def ids_for(kind: str) -> Tensor:
    ids = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = 2  # what T5 and BART end their sentences with
    return ids


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    return {path: model.get_submodule(path) for paths in Layers().block_paths(model).values() for path in paths}


def still(model: nn.Module) -> nn.Module:
    """In train mode without its dropout."""
    for child in model.train().modules():
        if isinstance(child, nn.Dropout):
            child.p = 0.0
        for name in ("dropout", "dropout_prob", "attention_dropout", "dropout_rate"):
            if isinstance(vars(child).get(name), float):
                setattr(child, name, 0.0)
    return model


# ---- one block


@pytest.mark.parametrize("kind", DROPPABLE)
def test_a_block_that_is_always_dropped_is_one_that_was_removed(kind: str) -> None:
    """Logits and gradients, of every architecture, with nothing known of any."""
    model, ids = still(tiny(kind)), ids_for(kind)
    shorter = copy.deepcopy(model)
    stack = "decoder" if kind in ("t5", "bart") else None
    remove_layers(shorter, [1], stack=stack)
    blocks = blocks_of(model)
    name = [path for path in blocks if stack is None or stack in path][1]
    keys = list(model.state_dict())
    dropping = DroppableBlocks(blocks)
    dropping.dropped = [name]
    got, wanted = model(ids).logits, shorter(ids).logits
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    assert dropping.calls[name] == [1, 1]
    assert not dropping.needed
    got.square().sum().backward()
    wanted.square().sum().backward()
    kept = iter(p for p in shorter.parameters())
    dropped = set(blocks[name].parameters())
    for path, p in model.named_parameters():
        if p in dropped:
            assert p.grad is not None, path
            assert not p.grad.any()
        else:
            torch.testing.assert_close(p.grad, next(kept).grad, rtol=0, atol=0)
    assert list(model.state_dict()) == list(copy.deepcopy(model).state_dict()) == keys
    full = tiny(kind)
    full.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(ids).logits, full(ids).logits)  # none is dropped in eval mode
    dropping.remove()
    assert not any("forward" in vars(block) for block in blocks.values())


def test_the_lowest_block_of_a_t5_runs_since_all_need_its_position_bias() -> None:
    model, ids = still(tiny("t5")), ids_for("t5")
    blocks = blocks_of(model)
    full = model(ids).logits
    dropping = DroppableBlocks(blocks)
    lowest = [name for name in blocks if name.endswith("block.0")]
    dropping.dropped = lowest
    assert torch.equal(model(ids).logits, full)
    assert set(dropping.needed) == set(lowest)
    assert all("beside its hidden state" in why for why in dropping.needed.values())
    assert all(dropping.calls[name] == [1, 0] for name in lowest)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_gradients_with_activation_checkpointing_are_the_same(kind: str, reentrant: bool) -> None:
    model, ids = still(tiny(kind)), ids_for(kind)
    other = copy.deepcopy(model)
    enable = getattr(other, "activation_checkpointing_enable", None) or other.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    if reentrant:
        other.enable_input_require_grads()
    for each in (model, other):
        dropping = DroppableBlocks(blocks_of(each))
        dropping.dropped = list(blocks_of(each))[1:2]
        each(ids).logits.square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_is_run_again_in_the_backward_pass_drops_the_same(reentrant: bool) -> None:
    """Blocks that are checkpointed from outside."""

    class Checkpointed(Encoder):
        def forward(self, tokens: Tensor) -> Tensor:
            hidden = self.tokens(tokens)
            for layer in self.layers:
                hidden = checkpoint(layer, hidden, use_reentrant=reentrant)
            return self.norm(hidden)

    plain = still(pretrained_weights(Encoder))
    other = still(pretrained_weights(Checkpointed))
    tokens = dataset().tensors[0]
    for each in (plain, other):
        dropping = DroppableBlocks({f"layers.{i}": layer for i, layer in enumerate(each.layers)})
        dropping.dropped = ["layers.1"]
        each(tokens).square().sum().backward()
    assert dropping.calls["layers.0"] == [2, 0]
    assert dropping.calls["layers.1"] == ([2, 2] if reentrant else [1, 1])  # there is nothing to compute again
    for (name, p), q in zip(plain.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-7, msg=name)


def test_a_cache_that_an_earlier_call_filled_is_refused() -> None:
    model = still(hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)))
    ids = ids_for("llama")
    dropping = DroppableBlocks(blocks_of(model))
    first = next(iter(dropping.calls))
    dropping.dropped = [first]
    out = model(ids, use_cache=True)
    plain = model(ids, use_cache=False)
    assert torch.equal(out.logits, plain.logits)
    assert dropping.calls[first] == [2, 2]
    assert [out.past_key_values.get_seq_length(layer) for layer in range(3)] == [0, 7, 7]
    with pytest.raises(ValueError, match=r"with a cache that an earlier call filled.*use_cache=False"):
        model(ids[:, :1], past_key_values=out.past_key_values)
    generated = model.eval().generate(ids, max_new_tokens=3, do_sample=False)
    dropping.remove()
    assert torch.equal(generated, model.generate(ids, max_new_tokens=3, do_sample=False))


def test_attentions_cannot_be_had_of_a_block_that_does_not_run() -> None:
    model = still(tiny("bert"))
    dropping = DroppableBlocks(blocks_of(model))
    dropping.dropped = list(dropping.calls)[1:2]
    states = model(ids_for("bert"), output_hidden_states=True).hidden_states
    assert len(states) == 4
    assert torch.equal(states[1], states[2])


def test_learning_a_structure_draws_no_random_number() -> None:
    model, ids = tiny("bert").train(), ids_for("bert")
    dropping = DroppableBlocks(blocks_of(model))
    dropping.dropped = list(dropping.calls)[1:2]
    torch.manual_seed(1)
    first = model(ids).logits
    torch.manual_seed(1)
    assert torch.equal(model(ids).logits, first)


def test_a_copy_drops_with_its_own_weights_and_no_more_after_the_end() -> None:
    model, ids = still(tiny("bert")), ids_for("bert")
    dropping = DroppableBlocks(blocks_of(model))
    dropping.dropped = list(dropping.calls)[1:2]
    copied = copy.deepcopy(model)
    before = model(ids).logits
    with torch.no_grad():
        for p in copied.parameters():
            p.add_(0.1)
    assert not torch.allclose(copied(ids).logits, before)
    assert torch.equal(model(ids).logits, before)
    dropping.remove()
    fresh = still(tiny("bert"))
    fresh.load_state_dict(copied.state_dict())
    assert torch.equal(copied(ids).logits, fresh(ids).logits)


def test_a_forward_that_was_there_before_is_run_and_put_back() -> None:
    model, ids = still(tiny("bert")), ids_for("bert")
    block = next(iter(blocks_of(model).values()))
    own, calls = block.forward, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(*args, **kwargs)

    block.forward = counted  # type: ignore[method-assign]
    dropping = DroppableBlocks(blocks_of(model))
    model(ids)
    assert calls
    dropping.remove()
    assert vars(block)["forward"] is counted


class Odd(nn.Module):
    """Blocks whose output is something else."""

    def __init__(self, give: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.give = nn.Linear(4, 4), give

    def forward(self, hidden: Tensor) -> Any:
        return self.give(self.layer(hidden))


@pytest.mark.parametrize(
    ("give", "reason"),
    [
        (lambda h: {"hidden": h}, "it returns a dict"),
        (lambda h: None, r"it returns no hidden state of the shape \(3, 4\)"),
        (lambda h: h[:, :2], r"it makes a tensor of shape \(3, 2\) beside its hidden state"),
        (lambda h: (h, h.sum()), r"it makes a tensor of shape \(\) beside its hidden state"),
    ],
)
def test_blocks_that_cannot_be_dropped_run(give: Callable[[Tensor], Any], reason: str) -> None:
    import re

    block = Odd(give)
    dropping = DroppableBlocks({"layers.0": block})
    dropping.dropped = ["layers.0"]
    block(torch.ones(3, 4))
    assert re.search(reason, dropping.needed["layers.0"])


@pytest.mark.parametrize("give", [lambda h: h, lambda h: (h, None, 1.5), lambda h: [h, True]])
def test_the_structure_of_an_output_is_kept(give: Callable[[Tensor], Any]) -> None:
    block, hidden = Odd(give), torch.ones(3, 4, requires_grad=True)
    dropping = DroppableBlocks({"layers.0": block})
    dropping.dropped = ["layers.0"]
    got = block(hidden)
    wanted = give(hidden)
    assert type(got) is type(wanted)
    assert identical(got, wanted)


# ---- draws


def test_draws_are_a_function_of_their_key_with_the_right_mean() -> None:
    blocks = {f"block.{i}": 0.2 for i in range(12)}
    draws = [draw_dropped(blocks, 1, epoch, batch) for epoch in range(10) for batch in range(100)]
    assert draws == [draw_dropped(blocks, 1, epoch, batch) for epoch in range(10) for batch in range(100)]
    for name in blocks:
        assert sum(name in draw for draw in draws) == pytest.approx(200, abs=4 * 12.6)  # four standard deviations
    together = sum("block.0" in draw and "block.1" in draw for draw in draws)
    assert together == pytest.approx(40, abs=4 * 6.2)
    assert draw_dropped(dict.fromkeys(blocks, 1.0), 0) == set(blocks)
    assert draw_dropped(dict.fromkeys(blocks, 0.0), 0) == set()


# ---- strangers


class Calls(Callback):
    """Which blocks each training batch dropped."""

    def __init__(self, callback: LayerDrop) -> None:
        self.callback = callback
        self.dropped: list[list[str]] = []

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        assert self.callback._dropping is not None
        self.dropped.append(sorted(self.callback._dropping.dropped))


@each_stranger
def test_drops_in_training_and_leaves_no_trace(stranger: Stranger) -> None:
    callback = LayerDrop(0.4)
    calls = Calls(callback)
    module = stranger.module()
    trainer = stranger.fit(callback, calls, module=module, max_epochs=4)
    assert callback.report is not None
    assert [row["called"] for row in callback.report.rows] == [4 * BATCHES] * 3
    dropped = sum(row["dropped"] for row in callback.report.rows)
    assert dropped == sum(len(names) for names in calls.dropped) > 0
    assert len({tuple(names) for names in calls.dropped}) > 4  # other blocks within an epoch, too
    assert "forward" not in {key for child in module.modules() for key in vars(child)}
    tokens = dataset().tensors[0]
    assert torch.equal(module.eval()(tokens), module(tokens))
    assert not identical(outcome(trainer), outcome(stranger.fit(max_epochs=4)))


@each_stranger
def test_probability_zero_changes_no_bit(stranger: Stranger) -> None:
    assert identical(outcome(stranger.fit(LayerDrop(0.0))), outcome(stranger.fit()))


@each_stranger
@pytest.mark.parametrize("place", [(0, BATCHES - 1), (1, 2)])
def test_resumes_bit_for_bit(stranger: Stranger, place: tuple[int, int], tmp_path: Path) -> None:
    class StopAt(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if (trainer.current_epoch, batch_idx) == place:
                raise KeyboardInterrupt

    options = {"val_check_interval": 0.5, "num_sanity_val_steps": 0, "max_epochs": 3}
    if stranger.name != "manual":
        options["accumulate_grad_batches"] = 2
    whole = outcome(stranger.fit(ExactResume("1 steps", dirpath=tmp_path / "whole"), LayerDrop(0.4, seed=5), **options))
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        stranger.fit(ExactResume("1 steps", dirpath=tmp_path), LayerDrop(0.4, seed=5), StopAt(), **options)
    # The seed is the checkpoint's.
    resumed = [ExactResume("1 steps", dirpath=tmp_path), LayerDrop(0.4)]
    assert identical(outcome(stranger.fit(*resumed, ckpt_path=tmp_path / "last.ckpt", **options)), whole)


@pytest.mark.parametrize("stranger", [s for s in STRANGERS if s.name != "manual"], ids=lambda s: s.name)
def test_training_with_a_block_always_dropped_is_training_without(stranger: Stranger) -> None:
    """But for the dropped block itself, which weight decay moves; and the model's dropout is drawn alike."""
    dropped = stranger.fit(LayerDrop({"block.1": 1.0}))
    removed = stranger.fit(LayerRemoval([1]))
    ours = iter(p for n, p in dropped.lightning_module.named_parameters() if ".1." not in n.partition("layer")[2][:4])
    for p in removed.lightning_module.parameters():
        assert torch.equal(next(ours), p)


def test_frozen_blocks_may_be_in_eval_mode_and_are_not_dropped() -> None:
    module = Filtered()
    for p in module.encoder.layers[0].parameters():
        p.requires_grad_(False)
    module.encoder.layers[0].eval()
    with pytest.warns(UserWarning, match="in eval mode at the start of training"):
        FILTERED.fit(callback := LayerDrop(0.9), module=module)
    assert callback.report is not None
    assert [row["called"] for row in callback.report.rows] == [0, 2 * BATCHES, 2 * BATCHES]


def test_with_gradual_unfreezing_frozen_blocks_get_no_gradient() -> None:
    class Look(Callback):
        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            for p in pl_module.parameters():
                assert (p.grad is not None) == p.requires_grad

    FILTERED.fit(LayerDrop(0.5), GradualUnfreezing("3 steps"), Look())


def test_released_after_an_error() -> None:
    class Fail(Callback):
        def on_after_backward(self, *_: Any) -> None:
            raise RuntimeError("told so")

    module = Filtered()
    with pytest.raises(RuntimeError, match="told so"):
        FILTERED.fit(LayerDrop(0.5), Fail(), module=module)
    assert "forward" not in {key for child in module.modules() for key in vars(child)}


# ---- four kinds


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_trains_resumes_is_loaded_and_loses_blocks_afterwards(kind: Kind, tmp_path: Path) -> None:
    folder = pretrained(tmp_path / "base", kind, hf.AutoModelForSequenceClassification)
    rows = "\n".join(f"{'good' if i % 2 else 'bad'} film {i},{i % 2}" for i in range(16))
    (tmp_path / "rows.csv").write_text(f"text,label\n{rows}\n", encoding="utf-8")

    def fit(files: Path, *more: Callback, **options: Any) -> Any:
        data = ClassificationData(folder, str(tmp_path / "rows.csv"), str(tmp_path / "rows.csv"), batch_size=4)
        module = SequenceClassification(folder, num_labels=2, learning_rate=1e-3)
        quiet: dict[str, Any] = dict.fromkeys(
            ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
        )
        callbacks = [ExactResume("1 steps", dirpath=files), LayerDrop(0.5, seed=1), *more]
        trainer = Trainer(accelerator="cpu", max_epochs=2, callbacks=callbacks, **quiet)
        trainer.fit(module, datamodule=data, **options)
        return module, callbacks[1], data

    class StopAt(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 3:
                raise KeyboardInterrupt

    module, callback, data = fit(tmp_path / "whole")
    assert callback.report is not None
    assert sum(row["dropped"] for row in callback.report.rows) > 4
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(tmp_path / "killed", StopAt())
    resumed, _, _ = fit(tmp_path / "killed", ckpt_path=tmp_path / "killed" / "last.ckpt")
    assert identical(weights(resumed), weights(module))
    loaded = load_checkpoint(tmp_path / "whole" / "last.ckpt").eval()
    batch = next(iter(data.val_dataloader()))
    with torch.no_grad():
        assert torch.equal(loaded(batch), module.eval()(batch))
    remove_layers(loaded, "alternate", stack="all" if kind == "t5" else None)
    assert loaded(batch).shape == (len(batch["labels"]), 2)
    if kind == "bert":
        assert export_onnx(tmp_path / "whole" / "last.ckpt", tmp_path / "onnx").facts


# ---- refusals


@pytest.mark.parametrize(
    ("p", "message"),
    [
        (1.0, r"p=1.0 must be a probability in \[0, 1\)"),
        (-0.1, r"p=-0.1 must be a probability"),
        ({}, r"p=\{\} must name groups"),
        ({"block.0": 1.5}, r"p=\{'block.0': 1.5\} must name groups with a probability in \[0, 1\]"),
    ],
)
def test_refuses_bad_probabilities(p: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayerDrop(p)


@pytest.mark.parametrize("p", [{"head": 0.1}, {"block.0": 0.1, "blocks": 0.2}])
def test_refuses_what_is_no_block_or_has_a_probability(p: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must name blocks, and none twice"):
        FILTERED.fit(LayerDrop(p))


@pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")
def test_refuses_blocks_in_eval_mode() -> None:
    module = Filtered()
    module.encoder.eval()
    with pytest.raises(RuntimeError, match=r"3 blocks that train are in eval mode .*Call .train\(\)"):
        FILTERED.fit(LayerDrop(), module=module)


def test_refuses_a_shared_block() -> None:
    class Shared(Filtered):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = tiny("albert").train()

        def forward(self, tokens: Tensor) -> Tensor:
            return self.encoder(tokens).logits

    with pytest.raises(ValueError, match=r"runs block.0 at several depths with the same weights \(ALBERT\)"):
        FILTERED.fit(LayerDrop(), module=Shared())


def test_refuses_a_compiled_model() -> None:
    module = Filtered()
    module.encoder = torch.compile(module.encoder, backend="eager")
    with pytest.raises(ValueError, match="a compiled model runs one graph"):
        FILTERED.fit(LayerDrop(), module=module)


def test_refuses_a_model_that_calls_no_block() -> None:
    class Around(Filtered):
        def forward(self, tokens: Tensor) -> Tensor:
            hidden = self.encoder.tokens(tokens)
            for layer in self.encoder.layers:
                hidden = hidden + layer.linear2(layer.linear1(hidden))
            return self.classifier(hidden[:, 0])

    with pytest.raises(RuntimeError, match="Around called no block in a training batch"):
        FILTERED.fit(LayerDrop(layers=Layers(blocks="encoder.layers")), module=Around())


def test_refuses_a_model_of_which_no_block_can_be_dropped() -> None:
    class Attentive(Filtered):
        def __init__(self) -> None:
            super().__init__()
            self.encoder.layers = nn.ModuleList(Odd(lambda h: (h, h.mean())) for _ in range(3))
            for layer in self.encoder.layers:
                layer.layer = nn.Linear(8, 8)  # type: ignore[assignment]

        def forward(self, tokens: Tensor) -> Tensor:
            hidden = self.encoder.tokens(tokens)
            for layer in self.encoder.layers:
                hidden = layer(hidden)[0]
            return self.classifier(hidden[:, 0])

    with pytest.raises(RuntimeError, match=r"LayerDrop can drop none of the blocks: .*makes a tensor of shape \(\)"):
        FILTERED.fit(LayerDrop(0.95, layers=Layers(blocks="encoder.layers", head="classifier")), module=Attentive())
