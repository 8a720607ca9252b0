"""Elementwise gates are computed again for the backward pass: with the gradients of autograd, and less memory."""

from collections.abc import Callable

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jvp, vmap
from transformers import PreTrainedModel

from examples.benchmarks.workloads import kept_for_backward
from tests.helpers.gated_models import gated_model
from tests.helpers.paper_variants import CONFIGS, random_model


def applied_plainly(model: PreTrainedModel) -> None:
    """Let autograd save what it wants."""
    for layer in model.base_model.layers:
        layer.self_attn.recomputes_gates = False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_gradients_of_every_variant_are_autograd_s(name: str, dtype: torch.dtype, tokens: torch.Tensor) -> None:
    gradients = []
    for plainly in (False, True):
        model = random_model(name).to(dtype)
        if plainly:
            applied_plainly(model)
        model(tokens, labels=tokens).loss.backward()
        gradients.append({path: parameter.grad for path, parameter in model.named_parameters()})
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    for path, expected in gradients[1].items():
        difference = (gradients[0][path] - expected).float().norm() / expected.float().norm().clamp_min(1e-12)
        assert difference < tolerance, path


def test_derivatives_of_every_kind_are_autograd_s() -> None:
    """Gradients, gradients of gradients, forward mode by both of its ways, and those of torch.func."""
    attention = gated_model("elementwise", gate_scale=1.3).model.layers[0].self_attn
    assert attention.recomputes_gates
    states = torch.randn(2, 3, 6, 8, requires_grad=True)
    logits = (torch.linspace(-9, 9, states.numel()).view(2, 3, 48) + 0.1).requires_grad_()  # far from 0 and near it
    weights, changes = torch.randn(states.shape), (torch.randn(states.shape), torch.randn(logits.shape))

    def ours(states: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return attention.gated(states, torch.nn.Identity(), logits)

    def plain(states: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return attention.with_gates(states, attention.gate_values(logits))

    def derivatives(function: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        first = torch.autograd.grad(
            (function(states, logits).square() * weights).sum(), (states, logits), create_graph=True
        )
        second = torch.autograd.grad(sum(one.square().sum() for one in first), (states, logits))
        with forward_ad.dual_level():
            pair = function(states.detach(), forward_ad.make_dual(logits.detach(), changes[1]))
            dual = forward_ad.unpack_dual(pair).tangent
        both = jvp(function, (states.detach(), logits.detach()), changes)[1]
        curvature = hessian(lambda own: function(states[:1, :1], own).square().sum())(logits[:1, :1].detach())
        return [*first, *second, dual, both, curvature]

    for actual, expected in zip(derivatives(ours), derivatives(plain), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def test_gradients_of_single_texts(tokens: torch.Tensor) -> None:
    """torch.func's, of each text by itself."""
    model = gated_model("elementwise", attn_implementation="eager")
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, torch.Tensor], text: torch.Tensor) -> torch.Tensor:
        return functional_call(model, parameters, (text,), {"labels": text, "use_cache": False}).loss

    each = vmap(grad(loss), (None, 0))(parameters, tokens[:, None])
    for number, text in enumerate(tokens):
        model.zero_grad()
        model(text[None], labels=text[None]).loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(each[name][number], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_elementwise_gates_keep_no_more_than_their_logits(dtype: torch.dtype, trained: bool) -> None:
    """Next to weights, the input of the gates, and the states that they multiply."""
    attention = gated_model("elementwise").to(dtype).model.layers[0].self_attn.requires_grad_(trained)
    hidden = torch.randn(2, 16, 48, dtype=dtype, requires_grad=True)
    states = torch.randn(2, 16, 6, 8, dtype=dtype, requires_grad=True)
    with kept_for_backward([hidden, states, *attention.parameters()]) as kept:
        output = attention.gated(states, attention.g_proj, hidden)
    assert output.requires_grad
    assert sum(kept.values()) == 2 * 16 * len(attention.g_proj.weight) * dtype.itemsize
