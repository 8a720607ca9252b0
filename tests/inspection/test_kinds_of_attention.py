"""Meters on every kind of attention, mask and cache; what cannot be known is refused."""

import numpy as np
import pytest
import torch
import transformers
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    Gemma3Config,
    MambaConfig,
    StaticCache,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from modeling_gated.inspection import (
    AttentionEntropy,
    EffectiveRank,
    FirstTokenAttention,
    GateScores,
    InspectionError,
    KeyValueNorms,
    MassiveActivations,
    SinkRate,
    UnknownAttention,
    inspecting,
    masked_first_token,
)
from tests.helpers.cache_by_version import cache_of, with_cache
from tests.helpers.gated_models import gated_model
from tests.helpers.inspected_models import (
    INPUTS,
    TOKENS,
    eager_attention,
    inputs_of,
    inspected_model,
    mean_over_queries,
)


@pytest.mark.parametrize("kind", ["plain", "padded left"])
def test_a_mask_of_four_dimensions_is_read(kind: str) -> None:
    """Bool or additive, in the place of a mask of two."""
    model, inputs = inspected_model("llama, grouped queries"), inputs_of(kind)
    real = inputs.get("attention_mask", torch.ones(2, TOKENS)).bool()
    visible = (real[:, None, None] & torch.ones(TOKENS, TOKENS).tril().bool()).clone()
    expected = FirstTokenAttention()
    with torch.no_grad(), inspecting(model, expected):
        model(**inputs)
    additive = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    for mask in (visible, additive, additive.masked_fill(~visible, -torch.inf)):
        actual = FirstTokenAttention()
        with torch.no_grad(), inspecting(model, actual):
            if kind == "plain":
                model(inputs["input_ids"], attention_mask=mask)
                torch.testing.assert_close(actual.result(), expected.result(), rtol=0, atol=1e-6)
            else:  # which token is padding is not known of such a mask
                with pytest.raises(UnknownAttention, match="attention_mask: of one that is given whole"):
                    model(inputs["input_ids"], attention_mask=mask)


def test_chunks_with_a_cache_are_one_pass() -> None:
    model, inputs = inspected_model("qwen2, upper layers sliding"), inputs_of("plain")
    whole, chunked = (FirstTokenAttention(), AttentionEntropy()), (FirstTokenAttention(), AttentionEntropy())
    with torch.no_grad():
        with inspecting(model, *whole):
            model(**inputs)
        with inspecting(model, *chunked):
            cache = None
            for chunk in inputs["input_ids"].split(9, dim=1):
                cache = cache_of(model(chunk, use_cache=True, **with_cache(cache)))
    for one, other in zip(whole, chunked, strict=True):
        torch.testing.assert_close(other.result(), one.result(), rtol=0, atol=1e-6)
    rate = SinkRate()
    with torch.no_grad(), inspecting(model, rate):
        cache = cache_of(model(inputs["input_ids"][:, :20], use_cache=True))
        with pytest.raises(InspectionError, match="needs whole sequences, not one from token 20 on"):
            model(inputs["input_ids"][:, 20:], **with_cache(cache))


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_every_implementation_is_inspected_and_left_as_it_was(implementation: str) -> None:
    model, inputs = gated_model("sliding upper layers"), inputs_of("padded left")
    model.set_attn_implementation(implementation)
    meter = FirstTokenAttention()
    # Flex attention uncompiled, as in test_interventions.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        plain = model(**inputs).logits
        with inspecting(model, meter):
            assert torch.equal(model(**inputs).logits, plain)
    assert model.config._attn_implementation == implementation
    for layer, attention in enumerate(eager_attention(model, inputs)):
        sink = mean_over_queries(attention, "padded left", lambda own: own[:, :, 0])
        np.testing.assert_allclose(meter.result()[layer], sink, rtol=0, atol=1e-5)


def test_packed_sequences_are_one_where_the_model_takes_them_for_one() -> None:
    """With a cache Transformers does not look at positions that restart."""
    model, inputs = inspected_model("llama, grouped queries"), inputs_of("packed") | {"use_cache": True}
    meter = FirstTokenAttention()
    with torch.no_grad(), inspecting(model, meter):
        model(**inputs)
    for layer, attention in enumerate(eager_attention(model, inputs)):
        np.testing.assert_allclose(meter.result()[layer], attention[:, :, 1:, 0].mean((0, 2)), rtol=0, atol=1e-5)


def test_arguments_that_may_change_scores_are_refused() -> None:
    model, inputs = inspected_model("llama, grouped queries"), inputs_of("plain")
    with torch.no_grad(), inspecting(model, FirstTokenAttention()):
        with pytest.raises(UnknownAttention, match="has an argument that is not known here, temperature"):
            model(**inputs, temperature=2.0)
        model(**inputs, temperature=None, num_items_in_batch=torch.tensor(3))


def test_attention_that_cannot_be_seen_is_an_error() -> None:
    mamba = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2))
    with (
        torch.no_grad(),
        pytest.raises(UnknownAttention, match="MambaForCausalLM: no attention went through"),
        inspecting(mamba, FirstTokenAttention()),
    ):
        mamba(torch.arange(8)[None])
    model = inspected_model("llama, grouped queries")
    AttentionInterface.register("of my own", lambda *args, **kwargs: None)
    model.config._attn_implementation = "of my own"
    with (
        pytest.raises(UnknownAttention, match="'of my own': has no mask function"),
        inspecting(model, FirstTokenAttention()),
    ):
        pass
    with torch.no_grad(), inspecting(mamba, activations := MassiveActivations()):
        mamba(torch.arange(8)[None])
    assert activations.result().mean_maximum > 0


@pytest.mark.parametrize("family", ["falcon", "bloom"])
def test_a_familys_own_attention_is_left_alone(family: str) -> None:
    """Falcon's depends on the name of its implementation, so that an intervention by another name would change it."""
    config = CONFIG_MAPPING[family](vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    model = AutoModelForCausalLM.from_config(config)
    for context in (inspecting(model, FirstTokenAttention()), masked_first_token(model)):
        with pytest.raises(UnknownAttention, match="its attention does not go through"), context:
            pass
    assert model.config._attn_implementation == "sdpa" if family == "falcon" else "eager"


def test_everything_is_float32_under_autocast() -> None:
    """As Trainer computes with bf16=True: meters are those of the queries and keys that there are."""
    model, inputs = gated_model(), inputs_of("plain")
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, *others, **more):
        seen.append((query.double(), key.double()))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, *others, **more)

    AttentionInterface.register("kept", keep)
    AttentionMaskInterface.register("kept", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation("kept")
    meters = FirstTokenAttention(), AttentionEntropy(), EffectiveRank(), GateScores()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), inspecting(model, *meters):
        plain = model(**inputs).logits
    assert plain.dtype == torch.bfloat16
    for layer, (query, key) in enumerate(seen):
        scores = query @ key.repeat_interleave(3, dim=1).transpose(2, 3) / 8**0.5
        hidden = torch.ones(TOKENS, TOKENS).triu(1).bool()
        probabilities = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        expected = probabilities[:, :, 1:, 0].mean((0, 2))
        torch.testing.assert_close(meters[0].result()[layer], expected, rtol=0, atol=1e-6)


def test_scores_that_sdpa_leaves_alone_are_refused() -> None:
    """It takes learned sinks and does not heed them: what is computed is not what the model's config says."""
    model, inputs = inspected_model("llama, grouped queries"), inputs_of("plain")
    with (
        torch.no_grad(),
        inspecting(model, FirstTokenAttention()),
        pytest.raises(UnknownAttention, match="layer 0: sdpa ignores its s_aux"),
    ):
        model(**inputs, s_aux=torch.ones(9))


def test_static_caches() -> None:
    """Their empty slots are no keys; by hand and in generation, which makes its masks before the forward pass."""
    model, inputs = gated_model("headwise"), inputs_of("plain")
    ids = inputs["input_ids"]
    expected = FirstTokenAttention(), KeyValueNorms()
    actual = FirstTokenAttention(), KeyValueNorms()
    with torch.no_grad():
        with inspecting(model, *expected):
            model(ids)
        with inspecting(model, *actual):
            cache = StaticCache(model.config, max_cache_len=64)
            model(ids[:, :30], **with_cache(cache))
            model(ids[:, 30:], **with_cache(cache))
    torch.testing.assert_close(actual[0].result(), expected[0].result(), rtol=0, atol=1e-6)
    for field in ("first_key", "other_keys", "first_value", "other_values"):
        one, other = (getattr(meters[1].result(), field) for meters in (actual, expected))
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)

    padded = inputs_of("padded left")
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    plain = model.generate(**padded, **options)
    results = []
    for kind in ("dynamic", "static"):
        meter = FirstTokenAttention()
        with inspecting(model, meter):
            assert torch.equal(model.generate(**padded, **options, cache_implementation=kind), plain)
        results.append(meter.result())
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-5)


def test_whole_masks_and_a_cache() -> None:
    """Prefill and single steps, each with a mask of four dimensions, are one pass."""
    model, ids = inspected_model("llama, grouped queries"), inputs_of("plain")["input_ids"]
    whole, stepwise = FirstTokenAttention(), FirstTokenAttention()
    causal = torch.ones(2, 1, TOKENS, TOKENS).tril().bool()
    with torch.no_grad():
        with inspecting(model, whole):
            model(ids)
        with inspecting(model, stepwise):
            cache = cache_of(model(ids[:, :20], attention_mask=causal[:, :, :20, :20], use_cache=True))
            for step in range(20, TOKENS):
                mask = causal[:, :, step : step + 1, : step + 1]
                model(ids[:, step : step + 1], attention_mask=mask, **with_cache(cache))
    torch.testing.assert_close(stepwise.result(), whole.result(), rtol=0, atol=1e-6)


def test_passes_have_nothing_of_one_another() -> None:
    """Of other sizes, with padding and without, packed."""
    model, ids = inspected_model("llama, grouped queries"), inputs_of("plain")["input_ids"]
    packed = inputs_of("packed")
    alone, later = FirstTokenAttention(), FirstTokenAttention()
    with torch.no_grad():
        with inspecting(model, alone):
            model(**packed)
        with inspecting(model, later):
            for some in (ids, ids[:, :9], ids[:1]):
                model(some, attention_mask=torch.ones_like(some))
                model(some)
            later.start(3)
            model(**packed)
    assert torch.equal(later.result(), alone.result())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_models_that_look_at_their_implementations_name(implementation: str) -> None:
    """DeepSeek V3.2 puts its choice of keys into the mask of these two alone."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8}
    sizes |= {"qk_nope_head_dim": 8, "index_topk": 4, "index_n_heads": 2, "index_head_dim": 16, "n_routed_experts": 4}
    sizes |= {"moe_intermediate_size": 16, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "vocab_size": 96}
    torch.manual_seed(0)
    config = CONFIG_MAPPING["deepseek_v32"](**sizes, first_k_dense_replace=1)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    inputs = inputs_of("plain")
    with torch.no_grad():
        plain = model(**inputs).logits
        with inspecting(model, KeyValueNorms(), EffectiveRank()):
            assert torch.equal(model(**inputs).logits, plain)
        with masked_first_token(model, after=1000):  # which hides nothing
            if implementation == "sdpa" and transformers.__version__ < "5.20":
                return  # which itself does not choose keys where a mask is written out
            torch.testing.assert_close(model(**inputs).logits, plain, rtol=1e-4, atol=1e-4)
        with inspecting(model, meter := FirstTokenAttention()):
            model(**inputs)
    for layer, attention in enumerate(eager_attention(model, inputs)):
        np.testing.assert_allclose(meter.result()[layer], attention[:, :, 1:, 0].mean((0, 2)), rtol=0, atol=1e-5)


def test_contexts_that_are_left_in_another_order_leave_the_model_as_it_was() -> None:
    model, inputs = inspected_model("llama, grouped queries"), inputs_of("plain")
    first, second = FirstTokenAttention(), FirstTokenAttention()
    one, other = inspecting(model, first), inspecting(model, second)
    with torch.no_grad():
        plain = model(**inputs).logits
        one.__enter__()
        other.__enter__()
        model(**inputs)
        before = first.result()
        one.__exit__(None, None, None)
        other.__exit__(None, None, None)
        assert torch.equal(model(**inputs).logits, plain)
    assert torch.equal(first.result(), before)
    assert torch.equal(second.result(), before)


@pytest.mark.parametrize("kind", list(INPUTS))
def test_flash_attention_is_inspected_by_what_its_mask_says(kind: str) -> None:
    """Which it is told in other ways: the mask of padding, positions, and the window of each layer."""
    model, inputs = gated_model("sliding upper layers"), inputs_of(kind)
    meter = FirstTokenAttention()
    base = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def stand_in(module: torch.nn.Module, query, key, value, attention_mask, **arguments):
        """Its kernel is not at hand: sdpa, with the mask of the layer written out."""
        visible = torch.ones(TOKENS, TOKENS).tril().bool()
        if arguments["sliding_window"] is not None:
            visible &= ~torch.ones(TOKENS, TOKENS).tril(-arguments["sliding_window"]).bool()
        own = torch.zeros(2, 1, TOKENS, TOKENS, dtype=torch.bool)
        for row, parts in enumerate(INPUTS[kind]):
            for part in parts:
                own[row, 0, part.start : part.stop, part.start : part.stop] = True
        return base(module, query, key, value, own & visible | torch.eye(TOKENS).bool(), **arguments)

    AttentionInterface.register("stand-in for flash attention", stand_in)
    AttentionMaskInterface.register("stand-in for flash attention", ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])
    expected = eager_attention(model, inputs)
    model.config._attn_implementation = "stand-in for flash attention"
    with torch.no_grad():
        plain = model(**inputs).logits
        with inspecting(model, meter):
            assert torch.equal(model(**inputs).logits, plain)
    for layer, attention in enumerate(expected):
        sink = mean_over_queries(attention, kind, lambda own: own[:, :, 0])
        np.testing.assert_allclose(meter.result()[layer], sink, rtol=0, atol=1e-5)


def test_a_decoder_inside_a_multimodal_model() -> None:
    """Which gets embeddings and masks in a dict: padding and tokens are read from the outer model's arguments."""
    text = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 8, "attn_implementation": "eager"}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, image_token_id=95, mm_tokens_per_image=1)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    inputs = inputs_of("padded right")
    inputs["input_ids"] = inputs["input_ids"] % 90 + 1
    meter, maxima = FirstTokenAttention(), MassiveActivations()
    with torch.no_grad(), inspecting(model, meter, maxima):
        model(**inputs)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
    for layer, attention in enumerate(attentions):
        sink = mean_over_queries(attention.double().numpy(), "padded right", lambda own: own[:, :, 0])
        np.testing.assert_allclose(meter.result()[layer], sink, rtol=0, atol=1e-5)
    assert maxima.result().layers[0].top[0].token_id in inputs["input_ids"]


def test_gradient_checkpointing_is_refused_while_training() -> None:
    model = gated_model()
    model.gradient_checkpointing_enable()
    with inspecting(model, FirstTokenAttention()):  # in evaluation mode it does nothing
        pass
    model.train()
    with pytest.raises(InspectionError, match="is trained with gradient checkpointing"), inspecting(model):
        pass
