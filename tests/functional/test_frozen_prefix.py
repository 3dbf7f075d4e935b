from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from lightning_ft.core.layer_groups import LayerGroups
from lightning_ft.functional.frozen_prefix import FrozenPrefix
from lightning_ft.functional.prefix_cache import PrefixCache, all_rows
from lightning_ft.functional.prefix_layout import PrefixLayout, blocks_of, frozen_depth, parameters_of
from lightning_ft.functional.prefix_rows import Unsuited, arguments, by_length, read_inputs, rows_of, signature_of
from tests.tiny import BERT, LLAMA, TINY, classifier

OPT = {"num_attention_heads": 2, "ffn_dim": 32, "max_position_embeddings": 64, "word_embed_proj_dim": 8}
MORE: dict[str, Callable[[], nn.Module]] = {
    "gemma3": lambda: hf.AutoModelForSequenceClassification.from_config(hf.Gemma3TextConfig(**LLAMA, sliding_window=8)),
    "opt": lambda: classifier(
        hf.OPTConfig(vocab_size=50, hidden_size=16, num_hidden_layers=3, pad_token_id=0, bos_token_id=1, **OPT)
    ),
    "mpnet": lambda: classifier(hf.MPNetConfig(**{**BERT, "max_position_embeddings": 40, "pad_token_id": 1})),
}
MODELS = {**TINY, **MORE}
UNSUITED = {"albert": "once each", "xlnet": "one hidden state", "t5": "children of one list", "bart": "one list"}
SUITED = [name for name in MODELS if name not in UNSUITED]
DECODERS = ["gpt2", "llama", "qwen3", "gemma3", "opt"]
ROWS = 12


def batches(side: str, seed: int, *, types: bool = False, size: int = 4, pad: int = 0) -> list[dict[str, Tensor]]:
    """The same rows in other batches, and so in other widths, for each seed; on the left in one fixed width."""
    made = torch.Generator().manual_seed(7)
    lengths = torch.randint(2, 12, (ROWS,), generator=made).tolist()
    rows = [torch.randint(3, 50, (length,), generator=made) for length in lengths]
    kinds = [torch.randint(0, 2, (length,), generator=made) for length in lengths]
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(seed)).tolist()
    result = []
    for i in range(0, ROWS, size):
        members = order[i : i + size]
        width = 13 if side == "left" else max(lengths[m] for m in members)
        batch = {name: torch.zeros(len(members), width, dtype=torch.long) for name in ("input_ids", "attention_mask")}
        batch["input_ids"] += pad
        batch |= {"token_type_ids": torch.zeros_like(batch["input_ids"])} if types else {}
        for j, m in enumerate(members):
            span = slice(width - lengths[m], width) if side == "left" else slice(0, lengths[m])
            batch["input_ids"][j, span], batch["attention_mask"][j, span] = rows[m], 1
            if types:
                batch["token_type_ids"][j, span] = kinds[m]
        result.append(batch)
    return result


def freeze(model: nn.Module, depth: int, *, tail: bool = False) -> LayerGroups:
    groups = LayerGroups.of(model)
    names = ["embeddings", *blocks_of(groups)[:depth], *(["tail"] if tail and "tail" in groups else [])]
    for name in names:
        for parameter in groups.parameters(name):
            parameter.requires_grad_(False)
    return groups


def owner_call(model: nn.Module, layout: PrefixLayout, batch: dict[str, Any]) -> dict[str, Any]:
    caught: dict[str, Any] = {}

    def catch(module: nn.Module, args: Any, kwargs: Any) -> None:
        caught.update(arguments(signature_of(module), args, kwargs))

    handle = layout.owner.register_forward_pre_hook(catch, with_kwargs=True)
    model(**batch)
    handle.remove()
    return caught


def cache_of(
    model: nn.Module, groups: LayerGroups, batch: dict[str, Any], *, dtype: torch.dtype = torch.float32
) -> PrefixCache:
    """An empty one, made for the frozen part from one call of the model."""
    layout, depth = PrefixLayout.of(model, groups), frozen_depth(groups)
    inputs = read_inputs(owner_call(model, layout, batch))
    prefix = FrozenPrefix(layout, depth, inputs, [(model, batch)], dtype=dtype)
    return PrefixCache(prefix, parameters_of(groups, depth), 10**6)


@contextmanager
def cached(cache: PrefixCache) -> Iterator[list[tuple[int, int]]]:
    """The model answers from the cache."""
    prefix, counts = cache.prefix, []
    owner, busy = prefix.layout.owner, []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        if not busy:
            busy.append(1)
            counts.append(cache.answer(read_inputs(arguments(signature_of(module), args, kwargs))))
            busy.clear()

    handles = [
        owner.register_forward_pre_hook(enter, with_kwargs=True),
        owner.register_forward_hook(lambda *_: None if busy else prefix.end(), always_call=True),
    ]
    if prefix.entry is not None:
        handles.append(prefix.entry.register_forward_pre_hook(prefix.on_entry, with_kwargs=True))
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def step(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and the gradients of what trains, with live dropout from one seed."""
    torch.manual_seed(3)
    model.zero_grad()
    logits = model(**batch, labels=torch.arange(len(batch["input_ids"])) % 2).logits
    logits.square().sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def prefix_in_eval(model: nn.Module, depth: int) -> None:
    layout = PrefixLayout.of(model, LayerGroups.of(model))
    model.train()
    layout.owner.eval()
    for block in layout.blocks[depth:]:
        block.train()


def fill_and_compare(model: nn.Module, groups: LayerGroups, side: str, types: bool, pad: int = 0) -> PrefixCache:
    cache = cache_of(model, groups, batches(side, 0, types=types, pad=pad)[0])
    layout = cache.prefix.layout
    columns = [read_inputs(owner_call(model, layout, b)).columns for b in batches(side, 1, types=types, pad=pad)]
    cache.fill(all_rows(columns))
    for batch in batches(side, 2, types=types, size=3, pad=pad):
        wanted = step(model, batch)
        with cached(cache) as counts:
            got = step(model, batch)
        assert counts == [(3, 3)]
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
        assert wanted[1]
    return cache


@pytest.mark.parametrize(
    ("name", "depth", "side"),
    [
        *((name, 2 if name == "deberta-full" else 1, "right") for name in SUITED),
        *((name, 3, "right") for name in SUITED),
        *((name, depth, "left") for name in DECODERS for depth in (1, 3)),
    ],
)
def test_logits_and_gradients_are_those_of_the_whole_model(name: str, depth: int, side: str) -> None:
    model = MODELS[name]()
    groups = freeze(model, depth)
    prefix_in_eval(model, depth)
    cache = fill_and_compare(model, groups, side, name in ("bert", "deberta", "electra"), pad=int(name == "mpnet"))
    lengths = [row.length for b in batches(side, 0) for row in rows_of(b)]
    assert cache.prefix.pooled == (depth == 3 and "tail" not in groups)
    assert cache.nbytes == (ROWS if cache.prefix.pooled else sum(lengths)) * 16 * 4  # no padding is kept


@pytest.mark.parametrize("name", SUITED)
def test_one_vector_a_row_where_only_the_head_trains(name: str) -> None:
    model = MODELS[name]()
    groups = freeze(model, 3, tail=True)
    prefix_in_eval(model, 3)
    cache = fill_and_compare(model, groups, "right", False, pad=int(name == "mpnet"))
    assert cache.prefix.pooled == (name not in DECODERS)
    if cache.prefix.pooled:
        assert cache.nbytes == ROWS * 16 * 4


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_model_that_reads_a_padded_position_is_left_alone(name: str) -> None:
    """An encoder's first position is padding in a batch that is padded on the left."""
    model = MODELS[name]()
    groups = freeze(model, 2)
    with pytest.raises(Unsuited, match="gives something else"):
        cache_of(model, groups, batches("left", 0)[0])


@pytest.mark.parametrize("name", UNSUITED)
def test_other_models_are_left_alone_and_say_why(name: str) -> None:
    model = MODELS[name]()
    groups = freeze(model, 1)
    with pytest.raises(Unsuited, match=UNSUITED[name]):
        cache_of(model, groups, batches("right", 0)[0])


def test_what_uses_a_skipped_value_is_found_out() -> None:
    """DeBERTa's convolution takes the embeddings; hidden states of the prefix are asked for."""
    model = MODELS["deberta-full"]()
    with pytest.raises(Unsuited, match=r"without its prefix DebertaV2Model gives something else \(by nan\)"):
        cache_of(model, freeze(model, 1), batches("right", 0)[0])
    model = MODELS["bert"]()
    with pytest.raises(Unsuited, match="BertModel gives something else"):
        cache_of(model, freeze(model, 1), {**batches("right", 0)[0], "output_hidden_states": True})


def test_prefix_runs_in_eval_mode_and_the_rest_in_its_own() -> None:
    model = MODELS["bert"]()
    groups = freeze(model, 2)
    prefix_in_eval(model, 2)
    batch = batches("right", 0)[0]
    wanted = step(model, batch)
    model.train()  # dropout everywhere
    modes = [m.training for m in model.modules()]
    cache = cache_of(model, groups, batch)
    cache.fill(rows_of(batch))
    with cached(cache):
        got = step(model, batch)
    assert [m.training for m in model.modules()] == modes
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


def test_filling_leaves_random_numbers_weights_and_modules_alone() -> None:
    model = MODELS["bert"]().train()
    groups = freeze(model, 2)
    batch, state = batches("right", 0)[0], torch.get_rng_state()
    before = copy.deepcopy(model.state_dict())
    cache = cache_of(model, groups, batch)
    torch.set_rng_state(state)
    cache.fill(rows_of(batch))
    with cached(cache):
        model(**batch)
    torch.manual_seed(0)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
    assert not any("forward" in vars(m) for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_replay_is_undone_when_the_model_raises() -> None:
    model = MODELS["bert"]().train()
    groups = freeze(model, 2)
    batch = batches("right", 0)[0]
    cache = cache_of(model, groups, batch)
    cache.fill(rows_of(batch))

    def fail(*_: Any) -> None:
        raise ArithmeticError

    handle = cache.prefix.layout.blocks[2].register_forward_pre_hook(fail)
    with cached(cache), pytest.raises(ArithmeticError):
        model(**batch)
    handle.remove()
    assert not any("forward" in vars(m) for m in model.modules())


def test_key_is_the_content_up_to_the_last_real_token() -> None:
    def keys(**columns: list[list[int]]) -> list[bytes]:
        return [row.key for row in rows_of({name: torch.tensor(rows) for name, rows in columns.items()})]

    ids, mask = [[5, 6, 7], [5, 6, 9]], [[1, 1, 0], [1, 1, 0]]
    (one, other) = keys(input_ids=ids, attention_mask=mask)
    assert one == other  # what padding holds is no matter
    assert [one] == keys(input_ids=[[5, 6]], attention_mask=[[1, 1]])
    assert one not in keys(input_ids=[[5, 6, 7]], attention_mask=[[1, 1, 1]])
    assert one not in keys(input_ids=[[0, 5, 6]], attention_mask=[[0, 1, 1]])  # absolute positions differ
    assert one not in keys(input_ids=[[5, 6, 7]], attention_mask=[[0, 1, 0]])
    assert one not in keys(input_ids=[[5, 6]])
    types = {"attention_mask": [[1, 1]], "input_ids": [[5, 6]]}
    assert keys(**types, token_type_ids=[[0, 0]]) != keys(**types, token_type_ids=[[0, 1]])
    assert keys(**types, token_type_ids=[[0, 1]]) != keys(**types, position_ids=[[0, 1]])
    assert keys(**types, position_ids=[[0, 1]]) != keys(**types, position_ids=[[2, 3]])
    whole = keys(input_ids=[[5, 6, 0], [5, 6, 1]])
    assert whole[0] != whole[1]  # without a mask all counts
    assert keys(input_ids=[[5, 6]], attention_mask=[[0, 0]])  # nothing real: the whole row
    narrow = rows_of({"input_ids": torch.tensor([[5, 6]], dtype=torch.int32)})[0].key
    assert narrow == keys(input_ids=[[5, 6]])[0]


def test_same_ids_with_other_token_types_are_other_rows() -> None:
    model = MODELS["bert"]()
    groups = freeze(model, 2)
    prefix_in_eval(model, 2)
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    batch["token_type_ids"][1, 2:] = 1
    cache = cache_of(model, groups, batch)
    cache.fill(rows_of(batch))
    with cached(cache):
        got = step(model, batch)
    torch.testing.assert_close(got, step(model, batch), rtol=0, atol=1e-5)
    assert cache.rows == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"attention_mask": torch.ones(4, 1, 3, 3)}, "'attention_mask' has the shape"),
        ({"inputs_embeds": torch.ones(4, 3, 16)}, "'inputs_embeds' has the shape"),
        ({"past_key_values": object()}, "'past_key_values' is a object"),
        ({"position_ids": torch.ones(2, 3)}, "'position_ids' has the shape"),
        ({"attention_mask": torch.ones(4, 3, requires_grad=True)}, "'attention_mask' requires gradients"),
        ({"input_ids": None, "inputs_embeds": torch.ones(4, 3, 16)}, "no token ids"),
    ],
)
def test_calls_that_go_through_uncached(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unsuited, match=reason):
        read_inputs({"input_ids": torch.ones(4, 3, dtype=torch.long), **change})


def test_calls_of_another_form_are_proved_or_refused() -> None:
    model = MODELS["bert"]()
    groups = freeze(model, 2)
    prefix_in_eval(model, 2)
    batch = batches("right", 0)[0]
    cache = cache_of(model, groups, batch)
    cache.fill(rows_of(batch))
    wanted = model(**batch, return_dict=True).logits
    with cached(cache), pytest.raises(Unsuited, match="gives something else"):
        model(**batch, output_hidden_states=True)
    with cached(cache), pytest.raises(Unsuited, match="before with"):
        model(**batch, token_type_ids=torch.zeros_like(batch["input_ids"]))
    with cached(cache) as counts, torch.autocast("cpu", torch.bfloat16):
        model(**batch)
    assert counts == [(4, 4)]
    assert wanted.shape == (4, 2)


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 5e-2), (torch.float16, 5e-3)])
def test_half_precision_halves_the_size(dtype: torch.dtype, error: float) -> None:
    model = MODELS["bert"]()
    groups = freeze(model, 2)
    prefix_in_eval(model, 2)
    batch = batches("right", 0)[0]
    full, half = (cache_of(model, groups, batch, dtype=d) for d in (torch.float32, dtype))
    for cache in (full, half):
        cache.fill(rows_of(batch))
    with cached(half):
        got = step(model, batch)[0]
    assert half.nbytes * 2 == full.nbytes
    torch.testing.assert_close(got, step(model, batch)[0], rtol=0, atol=error)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_keeps_its_gradients(reentrant: bool) -> None:
    model = MODELS["bert"]()
    groups = freeze(model, 2)
    prefix_in_eval(model, 2)
    batch = batches("right", 0)[0]
    wanted = step(model, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the new name is not in all versions
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    cache = cache_of(model, groups, batch)
    cache.fill(rows_of(batch))
    with cached(cache):
        got = step(model, batch)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


def test_fill_does_not_depend_on_the_order_of_rows() -> None:
    model = MODELS["bert"]()
    groups = freeze(model, 2)
    stores = []
    for seed in (1, 2):
        cache = cache_of(model, groups, batches("right", 0)[0])
        cache.fill(all_rows(batches("right", seed)))
        assert cache._store is not None
        keys = sorted(row.key for b in batches("right", 0) for row in rows_of(b))
        stores.append(cache._store.gather(cache._store.find(keys), [0] * ROWS, 12))
    assert torch.equal(*stores)
    assert cache.rows == ROWS


@pytest.mark.parametrize("limits", [{"tokens": 24}, {"most": 5}])
def test_batches_of_a_fill_do_not_depend_on_the_order_of_rows(limits: dict[str, int]) -> None:
    made = [
        [[row.key for row in batch] for batch in by_length(list(all_rows(batches("right", seed))), **limits)]
        for seed in (1, 2)
    ]
    assert made[0] == made[1]
    assert len(made[0]) > 2
