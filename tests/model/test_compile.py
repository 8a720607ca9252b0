"""torch.compile, torch.export and gradient checkpointing change nothing."""

import shutil

import pytest
import torch
from transformers import CompileConfig, PreTrainedModel

from tests.helpers.gated_models import VARIANTS, close_gates, gated_model, without_attention


@pytest.fixture(params=list(VARIANTS))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.compiler.reset()
    return gated_model(request.param)


def test_one_graph_forward_and_backward(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    """fullgraph: without a break; and one graph serves other values of the gates."""
    model.train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    gradients = []
    for run in (model, compiled):
        model.zero_grad()
        output = run(tokens, labels=tokens, use_cache=False)
        output.loss.backward()
        gradients.append([output.logits.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    for expected, actual in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)

    close_gates(model)
    actual = compiled(tokens, labels=tokens, use_cache=False).logits
    torch.testing.assert_close(actual, model.lm_head(without_attention(model, tokens)), rtol=0, atol=1e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile's default backend needs a C++ compiler")
def test_the_default_backend(tokens: torch.Tensor) -> None:
    """Inductor, with the cache that the model makes."""
    torch.compiler.reset()
    model = gated_model(
        "sliding upper layers", num_hidden_layers=2, layer_types=["full_attention", "sliding_attention"]
    )
    compiled = torch.compile(model, fullgraph=True)
    for closed in (False, True):
        if closed:
            close_gates(model)
        with torch.no_grad():
            expected = model.lm_head(without_attention(model, tokens)) if closed else model(tokens).logits
            torch.testing.assert_close(compiled(tokens).logits, expected, rtol=0, atol=1e-5)


def test_compiled_generation_with_a_static_cache(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    """What generate does by itself on a GPU: each step is one compiled graph."""
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    graphs = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = CompileConfig(backend=backend, fullgraph=True, mode=None)
    compiled._compile_all_devices = True
    for closed in (False, True):
        if closed:
            close_gates(model)
        expected = model.generate(tokens[:, :9], cache_implementation="dynamic", **options)
        generated = model.generate(tokens[:, :9], cache_implementation="static", compile_config=compiled, **options)
        assert torch.equal(generated, expected)
    assert graphs


def test_export_is_the_model(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    """One program for every batch size and length, which carries the gates as parameters."""
    batch, length = torch.export.Dim("batch", min=2, max=8), torch.export.Dim("length", min=8, max=128)
    program = torch.export.export(
        model,
        (),
        {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False},
        dynamic_shapes={"input_ids": (batch, length), "attention_mask": (batch, length), "use_cache": None},
        strict=False,
    )
    assert any("g_proj" in name for name in program.state_dict)
    for inputs in (tokens, tokens[:, :17], tokens.repeat(2, 3)):
        with torch.no_grad():
            expected = model(inputs, use_cache=False).logits
            actual = program.module()(input_ids=inputs, attention_mask=torch.ones_like(inputs), use_cache=False).logits
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(
    model: PreTrainedModel, use_reentrant: bool, tokens: torch.Tensor
) -> None:
    gradients, calls = [], []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(checkpointing))
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.train()
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert calls == [False, True, True]  # computed again on the way back
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=0, atol=1e-7, msg=name)
