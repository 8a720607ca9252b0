"""Gates start at the value that the config says, are never re-initialised, and are applied on every path."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from modeling_gated import GatedLlamaConfig, GatedLlamaForCausalLM
from modeling_gated.configuration import OPEN_GATE_WEIGHT, open_gate
from tests.helpers.cache_by_version import cache_of, with_cache
from tests.helpers.gated_models import (
    HEADS,
    SIZES,
    VARIANTS,
    close_gates,
    gated_class,
    gated_model,
    gates,
    greedy_without_attention,
    int8_cache,
    without_attention,
)


@pytest.mark.fast
@pytest.mark.parametrize("head", list(HEADS))
@pytest.mark.parametrize("granularity", ["headwise", "elementwise"])
def test_new_gates_start_open_and_all_else_as_in_llama(granularity: str, head: str) -> None:
    config = GatedLlamaConfig(**SIZES, gate_granularity=granularity, gate_init=0.7)
    model = gated_class(head)(config)
    for gate in gates(model):
        assert gate.weight.shape == (6 if granularity == "headwise" else 48, 48)
        assert torch.all(gate.weight == OPEN_GATE_WEIGHT)
        assert torch.all(gate.bias == open_gate(0.7)[0])
        assert torch.sigmoid(gate.bias).mean().item() == pytest.approx(0.7, abs=0.004)
    assert model.base_model.layers[0].self_attn.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("activation", ["silu", "tanh", "linear"])
def test_additive_gates_start_at_zero(activation: str) -> None:
    """They would add 2**-60 times their input to an attention output that may be 0."""
    options = {"gate_form": "additive", "gate_activation": activation, "gate_granularity": "elementwise"}
    for gate in gates(GatedLlamaForCausalLM(GatedLlamaConfig(**SIZES, **options))):
        assert not gate.weight.any() and not gate.bias.any()


def test_gates_without_a_bias_start_near_one_half() -> None:
    model = GatedLlamaForCausalLM(GatedLlamaConfig(**SIZES, gate_bias=False))
    for gate in gates(model):
        assert gate.bias is None
        assert gate.weight.std().item() == pytest.approx(0.02, rel=0.2)


@pytest.mark.fast
@pytest.mark.parametrize("head", list(HEADS))
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_loading_keeps_gates_and_opens_the_missing_ones_alone(variant: str, head: str, tmp_path: Path) -> None:
    """A checkpoint of any head, of which some gates are gone."""
    model = gated_model(variant, gated_class(head))
    model.save_pretrained(tmp_path)
    expected = model.state_dict()
    tensors = load_file(tmp_path / "model.safetensors")
    prefix = "" if head == "Model" else "model."
    missing = {
        f"{prefix}layers.0.self_attn.g_proj.weight",
        f"{prefix}layers.0.self_attn.g_proj.bias",
        f"{prefix}layers.1.self_attn.g_proj.bias",
    }
    kept = {name: tensor for name, tensor in tensors.items() if name not in missing}
    assert len(kept) == len(tensors) - 3
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})

    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == missing
    for name, tensor in loaded.state_dict().items():
        if name not in missing:
            assert torch.equal(tensor, expected[name]), name
    first, second, _ = gates(loaded)
    assert torch.all(first.weight == OPEN_GATE_WEIGHT)
    for gate in (first, second):
        assert torch.all(gate.bias == open_gate(0.85)[0])


def test_a_checkpoint_of_the_decoder_alone_keeps_its_gates(tmp_path: Path) -> None:
    """Loaded into a causal LM the head is new and the gates are the checkpoint's; and the other way round."""
    model = gated_model()
    model.model.save_pretrained(tmp_path / "decoder")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "decoder", output_loading_info=True)
    assert set(info["missing_keys"]) == {"lm_head.weight"}
    model.save_pretrained(tmp_path / "causal")
    decoder = gated_class("Model").from_pretrained(tmp_path / "causal")
    for expected, *actual in zip(gates(model), gates(loaded), gates(decoder), strict=True):
        for gate in actual:
            assert torch.equal(gate.weight, expected.weight)
            assert torch.equal(gate.bias, expected.bias)


# Every path below is run with the gates moved off their start and, on the very same object, with all gates closed. A
# closed gate leaves of each block the MLP alone, so what remains is `without_attention`, exactly; where one layer or
# one step dropped its gate, attention would show.


def plain(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens).logits


def compiled(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    torch.compiler.reset()
    return torch.compile(model, backend="aot_eager", fullgraph=True)(tokens).logits


def exported(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    program = torch.export.export(model, (tokens,), {"use_cache": False})
    return program.module()(tokens, use_cache=False).logits


def checkpointed(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    model.gradient_checkpointing_enable()
    return model.train()(tokens).logits


def cached(**options: Any) -> Callable[[PreTrainedModel, torch.Tensor], torch.Tensor]:
    """The logits of every step of a generation, the prompt's first, and of what it generated."""

    def run(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
        options.update(do_sample=False, return_dict_in_generate=True, output_logits=True)
        output = model.generate(tokens[:, :1], max_new_tokens=12, **options)
        tokens[:, 1:13] = output.sequences[:, 1:]
        return torch.stack(output.logits, 1)

    return run


def quantized(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    return cached(**with_cache(int8_cache(model)))(model, tokens)


PATHS = {
    "eager attention": ("eager", plain),
    "sdpa": ("sdpa", plain),
    "compiled": ("sdpa", compiled),
    "compiled eager attention": ("eager", compiled),
    "exported": ("sdpa", exported),
    "gradient checkpointing": ("sdpa", checkpointed),
    "dynamic cache": ("sdpa", cached(cache_implementation="dynamic")),
    "dynamic cache, eager attention": ("eager", cached(cache_implementation="dynamic")),
    "static cache": ("sdpa", cached(cache_implementation="static", disable_compile=True)),
    "quantized cache": ("sdpa", quantized),
    "no cache": ("sdpa", cached(use_cache=False)),
}


# Transformers' quantized caches refuse sliding windows, see test_generation. Compiling is slow, so eager attention is
# compiled for one variant alone.
LEFT_OUT = [("sliding upper layers", "quantized cache")]
LEFT_OUT += [(variant, "compiled eager attention") for variant in VARIANTS if variant != "sliding upper layers"]
VARIANTS_AND_PATHS = [(variant, path) for variant in VARIANTS for path in PATHS if (variant, path) not in LEFT_OUT]


@pytest.mark.parametrize(("variant", "path"), VARIANTS_AND_PATHS)
def test_no_path_drops_a_gate(variant: str, path: str, tokens: torch.Tensor) -> None:
    implementation, run = PATHS[path]
    model = gated_model(variant)
    model.set_attn_implementation(implementation)
    tokens = tokens[:, :13]
    for closed in (False, True):
        if closed:
            close_gates(model)
        with torch.set_grad_enabled(path == "gradient checkpointing"):
            finished = run(model, tokens)
        assert finished.shape[1] >= 12
        ungated = model.lm_head(without_attention(model, tokens[:, : finished.shape[1]]))
        difference = (finished - ungated).abs().amax(-1)
        if closed:
            assert difference.max() < 1e-5
        else:
            assert difference.max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("path", ["eager attention", "sdpa", "compiled", "dynamic cache", "static cache"])
def test_no_path_drops_a_gate_in_half_precision(path: str, dtype: torch.dtype, tokens: torch.Tensor) -> None:
    """Closed gates leave exactly the MLPs; others what the float32 model says, and not what it says without gates."""
    implementation, run = PATHS[path]
    model = gated_model("elementwise").to(dtype)
    model.set_attn_implementation(implementation)
    tokens = tokens[:, :13]
    with torch.no_grad():
        finished = run(model, tokens)
        length = finished.shape[1]
        reference = copy.deepcopy(model).float()
        expected = reference(tokens[:, :length]).logits
        for gate in gates(reference):  # a gate that is dropped is a gate of 1
            gate.weight.zero_()
            gate.bias.fill_(100.0)
        dropped = reference(tokens[:, :length]).logits
        assert (finished - expected).abs().max() < 0.1 * (dropped - expected).abs().max()

        close_gates(model)
        finished = run(model, tokens)
        expected = model.lm_head(without_attention(model, tokens[:, :length]))
        assert (finished - expected).abs().max() < 0.01


STRATEGIES = {
    "sampling": {"do_sample": True, "top_k": 1},
    "prompt in pieces": {"prefill_chunk_size": 4},
    "assisted": {"assistant_model": "headwise"},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "beam search": {"num_beams": 2},
}


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_no_strategy_drops_a_gate(strategy: str, tokens: torch.Tensor) -> None:
    """With closed gates each token follows from the one before it alone."""
    model, options = gated_model(), dict(STRATEGIES[strategy])
    if "assistant_model" in options:
        options["assistant_model"] = gated_model(num_hidden_layers=1)
    options |= {"max_new_tokens": 10, "eos_token_id": None}
    gated = model.generate(tokens[:1, :9], **options)[0, 9:].tolist()
    close_gates(model)
    actual = model.generate(tokens[:1, :9], **options)[0, 9:].tolist()
    assert actual != gated
    if strategy != "beam search":  # whose scores test_generation has
        assert actual == greedy_without_attention(model, tokens[0, 8].item(), 10)


@pytest.mark.parametrize("head", list(HEADS))
def test_no_head_drops_a_gate(head: str, tokens: torch.Tensor) -> None:
    """With closed gates a token's output does not depend on the tokens before it; with the model's own it does."""
    model = gated_model(model_class=gated_class(head), num_labels=3)
    other = tokens.clone()
    other[:, :-1] = tokens[:, :-1].flip(1)
    for closed in (False, True):
        if closed:
            close_gates(model)
        with torch.no_grad():
            first, second = (model(inputs)[0] for inputs in (tokens, other))
        if head != "ForSequenceClassification":
            first, second = first[:, -1], second[:, -1]
        assert torch.allclose(first, second, atol=1e-6) == closed


@pytest.mark.fast
def test_every_layer_is_gated(tokens: torch.Tensor) -> None:
    """Closing the gates of one layer changes the logits, with and without a cache."""
    model = gated_model()

    def cached_logits() -> torch.Tensor:
        cache = cache_of(model(tokens[:, :20], use_cache=True))
        return model(tokens[:, 20:], **with_cache(cache)).logits

    with torch.no_grad():
        before, before_cached = model(tokens).logits, cached_logits()
        for gate in gates(model):
            kept = gate.bias.clone()
            gate.bias.fill_(-100.0)
            assert (model(tokens).logits - before).abs().max() > 1e-4
            assert (cached_logits() - before_cached).abs().max() > 1e-4
            gate.bias.copy_(kept)
