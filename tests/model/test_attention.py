"""The decoder block, in every variant, against the paper's equations in float64 NumPy: values and gradients."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from modeling_gated import GatedLlamaConfig, GatedLlamaModel
from modeling_gated.modeling_gated_llama import GatedLlamaAttention
from tests.helpers.numpy_reference import decoder_layer
from tests.helpers.paper_variants import CONFIGS, SIZES
from tests.helpers.tiny_configs import tiny_llama


OTHERS: dict[str, dict[str, Any]] = {
    "headwise, scaled": {"gate_scale": 1.25},
    "elementwise, no gate bias": {"gate_granularity": "elementwise", "gate_bias": False},
    "headwise, all biases": {"attention_bias": True, "attention_output_bias": True},
    "elementwise, q, k, v biases": {"gate_granularity": "elementwise", "attention_bias": True},
    "elementwise, sliding": {"gate_granularity": "elementwise", "sliding_window": 5},
    "all positions, shared by heads": {"gate_position": ["G1", "G2", "G3", "G4"], "gate_head_shared": True},
    "additive tanh, input-independent": {
        "gate_form": "additive",
        "gate_activation": "tanh",
        "gate_input_independent": True,
    },
    "additive ReLU, headwise": {"gate_form": "additive", "gate_activation": "relu", "gate_bias": False},
    "keys and queries, QK-norm": {
        "gate_position": ["G3", "G4"],
        "gate_granularity": "elementwise",
        "use_qk_norm": True,
    },
    "norm, tanh and a gate of the output": {"use_attention_output_norm": True, "attention_output_activation": "tanh"},
    "plain MLP with biases, sandwich norm": {"use_glu": False, "mlp_bias": True, "use_sandwich_norm": True},
}
ALL = {**CONFIGS, **{name: GatedLlamaConfig(**SIZES | fields) for name, fields in OTHERS.items()}}


def random_block(config: GatedLlamaConfig, implementation: str = "sdpa") -> tuple[PreTrainedModel, torch.Tensor]:
    """A decoder of one layer and its input, [batch, seq, hidden_size]."""
    config = GatedLlamaConfig(**config.to_dict() | {"num_hidden_layers": 1, "layer_types": config.layer_types[:1]})
    model = GatedLlamaModel._from_config(config, attn_implementation=implementation).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.layers.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model, torch.randn(2, 12, config.hidden_size, generator=generator)


def numpy_weights(model: PreTrainedModel) -> dict[str, np.ndarray]:
    return {name: tensor.double().numpy() for name, tensor in model.layers[0].state_dict().items()}


@pytest.mark.fast
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", list(ALL))
def test_a_block_follows_the_equations(variant: str, implementation: str) -> None:
    model, inputs = random_block(ALL[variant], implementation)
    seen = []
    model.layers[0].register_forward_hook(lambda _module, _args, output: seen.append(output))
    with torch.no_grad():
        model(inputs_embeds=inputs)
    weights = numpy_weights(model)
    for x, actual in zip(inputs, seen[0], strict=True):
        expected = decoder_layer(x.double().numpy(), weights, ALL[variant])
        assert np.abs(expected - x.numpy()).max() > 1
        np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.fast
@pytest.mark.parametrize("variant", list(ALL))
def test_gradients_follow_the_equations(variant: str) -> None:
    """The loss's slope along a random direction of all weights, against a difference quotient of the equations."""
    model, inputs = random_block(ALL[variant])
    seen: list[torch.Tensor] = []
    model.layers[0].register_forward_hook(lambda _module, _args, output: seen.append(output))
    model(inputs_embeds=inputs[:1])
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(seen[0].shape, generator=generator)
    (seen[0] * cotangent).sum().backward()
    slope, directions = 0.0, {}
    for name, parameter in model.layers[0].named_parameters():
        assert parameter.grad.abs().max() > 0, name
        direction = torch.randn(parameter.shape, generator=generator)
        slope += (parameter.grad.double() * direction).sum().item()
        directions[name] = direction.double().numpy()

    def loss(step: float) -> float:
        weights = {name: weight + step * directions[name] for name, weight in numpy_weights(model).items()}
        return (decoder_layer(inputs[0].double().numpy(), weights, ALL[variant]) * cotangent[0].numpy()).sum()

    assert slope == pytest.approx((loss(1e-6) - loss(-1e-6)) / 2e-6, rel=1e-3)


@pytest.mark.fast
def test_the_gate_has_a_gradient_where_a_bfloat16_sigmoid_has_none() -> None:
    torch.manual_seed(0)
    model = GatedLlamaModel(tiny_llama(GatedLlamaConfig)).to(torch.bfloat16)
    attention: GatedLlamaAttention = model.layers[0].self_attn
    with torch.no_grad():
        attention.g_proj.bias.fill_(7.5)
    assert torch.sigmoid(attention.g_proj.bias).eq(1).all()
    model(torch.arange(8)[None]).last_hidden_state[..., 0].float().sum().backward()  # squares of a norm hardly change
    assert torch.all(attention.g_proj.bias.grad.abs() > 1e-6)
