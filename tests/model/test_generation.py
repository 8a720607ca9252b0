"""Generation, with every cache and strategy, is what the full forward says."""

import importlib.util

import pytest
import torch
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
    QuantizedCache,
    StaticCache,
    cache_utils,
)

from tests.helpers.cache_by_version import cache_of, with_cache
from tests.helpers.gated_models import VARIANTS, close_gates, gated_model, int8_cache, without_attention


CACHES = {
    "dynamic": {"cache_implementation": "dynamic"},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "none": {"use_cache": False},
    "dynamic, prompt in pieces": {"cache_implementation": "dynamic", "prefill_chunk_size": 4},
}
GREEDY = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True, "output_logits": True}


@pytest.fixture(params=list(VARIANTS))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return gated_model(request.param)


@pytest.mark.fast
@pytest.mark.parametrize("cache", list(CACHES))
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_cached_generation_equals_the_full_forward(
    model: PreTrainedModel, implementation: str, cache: str, tokens: torch.Tensor
) -> None:
    model.set_attn_implementation(implementation)
    output = model.generate(tokens[:, :9], max_new_tokens=12, **GREEDY, **CACHES[cache])
    with torch.no_grad():
        full = model(output.sequences).logits[:, 8:-1]
    torch.testing.assert_close(torch.stack(output.logits, 1), full, rtol=0, atol=1e-5)
    assert torch.equal(full.argmax(-1), output.sequences[:, 9:])


def test_static_cache_longer_than_the_sequence(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    cache = StaticCache(config=model.config, max_cache_len=64)
    with torch.no_grad():
        expected = model(tokens).logits
        actual = [model(chunk, **with_cache(cache)).logits for chunk in tokens.split([20, 1, 1, 1, 10], 1)]
    torch.testing.assert_close(torch.cat(actual, 1), expected, rtol=0, atol=1e-5)


# The backends that this version of Transformers and this environment have, and int8 by a layer of the tests' own.
QUANTISED: dict[str, dict[str, object]] = {"int8": {}}
if hasattr(cache_utils, "Fp8QuantizedLayer"):
    QUANTISED["fp8"] = {}
if importlib.util.find_spec("optimum") and importlib.util.find_spec("optimum.quanto"):
    QUANTISED["quanto"] = {"axis_key": 0, "axis_value": 0, "q_group_size": 8, "residual_length": 4}


@pytest.mark.parametrize("backend", list(QUANTISED))
@pytest.mark.parametrize("variant", ["headwise", "elementwise", "QK-norm, tied"])
def test_quantized_cache_is_close(variant: str, backend: str, tokens: torch.Tensor) -> None:
    """Not equal, since keys and values lose precision; with closed gates they do not matter."""
    model = gated_model(variant)
    for closed in (False, True):
        if closed:
            close_gates(model)
        cache: dict[str, object] = with_cache(int8_cache(model))
        if backend != "int8":
            cache = {"cache_implementation": "quantized", "cache_config": {"backend": backend, **QUANTISED[backend]}}
        output = model.generate(tokens[:, :9], max_new_tokens=12, **GREEDY, **cache)
        with torch.no_grad():
            full = model(output.sequences).logits[:, 8:-1]
        difference = (torch.stack(output.logits, 1) - full).abs().max()
        if closed:
            assert difference < 1e-5
        else:
            assert 0 < difference < 0.5 * full.std()


def test_transformers_quantized_caches_refuse_sliding_windows() -> None:
    with pytest.raises(ValueError, match="only supported for models with only full attention"):
        QuantizedCache(backend="quanto", config=gated_model("sliding upper layers").config)


@pytest.mark.fast
def test_padded_prompts_generate_as_on_their_own(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    prompts = [tokens[0, :9], tokens[1, :5]]
    expected = [
        model.generate(prompt[None], max_new_tokens=8, do_sample=False, eos_token_id=None) for prompt in prompts
    ]
    padded, mask = torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 9, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        padded[row, -len(prompt) :], mask[row, -len(prompt) :] = prompt, 1
    generated = model.generate(padded, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None)
    for row, alone in zip(generated, expected, strict=True):
        assert torch.equal(row[-8:], alone[0, -8:])


def test_generation_from_embeddings_and_from_a_cache(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    expected = model.generate(tokens[:, :9], max_new_tokens=8, do_sample=False, eos_token_id=None)
    embeddings = model.get_input_embeddings()(tokens[:, :9])
    generated = model.generate(inputs_embeds=embeddings, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert torch.equal(generated, expected[:, 9:])
    first = model.generate(
        tokens[:, :9], max_new_tokens=4, do_sample=False, eos_token_id=None, return_dict_in_generate=True
    )
    second = model.generate(
        first.sequences, **with_cache(cache_of(first)), max_new_tokens=4, do_sample=False, eos_token_id=None
    )
    assert torch.equal(second, expected)


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
def test_beam_search_scores_are_the_full_forward_s(
    model: PreTrainedModel, cache: str, closed: bool, tokens: torch.Tensor
) -> None:
    """A beam's score is its tokens' mean log-probability; with closed gates, that of a model without attention."""
    if closed:
        close_gates(model)
    output = model.generate(
        tokens[:1, :5], max_new_tokens=8, num_beams=4, num_return_sequences=4, do_sample=False, eos_token_id=None,
        return_dict_in_generate=True, output_scores=True, **CACHES[cache],
    )  # fmt: skip
    with torch.no_grad():
        logits = model.lm_head(without_attention(model, output.sequences)) if closed else model(output.sequences).logits
    probabilities = logits[:, 4:-1].log_softmax(-1).gather(2, output.sequences[:, 5:, None])
    torch.testing.assert_close(output.sequences_scores, probabilities.mean((1, 2)), rtol=0, atol=1e-5)


def test_sampling_follows_the_full_forward(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    """One token, sampled many times, is as frequent as the full forward says it is probable."""
    with torch.no_grad():
        probabilities = (model(tokens[:1, :9]).logits[0, -1] * 8).softmax(-1)
    torch.manual_seed(0)
    sampled = model.generate(
        tokens[:1, :9].expand(4000, -1), max_new_tokens=1, do_sample=True, temperature=1 / 8, top_k=0, eos_token_id=None
    )
    frequencies = sampled[:, -1].bincount(minlength=96) / 4000
    assert probabilities.max() > 0.05
    assert (frequencies - probabilities).abs().max() < 0.03


@pytest.mark.parametrize("assistant", ["a smaller model", "prompt lookup"])
def test_assisted_generation_equals_greedy(assistant: str, tokens: torch.Tensor) -> None:
    for variant in ("headwise", "elementwise", "QK-norm, tied"):
        model = gated_model(variant)
        expected = model.generate(tokens[:1, :9], max_new_tokens=16, do_sample=False, eos_token_id=None)
        help_from: dict[str, object] = {"prompt_lookup_num_tokens": 3}
        if assistant == "a smaller model":
            help_from = {"assistant_model": gated_model(variant, num_hidden_layers=1)}
        generated = model.generate(tokens[:1, :9], max_new_tokens=16, do_sample=False, eos_token_id=None, **help_from)
        assert torch.equal(generated, expected)


@pytest.mark.parametrize("closed", [False, True])
def test_continuous_batching_equals_greedy(closed: bool, tokens: torch.Tensor) -> None:
    """Paged attention over requests of several lengths, full and sliding layers."""
    model = gated_model("sliding upper layers")
    if closed:
        close_gates(model)
    prompts = [tokens[0, :9].tolist(), tokens[1, :20].tolist(), tokens[1, 20:23].tolist()]
    expected = [
        model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None)[0, len(prompt) :]
        for prompt in prompts
    ]
    greedy = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=None)
    # Without these numbers the cache takes most of the machine's memory.
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    generated = model.generate_batch(prompts, greedy, continuous_batching_config=small, progress_bar=False)
    assert sorted(output.generated_tokens for output in generated.values()) == sorted(
        part.tolist() for part in expected
    )
