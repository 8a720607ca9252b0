"""Gates whose logits include the log-sum-exp of the attention scores."""

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AttentionInterface
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as attention_with_sinks

from modeling_gated import GatedLlamaConfig, GatedLlamaForCausalLM, log_sum_exp
from modeling_gated.inspection import GateScores, inspecting
from modeling_gated.log_sum_exp import LogSumExp, attend_with_log_sum_exp
from modeling_gated.modeling_gated_llama import ALL_ATTENTION_FUNCTIONS, eager_attention_forward
from tests.helpers.gated_models import gated_model
from tests.helpers.tiny_configs import tiny_llama


SCORE_AWARE = "score-aware, sliding upper layers"
MASKS = ["none", "boolean", "additive", "one for all heads", "hidden row"]
SCALING = 0.3


def states(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries of 6 heads and keys and values of 2, 5 queries and 9 keys."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 6, 5, 8), (2, 2, 9, 8), (2, 2, 9, 8))
    query, key, value = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def mask_of(kind: str) -> torch.Tensor | None:
    generator = torch.Generator().manual_seed(1)
    if kind == "none":
        return None
    visible = torch.rand(2, 1 if kind == "one for all heads" else 6, 5, 9, generator=generator) < 0.6
    visible[..., 0] = True
    if kind == "hidden row":
        visible[1, :, 2] = False
    return torch.zeros(visible.shape).masked_fill(~visible, -math.inf) if kind == "additive" else visible


def expected_log_sum_exp(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> np.ndarray:
    """[batch, heads, queries], from NumPy."""
    scores = (
        np.einsum("bhqd,bhkd->bhqk", query.double().numpy(), key.double().repeat_interleave(3, 1).numpy()) * SCALING
    )
    if mask is not None:
        scores = np.where(mask.numpy() if mask.dtype == torch.bool else mask.numpy() == 0, scores, -np.inf)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(scores).sum(-1))


def module_for(implementation: str) -> nn.Module:
    module = nn.Module()
    module.config = GatedLlamaConfig()
    module.config._attn_implementation = implementation
    module.num_key_value_groups, module.is_causal = 3, False
    return module.eval()


def attended(implementation: str, *tensors: torch.Tensor, mask: Any = None) -> tuple[torch.Tensor, ...]:
    function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
    return attend_with_log_sum_exp(function, module_for(implementation), *tensors, mask, scaling=SCALING)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "sdpa with gradients", "flex_attention"])
def test_it_is_that_of_the_scores(
    implementation: str, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blockwise and by the kernel; the attention output is what the function gives alone."""
    monkeypatch.setattr(log_sum_exp, "_SCORES", 150)
    query, key, value = states(dtype)
    mask = mask_of(kind)
    expected = expected_log_sum_exp(query, key, mask)
    if implementation == "flex_attention":
        if kind == "additive" or dtype == torch.float64:
            pytest.skip("flex attention takes block masks, and no float64")
        visible = mask
        if mask is not None:
            heads = mask.shape[1]
            mask = create_block_mask(
                lambda batch, head, q, k: visible[batch, head % heads, q, k], 2, 6, 5, 9, device="cpu", _compile=False
            )
    elif mask is not None and implementation == "eager":
        mask = (torch.zeros(mask.shape).masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else mask).to(dtype)
    elif mask is not None and mask.dtype != torch.bool:
        mask = mask.to(dtype)
    name, _, needs_gradient = implementation.partition(" with ")
    query.requires_grad_(bool(needs_gradient))
    with torch.compiler.set_stance("force_eager"):
        output, _, actual = attended(name, query, key, value, mask=mask)
        function = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        alone = function(module_for(name), query, key, value, mask, scaling=SCALING)[0]
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    sees = np.isfinite(expected).transpose(0, 2, 1)
    np.testing.assert_allclose(
        actual.detach().double().numpy()[sees],
        expected.transpose(0, 2, 1)[sees],
        rtol=0,
        atol=1e-4 if dtype == torch.bfloat16 else 1e-5,
    )
    torch.testing.assert_close(output[torch.tensor(sees)], alone[torch.tensor(sees)], rtol=0, atol=1e-6)


def test_a_causal_mask_may_be_left_out() -> None:
    """As Transformers leaves it out for sdpa, and for one query, which sees all keys."""
    query, key, value = (tensor.float() for tensor in states())
    module = module_for("sdpa")
    module.is_causal = True
    function = ALL_ATTENTION_FUNCTIONS["sdpa"]
    visible = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    for needs_gradient in (False, True):
        query.requires_grad_(needs_gradient)
        square = attend_with_log_sum_exp(function, module, query, key[:, :, :5], value[:, :, :5], None, scaling=SCALING)
        expected = expected_log_sum_exp(query.detach(), key[:, :, :5], visible)
        np.testing.assert_allclose(square[2].detach().numpy(), expected.transpose(0, 2, 1), rtol=0, atol=1e-5)
        one = attend_with_log_sum_exp(function, module, query[:, :, :1], key, value, None, scaling=SCALING)
        expected = expected_log_sum_exp(query[:, :, :1].detach(), key, None)
        np.testing.assert_allclose(one[2].detach().numpy(), expected.transpose(0, 2, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["none", "boolean", "additive", "one for all heads"])
def test_its_gradients_are_those_of_autograd(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """First and second derivatives, and derivatives in a direction."""
    monkeypatch.setattr(log_sum_exp, "_SCORES", 150)
    query, key, _ = states()
    mask = mask_of(kind)

    def function(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return LogSumExp.apply(query, key, mask, SCALING, False)

    query.requires_grad_(), key.requires_grad_()
    assert torch.autograd.gradcheck(function, (query, key), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, (query, key))


def test_a_query_that_sees_nothing_has_no_gradient() -> None:
    query, key, _ = states()
    query.requires_grad_(), key.requires_grad_()
    output = LogSumExp.apply(query, key, mask_of("hidden row"), SCALING, False)
    torch.where(output.isfinite(), output, 0.0).sum().backward()
    assert query.grad.isfinite().all() and key.grad.isfinite().all()
    assert query.grad[1, :, 2].eq(0).all()


def test_a_constant_gate_is_a_sink_logit(tokens: torch.Tensor) -> None:
    """With W = 0 attention is that of gpt-oss, which has a learned logit per head in its softmax."""
    model = gated_model(
        SCORE_AWARE, sliding_window=None, layer_types=["full_attention"] * 3, attn_implementation="eager"
    )
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        attention.g_proj.weight.zero_()
    attention.sinks = -attention.g_proj.bias.detach()
    seen: dict[str, torch.Tensor] = {}
    attention.o_proj.register_forward_pre_hook(lambda _, arguments: seen.update(gated=arguments[0]))

    def spy(module: nn.Module, *inputs: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if module is attention:
            seen["sinks"] = attention_with_sinks(module, *inputs, **options)[0]
        return eager_attention_forward(module, *inputs, **options)

    model.config._attn_implementation = "sdpa"
    ALL_ATTENTION_FUNCTIONS["sdpa"] = spy
    try:
        with torch.no_grad():
            mask = torch.full((33, 33), -math.inf).triu(1)[None, None]
            model(tokens, attention_mask=mask)
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
    torch.testing.assert_close(seen["gated"], seen["sinks"].flatten(2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("weight", [0.25, 1.0])
def test_the_weight_is_that_of_the_log_sum_exp(weight: float, tokens: torch.Tensor) -> None:
    """A weight of an attention block can be changed, down to 0, where the gate is the plain one."""
    model, plain = gated_model(SCORE_AWARE), gated_model("sliding upper layers")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.gate_logit_lse_weight = weight
        assert (model(tokens).logits - plain(tokens).logits).abs().max() > 1e-3
        for layer in model.model.layers:
            layer.self_attn.gate_logit_lse_weight = 0.0
        assert torch.equal(model(tokens).logits, plain(tokens).logits)
        model = gated_model(SCORE_AWARE, gate_logit_lse_weight=weight)
        meter = GateScores()
        with inspecting(model, meter):
            model(tokens)
    assert meter.result()["G1"].mean.min() > 0 and meter.result()["G1"].mean.max() < 1


@pytest.mark.parametrize("implementation", ["flash_attention_2", "paged|sdpa", "unknown"])
def test_other_implementations_are_refused(implementation: str, tokens: torch.Tensor) -> None:
    AttentionInterface.register("unknown", eager_attention_forward)
    model = gated_model(SCORE_AWARE)
    model.config._attn_implementation = implementation
    with pytest.raises(
        ValueError, match=f"attn_implementation must be one of eager.*got '{re.escape(implementation)}'"
    ):
        model(tokens)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gate_logit_lse_weight": -0.5}, "gate_logit_lse_weight must be between 0 and 1, got -0.5"),
        ({"gate_logit_lse_weight": 1.5}, "gate_logit_lse_weight must be between 0 and 1, got 1.5"),
        ({"gate_logit_lse_weight": "1"}, "gate_logit_lse_weight"),
        (
            {"gate_logit_lse_weight": 1.0, "gate_granularity": "elementwise"},
            "gate_granularity must be 'headwise'.* got 'elementwise'",
        ),
        ({"gate_logit_lse_weight": 1.0, "gate_activation": "silu"}, "gate_activation must be .* got 'silu'"),
        ({"gate_logit_lse_weight": 1.0, "gate_head_shared": True}, "gate_head_shared must be False.* got True"),
        ({"gate_logit_lse_weight": 1.0, "gate_position": ["G2"]}, "gate_position must have 'G1'"),
    ],
)
def test_nonsense_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        tiny_llama(GatedLlamaConfig, **fields)


def test_gradients_per_sample(tokens: torch.Tensor) -> None:
    model = GatedLlamaForCausalLM(tiny_llama(GatedLlamaConfig, gate_logit_lse_weight=1.0)).eval()
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, torch.Tensor], sequence: torch.Tensor) -> torch.Tensor:
        return functional_call(model, parameters, (sequence[None],), {"use_cache": False}).logits.square().sum()

    actual = vmap(grad(loss), (None, 0))(parameters, tokens)
    for row, sequence in enumerate(tokens):
        expected = torch.autograd.grad(loss(parameters, sequence), list(parameters.values()))
        for name, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(actual[name][row], gradient, rtol=1e-4, atol=1e-5, msg=name)
