from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lightning_ft.functional.activation_checkpointing import chosen_blocks
from lightning_ft.functional.activation_fit import fit_activations
from lightning_ft.functional.batch_shapes import cut_batch
from lightning_ft.functional.live_memory import LiveMemory, state_tensors, storage_bytes
from lightning_ft.functional.memory import EIGHT_BIT, predict_memory
from lightning_ft.functional.memory_use import MemoryUse, _Run, predict_memory_use
from tests.strangers import FILTERED, STRANGERS, Filtered, identical, weights
from tests.tiny import BERT, GPT2, LLAMA, SEQ2SEQ, T5, tiny

KINDS: dict[str, Callable[[], Any]] = {
    "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**BERT)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**SEQ2SEQ, **T5)),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def batch(kind: str, rows: int = 4, length: int = 24) -> dict[str, Tensor]:
    ids = torch.randint(3, 50, (rows, length), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = 2
    mask = torch.ones_like(ids)
    mask[0, : length // 2] = 0  # padding, without which a mask is dropped and attention keeps less
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.zeros(rows).long() if kind == "bert" else ids}


def loss(model: Any, inputs: Any) -> Tensor:
    result: Tensor = model(**inputs).loss
    return result


def saved(model: nn.Module, inputs: Any) -> int:
    """The oracle: bytes that autograd keeps in a real forward pass, each storage once, weights left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = loss(model, inputs)
    total = sum(storage.nbytes() for storage in kept.values())
    del result
    return total


def bytes_of(tensors: Any) -> int:
    return sum({id(t): t.numel() * t.element_size() for t in tensors}.values())


@pytest.mark.parametrize(
    ("kind", "make", "frozen"),
    [
        *((kind, torch.optim.AdamW, kind in ("bert", "llama")) for kind in KINDS),
        ("gpt2", torch.optim.AdamW, True),
        ("gpt2", partial(torch.optim.AdamW, fused=True), False),
        ("gpt2", partial(torch.optim.SGD, lr=0.1), False),
        ("gpt2", partial(torch.optim.SGD, lr=0.1, momentum=0.9), True),
        ("gpt2", torch.optim.Adafactor, False),
    ],
)
def test_weights_gradients_and_optimiser_are_exact(kind: str, make: Any, frozen: bool) -> None:
    """Also where a part is frozen, and where weights are tied."""
    model = KINDS[kind]().train()
    if frozen:
        for path in chosen_blocks(model)[:2]:
            model.get_submodule(path).requires_grad_(False)
    before, flags = weights(model), [p.requires_grad for p in model.parameters()]
    use = predict_memory_use(model, batch(kind), optimizer=make, step=loss)
    assert identical(weights(model), before)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())

    optimizer = make([p for p in model.parameters() if p.requires_grad])
    loss(model, batch(kind)).backward()
    optimizer.step()
    assert use.parts["weights"] == storage_bytes((*model.parameters(), *model.buffers()))
    assert use.parts["weights"] == bytes_of((*model.parameters(), *model.buffers()))
    assert use.parts["gradients"] == bytes_of(p.grad for p in model.parameters() if p.grad is not None)
    assert use.parts["optimiser"] == bytes_of(state_tensors(optimizer.state))


@each_kind
@pytest.mark.parametrize(("rows", "length"), [(4, 24), (2, 9)])
def test_activations_are_those_that_autograd_keeps(kind: str, rows: int, length: int) -> None:
    """To 5 %: a copy without data keeps masks and flags that a value could have told to be needless."""
    model = KINDS[kind]().train()
    expected = saved(model, batch(kind, rows, length))
    use = predict_memory_use(model, batch(kind, rows, length), step=loss)
    assert use.parts["activations"] == pytest.approx(expected, rel=0.05)


@each_kind
def test_the_peak_is_that_of_a_real_step(kind: str) -> None:
    model, inputs = KINDS[kind]().train(), batch(kind)
    use = predict_memory_use(model, inputs, step=loss)
    optimizer = torch.optim.AdamW(model.parameters())
    with LiveMemory() as memory:
        memory.tag((*model.parameters(), *model.buffers()), "weights")
        for _ in range(2):
            memory.reset()
            result = loss(model, inputs)
            optimizer.zero_grad()
            result.backward()
            del result
            optimizer.step()
    assert use.total == pytest.approx(sum(memory.peak.values()), rel=0.05)


@pytest.mark.parametrize(
    ("kind", "precision"), [("bert", "16-mixed"), *((kind, "bf16-mixed") for kind in ("gpt2", "llama", "t5"))]
)
def test_activations_under_autocast(kind: str, precision: Any) -> None:
    model, inputs = KINDS[kind]().train(), batch(kind)
    dtype = torch.bfloat16 if precision == "bf16-mixed" else torch.float16
    with torch.autocast("cpu", dtype, cache_enabled=False):
        expected = saved(model, inputs)
    use = predict_memory_use(model, inputs, step=loss, precision=precision)
    assert use.parts["activations"] == pytest.approx(expected, rel=0.05)
    assert use.parts["gradients"] == predict_memory_use(model, inputs, step=loss).parts["gradients"]


def test_true_half_precision_halves_what_is_of_floats() -> None:
    model, inputs = KINDS["gpt2"]().train(), batch("gpt2")
    use, half = (predict_memory_use(model, inputs, step=loss, precision=p) for p in ("32-true", "bf16-true"))
    assert 2 * half.parts["gradients"] == use.parts["gradients"]
    assert half.parts["activations"] == pytest.approx(saved(model.bfloat16(), inputs), rel=0.05)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_checkpointed_blocks_are_predicted(kind: str) -> None:
    from tests.callbacks.test_activation_checkpointing import checkpointed

    model, inputs = KINDS[kind]().train(), batch(kind)
    use = predict_memory_use(model, inputs, step=loss, checkpointed=chosen_blocks(model))
    assert not any("forward" in vars(module) for module in model.modules())
    with checkpointed(model):
        assert use.parts["activations"] < 2.0 * saved(model, inputs)
    assert use.total < 0.8 * predict_memory_use(model, inputs, step=loss).total


@each_kind
@pytest.mark.parametrize(("rows", "length"), [(1, 16), (8, 30), (3, 5)])
def test_the_fit_to_small_passes_extrapolates_in_rows_and_tokens(kind: str, rows: int, length: int) -> None:
    model, whole = KINDS[kind]().train(), batch(kind, rows, length)
    whole["attention_mask"][:] = 1
    own = (*model.parameters(), *model.buffers())
    assert fit_activations(lambda part: loss(model, part), whole, own) == pytest.approx(saved(model, whole), rel=0.05)


@pytest.mark.parametrize("name", ["deberta", "t5", "bart"])
def test_a_step_that_needs_data_is_fitted(name: str) -> None:
    """Their classifiers look for the end of each text, or for what is masked."""
    model = tiny(name).train()
    inputs = {**batch("gpt2"), "labels": torch.zeros(4).long()}
    use = predict_memory_use(model, inputs, step=loss)
    assert use.fit
    assert use.parts["activations"] == pytest.approx(saved(model, inputs), rel=0.1)
    assert use.parts["gradients"] == bytes_of(p for p in model.parameters() if p.requires_grad)
    assert predict_memory(model, inputs, step=loss, switches=False).facts["activations"].startswith("extrapolated")


def test_both_ways_agree() -> None:
    model, inputs = KINDS["bert"]().train(), batch("bert")
    run = _Run(model, None, "32-true", None, loss, ())
    assert run.fitted(inputs).total == pytest.approx(run.without_data(inputs).total, rel=0.05)


def test_partial_training_and_shared_weights() -> None:
    """As of LoRA: gradients and states are those of the small matrices; a matrix used twice is counted once."""

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(64, 64, bias=False).requires_grad_(False)
            self.down, self.up = nn.Linear(64, 4, bias=False), nn.Linear(4, 64, bias=False)
            self.tied = self.base

        def forward(self, x: Tensor) -> Tensor:
            return self.tied(torch.relu(self.base(x) + self.up(self.down(x))))

    use = predict_memory_use(Adapted(), torch.ones(8, 64), step=lambda net, x: net(x).square().mean())
    assert use.parts["weights"] == 4 * (64 * 64 + 2 * 64 * 4)
    assert use.parts["gradients"] == 4 * 2 * 64 * 4
    assert use.parts["optimiser"] == 2 * 4 * 2 * 64 * 4 + 2 * 4


@pytest.mark.parametrize("stranger", [s for s in STRANGERS if s.name != "manual"], ids=lambda stranger: stranger.name)
def test_a_lightning_module_is_not_touched(stranger: Any) -> None:
    trainer = stranger.fit(max_epochs=0)
    module = trainer.lightning_module
    before, state = weights(module), torch.get_rng_state()
    report = predict_memory(module, [torch.zeros(4, 5).long(), torch.zeros(4).long()])
    assert identical(weights(module), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert module.trainer is trainer
    assert report.facts["peak bytes"] == sum(row["at the peak"] for row in report.rows)
    assert "ActivationCheckpointing" in report.facts["with"]


def test_a_module_that_logs_reads_its_loss_and_keeps_a_metric_is_not_touched() -> None:
    class Logs(Filtered):
        def __init__(self) -> None:
            super().__init__()
            self.seen = torch.zeros(())

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            value = self.loss(batch)
            self.log("loss", value, prog_bar=True)
            self.seen += value.detach()
            if value.item() > 100 or (batch[0] == 99).all():
                raise AssertionError
            return {"loss": value, "step": self.trainer.global_step}

    module = Logs()
    module.trainer = FILTERED.trainer()
    predict_memory_use(module, [torch.zeros(4, 5).long(), torch.zeros(4).long()])
    assert type(module.seen) is Tensor
    assert module.seen == 0


def test_tensors_that_are_no_weights_are_copied_without_data() -> None:
    """As W⁰ of a callback, which a hook holds: a second copy of it might not fit."""
    net = nn.Linear(2, 2)
    net.hold = [torch.ones(3)]  # type: ignore[assignment]
    kinds: list[str] = []

    def step(net: Any, x: Tensor) -> Tensor:
        kinds.append(type(net.hold[0]).__name__)
        return (net(x) * net.hold[0].sum()).sum()

    predict_memory_use(net, torch.ones(1, 2), step=step)
    assert kinds == ["FakeTensor"]
    assert type(net.hold[0]) is Tensor


def test_switches_are_predictions_of_their_own() -> None:
    model, inputs = KINDS["bert"]().train(), batch("bert")
    report = predict_memory(model, inputs, step=loss)
    switches = {name: row["peak GiB"] * 2**30 for name, row in report.facts["with"].items()}
    use = partial(predict_memory_use, model, step=loss)
    now: MemoryUse = use(inputs)
    assert report.facts["peak bytes"] == now.total
    assert switches == {
        "ActivationCheckpointing": use(inputs, checkpointed=chosen_blocks(model)).total,
        "half the batch, accumulated twice": use(cut_batch(inputs, 2)).total,
        'precision="bf16-mixed"': use(inputs, precision="bf16-mixed").total,
        "an 8-bit optimiser": now.total - round((1 - EIGHT_BIT) * now.peak["optimiser"]),
    }
    assert list(switches.values()) == sorted(switches.values())
    assert report.facts["biggest part"] == "activations"


def test_an_existing_optimiser_counts_with_its_states_and_is_not_stepped() -> None:
    model, inputs = KINDS["gpt2"]().train(), batch("gpt2")
    optimizer = torch.optim.AdamW(model.parameters())
    loss(model, inputs).backward()
    optimizer.step()
    states = copy.deepcopy(optimizer.state_dict())
    use = predict_memory_use(model, inputs, optimizer=optimizer, step=loss)
    assert use.parts["optimiser"] == bytes_of(state_tensors(optimizer.state))
    assert identical(optimizer.state_dict(), states)


def test_shapes_are_enough() -> None:
    model = KINDS["gpt2"]().train()
    shapes = {"input_ids": (4, 24), "labels": (4, 24)}
    use = predict_memory_use(model, shapes, step=loss)
    zeros = {name: torch.zeros(size).long() for name, size in shapes.items()}
    assert use == predict_memory_use(model, zeros, step=loss)
    assert "half the batch, accumulated twice" in predict_memory(model, shapes, step=loss).facts["with"]


def test_refusals() -> None:
    net = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"step= is needed: Linear optimises by hand, or has no training_step"):
        predict_memory_use(net, torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"precision='8' must be one of 32-true, bf16-mixed"):
        predict_memory_use(net, torch.ones(1, 2), precision="8", step=loss)  # type: ignore[arg-type]
    message = r"Linear could not take a step on tensors without data \(ValueError: the step must give a loss.* NoneType"
    with pytest.raises(ValueError, match=message):
        predict_memory_use(net, torch.ones(1, 2), step=lambda net, x: None)
    net.lock = __import__("threading").Lock()  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"Linear cannot be copied, as a prediction needs it \(TypeError"):
        predict_memory_use(net, torch.ones(1, 2), step=lambda net, x: net(x).sum())
