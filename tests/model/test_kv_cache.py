"""The KV cache reaches every attention block under the running version's name, or the model raises."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Cache, DynamicCache, LlamaForCausalLM
from transformers.masking_utils import create_causal_mask
from transformers.models.glm4.modeling_glm4 import Glm4DecoderLayer
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer

from modeling_gated import GatedLlamaConfig
from modeling_gated.evaluation.position_loss import loss_by_position
from modeling_gated.kv_cache import cache_argument, take_cache
from modeling_gated.modeling_gated_llama import GatedLlamaAttention
from tests.helpers.cache_by_version import NAME, with_cache
from tests.helpers.gated_models import gated_model
from tests.helpers.processes import run_isolated
from tests.helpers.tiny_configs import tiny_llama


def attend(layer: Any, hidden_states: torch.Tensor, **keywords: Any) -> torch.Tensor:
    """Transformers' decoder layer, in which a test says how the attention block gets the cache."""
    residual = hidden_states
    hidden_states, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **keywords)
    hidden_states = residual + hidden_states
    return hidden_states + layer.mlp(layer.post_attention_layernorm(hidden_states))


def under_a_third_name(layer: Any, hidden_states: torch.Tensor, **keywords: Any) -> torch.Tensor:
    return attend(layer, hidden_states, kv_cache=keywords.pop(NAME, None), **keywords)


def not_at_all(layer: Any, hidden_states: torch.Tensor, **keywords: Any) -> torch.Tensor:
    keywords.pop(NAME, None)
    return attend(layer, hidden_states, **keywords)


def with_nothing_but_what_it_knows(layer: Any, hidden_states: torch.Tensor, **keywords: Any) -> torch.Tensor:
    known = {name: keywords[name] for name in ("attention_mask", "position_embeddings")}
    return attend(layer, hidden_states, **known)


def as_ever(layer: Any, hidden_states: torch.Tensor, **keywords: Any) -> torch.Tensor:
    return attend(layer, hidden_states, **keywords)


CHANGES = [under_a_third_name, not_at_all, with_nothing_but_what_it_knows]


@pytest.mark.fast
@pytest.mark.parametrize("sandwich", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_cache_that_does_not_arrive_is_an_error(
    change: Callable[..., torch.Tensor], sandwich: bool, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = gated_model(use_sandwich_norm=sandwich)
    monkeypatch.setattr(Glm4DecoderLayer if sandwich else LlamaDecoderLayer, "forward", change)
    with pytest.raises(RuntimeError, match="cached generation would be wrong with transformers"):
        model.generate(tokens[:, :9], max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert model(tokens, use_cache=False).logits.isfinite().all()


@pytest.mark.parametrize("change", CHANGES)
def test_a_cache_that_does_not_arrive_is_an_error_in_compiled_models_too(
    change: Callable[..., torch.Tensor], tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.compiler.reset()
    compiled = torch.compile(gated_model(), backend="eager", dynamic=True)
    monkeypatch.setattr(LlamaDecoderLayer, "forward", change)
    with torch.no_grad(), pytest.raises(RuntimeError, match="cached generation would be wrong with transformers"):
        compiled(tokens[:, :9], use_cache=True, **with_cache(DynamicCache(config=gated_model().config)))


@pytest.mark.fast
@pytest.mark.parametrize("use_cache", [None, False])
def test_the_name_of_another_version_is_an_error(use_cache: bool | None, tokens: torch.Tensor) -> None:
    """Before 5.24 `cache` would be ignored; since, Transformers takes `past_key_values` for it, until 5.40."""
    model, cache = gated_model(), DynamicCache(config=gated_model().config)
    with torch.no_grad():
        if NAME == "past_key_values":
            with pytest.raises(RuntimeError, match="must be passed as 'past_key_values', got 'cache'"):
                model(tokens[:, :9], cache=cache, use_cache=use_cache)
        else:
            model(tokens[:, :9], past_key_values=cache, use_cache=use_cache)
            assert cache.get_seq_length() == 9


def test_a_replaced_attention_block_needs_no_receipt(tokens: torch.Tensor) -> None:
    """Llama's, or one that gives nothing, as in knock-out experiments."""

    class Nothing(torch.nn.Module):
        def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
            return torch.zeros_like(hidden_states), None

    class Renamed(GatedLlamaAttention):
        signs_cache_receipts = False

        def forward(self, hidden_states: torch.Tensor, cache_receipt: Any = None, **kwargs: Any) -> Any:
            return super().forward(hidden_states, **kwargs)

    config = gated_model().config
    for block in (LlamaAttention(config, 1).eval(), Renamed(config, 1).eval(), Nothing()):
        model = gated_model()
        model.model.layers[1].self_attn = block
        output = model.generate(tokens[:, :9], max_new_tokens=4, do_sample=False, eos_token_id=None)
        with torch.no_grad():
            assert torch.equal(output[:, -1], model(output[:, :-1]).logits[:, -1].argmax(-1))


def test_the_replaced_layer_of_these_tests_is_right(tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = gated_model()
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = model.generate(tokens[:, :9], **options)
    monkeypatch.setattr(LlamaDecoderLayer, "forward", as_ever)
    assert torch.equal(model.generate(tokens[:, :9], **options), expected)


def test_an_attention_block_refuses_a_cache_that_it_does_not_know() -> None:
    cache = DynamicCache()
    keywords = {"kv_cache": cache, "use_cache": True}
    with pytest.raises(RuntimeError, match=r"must be passed as '\w+', got 'kv_cache'"):
        take_cache(keywords)
    keywords = {NAME: cache, "use_cache": True}
    assert take_cache(keywords) is cache
    assert keywords == {"use_cache": True}
    other = "past_key_values" if NAME == "cache" else "cache"
    for keywords in ({other: cache}, {NAME: cache, other: DynamicCache()}):
        with pytest.raises(RuntimeError, match=f"must be passed as '{NAME}', got '{other}'"):
            take_cache(keywords)
    # Continuous batching's, which is no Cache: before 5.24 it goes on to the attention function.
    paged = object()
    keywords = {"cache": paged}
    assert take_cache(keywords) is (paged if NAME == "cache" else None)
    assert keywords == ({} if NAME == "cache" else {"cache": paged})


def test_the_name_is_that_of_the_signature() -> None:
    def renamed(hidden_states: torch.Tensor, kv_cache: Cache | None = None) -> None: ...
    def old(past_key_values=None, use_cache: bool = True) -> None: ...
    def wrapper(*args: Any, **kwargs: Any) -> None: ...
    def other(hidden_states: torch.Tensor) -> None: ...

    assert cache_argument() == NAME
    assert NAME in inspect.signature(LlamaAttention.forward).parameters
    assert cache_argument(LlamaForCausalLM.forward) == cache_argument(create_causal_mask) == NAME
    assert cache_argument(gated_model().forward) == NAME
    assert [cache_argument(function) for function in (renamed, old, wrapper)] == ["kv_cache", "past_key_values", NAME]
    with pytest.raises(TypeError, match=r"other must take a KV cache, got \['hidden_states'\]"):
        cache_argument(other)


def test_losses_of_a_model_that_ignores_its_cache_are_refused(
    tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LlamaForCausalLM(tiny_llama())
    whole = loss_by_position(model, tokens[0], chunk_size=64)
    torch.testing.assert_close(loss_by_position(model, tokens[0], chunk_size=8), whole, rtol=0, atol=1e-5)
    monkeypatch.setattr(LlamaDecoderLayer, "forward", not_at_all)
    with pytest.raises(RuntimeError, match="must keep all 8 tokens in its KV cache, keeps 0"):
        loss_by_position(model, tokens[0], chunk_size=8)


def test_a_layer_without_a_cache_needs_no_receipt(tokens: torch.Tensor) -> None:
    """In training, and where somebody calls a layer or an attention block directly."""
    model = gated_model()
    attention, hidden = model.model.layers[0].self_attn, torch.randn(2, 5, 48)
    positions = model.model.rotary_emb(hidden, torch.arange(5)[None])
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        whole, _ = attention(hidden, positions, None)
        attention(hidden, positions, None, **with_cache(cache))
    assert cache.get_seq_length() == 5
    assert whole.shape == hidden.shape
    model.train()
    model.gradient_checkpointing_enable()
    model(tokens, labels=tokens).loss.backward()
    assert model.model.layers[0].self_attn.g_proj.weight.grad.abs().max() > 0


def test_names_that_a_config_does_not_need_may_be_gone(tmp_path: Path) -> None:
    """Arcee's MLP, GLM-4's block, tensor parallelism's styles; and Trainer's table, whose absence is one warning."""
    model = gated_model()
    model.save_pretrained(tmp_path / "model")
    finished = run_isolated("generate_without_names.py", tmp_path / "model")
    assert finished.returncode == 0, finished.stderr
    generated = model.generate(torch.arange(1, 9)[None], max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert finished.stdout.strip() == str(generated.tolist())
    assert finished.stderr.count("label_smoothing_factor must stay 0 with GatedLlama") == 1


def test_a_config_that_needs_them_has_them() -> None:
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

    gated_model(gate_head_shared=True)
    assert "shared_gate" in ALL_PARALLEL_STYLES
    model = gated_model(use_glu=False, use_sandwich_norm=True)
    assert model.model.layers[0].block_class is Glm4DecoderLayer
    assert not hasattr(model.model.layers[0].mlp, "gate_proj")
    assert GatedLlamaConfig(gate_head_shared=True).base_model_tp_plan["layers.*.self_attn.g_proj"] == "shared_gate"
