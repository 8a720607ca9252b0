import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AttentionInterface, AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from modeling_gated import GatedLlamaConfig, GatedLlamaForCausalLM, GatedLlamaModel
from modeling_gated.configuration import open_gate


SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
VARIANTS = {
    "headwise": {},
    "elementwise": {"gate_granularity": "elementwise"},
    "sliding upper layers": {
        "sliding_window": 6,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    },
    "QK-norm, tied": {"use_qk_norm": True, "tie_word_embeddings": True},
}


def move_gates(model: PreTrainedModel) -> None:
    """Move the gates off their start, so that they differ between tokens and heads."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "g_proj" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator))


@pytest.fixture(params=list(VARIANTS))
def model(request: pytest.FixtureRequest) -> GatedLlamaForCausalLM:
    torch.manual_seed(0)
    model = GatedLlamaForCausalLM(GatedLlamaConfig(**SIZES, **VARIANTS[request.param])).eval()
    move_gates(model)
    return model


def gates(model: PreTrainedModel) -> list[torch.nn.Linear]:
    return [layer.self_attn.g_proj for layer in model.model.layers]


def test_auto_classes_know_the_model() -> None:
    config = AutoConfig.for_model("gated_llama", **SIZES)
    assert type(config) is GatedLlamaConfig
    assert type(AutoModel.from_config(config)) is GatedLlamaModel
    assert type(AutoModelForCausalLM.from_config(config)) is GatedLlamaForCausalLM


@pytest.mark.parametrize("granularity", ["headwise", "elementwise"])
def test_new_gates_start_open_and_all_else_as_in_llama(granularity: str) -> None:
    model = GatedLlamaForCausalLM(GatedLlamaConfig(**SIZES, gate_granularity=granularity, gate_init=0.7))
    for gate in gates(model):
        assert gate.weight.shape == (6 if granularity == "headwise" else 48, 48)
        assert torch.all(gate.weight == 0)
        assert torch.all(gate.bias == open_gate(0.7)[0])
        assert torch.sigmoid(gate.bias).mean().item() == pytest.approx(0.7, abs=0.004)
    assert model.model.layers[0].self_attn.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_gates_without_a_bias_start_near_one_half() -> None:
    model = GatedLlamaForCausalLM(GatedLlamaConfig(**SIZES, gate_bias=False))
    for gate in gates(model):
        assert gate.bias is None
        assert gate.weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_loading_keeps_gates_and_opens_the_missing_ones_alone(model: GatedLlamaForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    expected = model.state_dict()
    tensors = load_file(tmp_path / "model.safetensors")
    missing = {
        "model.layers.0.self_attn.g_proj.weight",
        "model.layers.0.self_attn.g_proj.bias",
        "model.layers.1.self_attn.g_proj.bias",
    }
    kept = {name: tensor for name, tensor in tensors.items() if name not in missing}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})

    loaded, info = GatedLlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == missing
    for name, tensor in loaded.state_dict().items():
        if name not in missing:
            assert torch.equal(tensor, expected[name]), name
    first, second, _ = gates(loaded)
    assert torch.all(first.weight == 0)
    for gate in (first, second):
        assert torch.all(gate.bias == open_gate(0.85)[0])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_cached_generation_equals_the_full_forward(
    model: GatedLlamaForCausalLM, implementation: str, tokens: torch.Tensor
) -> None:
    model.set_attn_implementation(implementation)
    prompt = tokens[:, :9]
    output = model.generate(
        prompt, max_new_tokens=12, do_sample=False, eos_token_id=-1, return_dict_in_generate=True, output_logits=True
    )
    with torch.no_grad():
        full = model(output.sequences).logits[:, 8:-1]
    torch.testing.assert_close(torch.stack(output.logits, 1), full, rtol=0, atol=1e-5)
    assert torch.equal(full.argmax(-1), output.sequences[:, 9:])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_every_layer_is_gated_with_and_without_a_cache(
    model: GatedLlamaForCausalLM, implementation: str, tokens: torch.Tensor
) -> None:
    """Closing one layer's gates changes the logits; closing all leaves what the blocks without attention compute."""
    model.set_attn_implementation(implementation)

    def cached_logits() -> torch.Tensor:
        cache = model(tokens[:, :20], use_cache=True).past_key_values
        return model(tokens[:, 20:], past_key_values=cache).logits

    with torch.no_grad():
        before, before_cached = model(tokens).logits, cached_logits()
        for gate in gates(model):
            kept = gate.weight.clone(), gate.bias.clone()
            gate.weight.zero_()
            gate.bias.fill_(-math.inf)
            assert (model(tokens).logits - before).abs().max() > 1e-4
            assert (cached_logits() - before_cached).abs().max() > 1e-4
            gate.weight.copy_(kept[0])
            gate.bias.copy_(kept[1])

        for gate in gates(model):
            gate.weight.zero_()
            gate.bias.fill_(-math.inf)
        hidden = model.model.embed_tokens(tokens)
        for layer in model.model.layers:
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        expected = model.lm_head(model.model.norm(hidden))
        torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-6)


def test_gradient_checkpointing_changes_nothing(model: GatedLlamaForCausalLM, tokens: torch.Tensor) -> None:
    gradients, calls = [], []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(checkpointing))
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert calls == [False, True, True]  # computed again on the way back
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=0, atol=1e-7, msg=name)


def test_attention_functions_get_what_they_need(tokens: torch.Tensor) -> None:
    """Flash attention makes no mask: it takes the window, and for packed sequences the lengths, from arguments."""
    seen = []

    def record(module: torch.nn.Module, *args: torch.Tensor, **kwargs: object) -> tuple[torch.Tensor, None]:
        seen.append((kwargs["sliding_window"], kwargs["dropout"], kwargs.pop("max_length_q")))
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("recording", record)
    config = GatedLlamaConfig(**SIZES, **VARIANTS["sliding upper layers"], attention_dropout=0.25)
    model = GatedLlamaForCausalLM._from_config(config, attn_implementation="recording")
    model.train()(tokens, max_length_q=33)
    assert seen == [(None, 0.25, 33), (6, 0.25, 33), (6, 0.25, 33)]
    seen.clear()
    model.eval()(tokens, max_length_q=33)
    assert [dropout for _, dropout, _ in seen] == [0.0] * 3


def test_attentions_and_hidden_states_of_every_layer(model: GatedLlamaForCausalLM, tokens: torch.Tensor) -> None:
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(tokens, output_attentions=True, output_hidden_states=True)
    assert [tuple(attention.shape) for attention in output.attentions] == [(2, 6, 33, 33)] * 3
    for attention in output.attentions:
        torch.testing.assert_close(attention.sum(-1), torch.ones(2, 6, 33))
    assert [tuple(hidden.shape) for hidden in output.hidden_states] == [(2, 33, 48)] * 4


def test_save_and_load_keep_the_function(model: GatedLlamaForCausalLM, tmp_path: Path, tokens: torch.Tensor) -> None:
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is GatedLlamaForCausalLM
    is_tied = loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert is_tied == model.config.tie_word_embeddings
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_padding_on_the_left_changes_nothing(model: GatedLlamaForCausalLM, tokens: torch.Tensor) -> None:
    padded = torch.cat([torch.zeros(2, 4, dtype=torch.long), tokens], 1)
    mask = (torch.arange(padded.shape[1]) >= 4).long().expand_as(padded)
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        found = model(padded, attention_mask=mask, position_ids=position_ids).logits[:, 4:]
        torch.testing.assert_close(found, model(tokens).logits, rtol=0, atol=1e-5)
