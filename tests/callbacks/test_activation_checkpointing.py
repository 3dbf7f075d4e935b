from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from lightning_ft.callbacks import ExactResume, FrozenPrefixCache, GradualUnfreezing, Mixout
from lightning_ft.callbacks.activation_checkpointing import ActivationCheckpointing
from lightning_ft.core.layers import Layers
from lightning_ft.functional.activation_checkpointing import CheckpointedBlocks, chosen_blocks
from lightning_ft.plugins.fp16 import FP16
from tests.callbacks.test_exact_resume import Kill, Killed, options
from tests.strangers import BATCH, FILTERED, LENGTH, STRANGERS, WIDTH, Filtered, Stranger, identical, outcome, weights
from tests.tiny import TINY, tiny

QUIET: dict[str, Any] = {"max_epochs": 1, "limit_val_batches": 0}
IDS = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(1))
IDS[:, -1] = 2  # T5 and BART read the end-of-sequence token
MASK = torch.ones_like(IDS)
each_stranger = pytest.mark.parametrize("stranger", STRANGERS, ids=lambda stranger: stranger.name)


def gradients(model: nn.Module, **options: Any) -> dict[str, Tensor]:
    torch.manual_seed(5)
    model.zero_grad()
    model(input_ids=IDS, attention_mask=MASK, labels=torch.tensor([0, 1]), **options).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@contextmanager
def checkpointed(model: nn.Module, offload: bool = False, blocks: str = "all") -> Iterator[None]:
    wrapped = CheckpointedBlocks([model.get_submodule(path) for path in chosen_blocks(model, blocks)], offload=offload)
    try:
        yield
    finally:
        wrapped.remove()


@contextmanager
def saved_bytes(counts: list[int], model: nn.Module) -> Iterator[None]:
    """Bytes of the storages that autograd keeps, but for the weights: what stands until backward."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, int] = {}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield
    counts.append(sum(seen.values()))


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("name", TINY)
def test_gradients_are_the_same_to_the_bit_with_dropout(name: str, offload: bool) -> None:
    model = tiny(name).train()
    keys = list(model.state_dict())
    # A cache of keys and values that nothing reads copies them, and so changes the last bit; see below.
    without = {"use_cache": False} if name in ("gpt2", "llama", "qwen3", "t5", "bart") else {}
    plain = gradients(model, **without)
    with checkpointed(model, offload):
        assert list(model.state_dict()) == keys
        again = gradients(model, **without)
    assert not any("forward" in vars(module) for module in model.modules())
    assert identical(plain, again)
    assert len(plain) > 10


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bart"])
def test_a_cache_of_keys_and_values_is_left_out(name: str) -> None:
    model = tiny(name).train()
    plain = gradients(model, use_cache=True)
    with checkpointed(model):
        for name, gradient in gradients(model, use_cache=True).items():
            torch.testing.assert_close(gradient, plain[name], rtol=1e-4, atol=1e-7)
        trained = model(input_ids=IDS, use_cache=True).past_key_values
        model.eval()
        with torch.no_grad():
            generated = model(input_ids=IDS, use_cache=True).past_key_values
    assert trained is None or trained.get_seq_length() == 0
    assert generated.get_seq_length() == IDS.shape[1]


def test_a_filled_cache_is_refused() -> None:
    import transformers as hf

    model = tiny("gpt2").train()
    cache = hf.DynamicCache()
    with torch.no_grad():
        model.transformer(IDS, past_key_values=cache, use_cache=True)
    with checkpointed(model), pytest.raises(ValueError, match=r"reads keys and values from a cache \(prefix tuning"):
        model(input_ids=IDS, past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_only_the_inputs_of_blocks_are_kept(name: str) -> None:
    """Counted: what is kept outside the blocks, and one hidden state a block, of which the first is kept anyway."""
    model, counts = tiny(name).train(), list[int]()
    hidden = IDS.numel() * 16 * 4

    def run(*blocks: str) -> int:
        with saved_bytes(counts, model):
            if not blocks:
                model(input_ids=IDS, labels=torch.tensor([0, 1]))
            for chosen in blocks:
                with checkpointed(model, blocks=chosen):
                    model(input_ids=IDS, labels=torch.tensor([0, 1]))
        return counts[-1]

    plain, one, all_of_them = run(), run("block.0"), run("all")
    block = plain - one + hidden
    outside = plain - 3 * block
    assert all_of_them <= outside + 4 * hidden
    assert plain > 4 * all_of_them


def test_offloaded_inputs_pass_through_main_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator: each input that needs a gradient is packed once, and unpacked for the second run."""
    import lightning_ft.functional.activation_checkpointing as file

    packed: list[int] = []
    fetched: list[int] = []
    pack, back = file._to_main_memory, file._back
    monkeypatch.setattr(file, "_to_main_memory", lambda tensor: packed.append(tensor.numel()) or pack(tensor))
    monkeypatch.setattr(file, "_back", lambda place: fetched.append(1) or back(place))
    model = tiny("bert").train()
    with checkpointed(model, offload=True):
        gradients(model)
    assert packed == [IDS.numel() * 16] * 3
    assert len(fetched) == 3
    with FakeTensorMode():  # an accelerator without one
        device, kept = pack(torch.ones(2, 3, dtype=torch.bfloat16, device="cuda"))
        assert (device.type, kept.device.type, kept.dtype, kept.shape) == ("cuda", "cpu", torch.bfloat16, (2, 3))
        assert back((device, kept)).device.type == "cuda"


# --- in the Trainer ------------------------------------------------------------------------------------------------


@each_stranger
@pytest.mark.parametrize("offload", [False, True])
def test_changes_no_bit_of_a_fit_and_leaves_nothing(stranger: Stranger, offload: bool) -> None:
    class Counted(ActivationCheckpointing):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            blocks = [pl_module.get_submodule(path) for path in chosen_blocks(pl_module)]
            assert all("forward" in vars(block) for block in blocks)
            assert list(pl_module.state_dict()) == keys

    module = stranger.module()
    keys = list(stranger.fit(max_epochs=0).lightning_module.state_dict())
    trainer = stranger.fit(Counted(offload=offload), module=module)
    assert identical(outcome(trainer), outcome(stranger.fit()))
    assert not any("forward" in vars(child) for child in module.modules())


def test_leaves_nothing_after_an_exception() -> None:
    module = FILTERED.module()
    with pytest.raises(Killed):
        FILTERED.fit(ActivationCheckpointing(), Kill("on_after_backward", 0, 2), module=module)
    assert not any("forward" in vars(child) for child in module.modules())


def test_keeps_less_in_a_fit() -> None:
    class Counting(Filtered):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            with saved_bytes(counts, self):
                return self.loss(batch)

    counts: list[int] = []
    hidden = BATCH * LENGTH * WIDTH * 4
    for callbacks in ([], [ActivationCheckpointing()], [ActivationCheckpointing("top:1")]):
        FILTERED.fit(*callbacks, module=Counting(), fast_dev_run=True)
    plain, everything, top = counts
    assert plain - top == pytest.approx((plain - everything) / 3, abs=hidden)
    assert everything < plain / 5


@pytest.mark.parametrize("make", [FrozenPrefixCache, lambda: Mixout(0.5), lambda: GradualUnfreezing("2 steps")])
@pytest.mark.parametrize("first", [False, True])
def test_combines_with(make: Callable[[], Callback], first: bool) -> None:
    """Bit by bit what the other callback does alone, in either order."""

    def fit(*more: Callback) -> Any:
        # The cache serves what is frozen.
        thaw = [GradualUnfreezing("4 steps")] if make is FrozenPrefixCache else []
        other = make()
        callbacks = [*more, other] if first else [other, *more]
        return outcome(FILTERED.fit(*thaw, *callbacks))

    assert identical(fit(ActivationCheckpointing()), fit())


def test_combines_with_fp16() -> None:
    """The second run is under the same autocast."""
    one, other = FP16(1024.0), FP16(1024.0)
    with_it = FILTERED.fit(ActivationCheckpointing(), plugins=[one])
    assert identical(outcome(with_it), outcome(FILTERED.fit(plugins=[other])))


def test_resumes_exactly(tmp_path: Path) -> None:
    def fit(folder: Path, *more: Callback, **resume: Any) -> Any:
        callbacks = [ExactResume("1 steps", dirpath=folder), ActivationCheckpointing(offload=True), *more]
        return outcome(FILTERED.fit(*callbacks, **options(FILTERED, folder), **resume))

    whole = fit(tmp_path / "whole")
    with pytest.raises(Killed):
        fit(tmp_path / "killed", Kill("on_after_backward", 1, 5))
    assert identical(fit(tmp_path / "killed", ckpt_path=tmp_path / "killed" / "last.ckpt"), whole)


def test_copies_of_the_module_run_their_own_blocks() -> None:
    model = tiny("bert").train()
    with checkpointed(model):
        twin = copy.deepcopy(model)
        gradients(twin)
    assert all(p.grad is None for p in model.parameters())
    assert any(p.grad is not None for p in twin.bert.encoder.layer[0].parameters())


@pytest.mark.slow
def test_a_compiled_model_is_compiled_anew() -> None:
    class Compiled(Filtered):
        def __init__(self) -> None:
            super().__init__(dropout=0)
            self.encoder = torch.compile(self.encoder, backend="aot_eager")

    plain = FILTERED.fit(module=Filtered(dropout=0), **QUIET)
    ours = FILTERED.fit(ActivationCheckpointing(), module=Compiled(), **QUIET)
    left, right = weights(plain.lightning_module), weights(ours.lightning_module)
    for (name, a), b in zip(left.items(), right.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


def test_says_how_many_blocks() -> None:
    callback = ActivationCheckpointing("top:2", offload=True)
    FILTERED.fit(callback, fast_dev_run=True)
    assert callback.report is not None
    assert callback.report.facts == {"blocks": 2, "inputs kept": "in main memory"}


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"blocks='head' must name blocks, block.0, block.1, block.2; it names head"):
        FILTERED.fit(ActivationCheckpointing("head"), fast_dev_run=True)
    with pytest.raises(ValueError, match="top:9"):
        FILTERED.fit(ActivationCheckpointing("top:9"), fast_dev_run=True)
    groups = Layers(groups={"block.0": "encoder", "head": "classifier"})
    with pytest.raises(ValueError, match=r"names parameters and no list of blocks"):
        FILTERED.fit(ActivationCheckpointing(layers=groups), fast_dev_run=True)
    late = next(stranger for stranger in STRANGERS if stranger.name == "late")
    module = late.module()
    module.configure_model()
    module.bert.bert.encoder.layer[0].gradient_checkpointing = True  # what transformers' own switch sets
    with pytest.raises(ValueError, match=r"bert.bert.encoder.layer.0 recomputes already, .* remove this callback"):
        late.fit(ActivationCheckpointing(), module=module, fast_dev_run=True)
