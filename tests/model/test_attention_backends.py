"""Every attention implementation of Transformers computes the same, on plain, padded and packed inputs."""

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, modeling_flash_attention_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask

from modeling_gated import GatedLlamaModel
from modeling_gated.log_sum_exp import BACKENDS
from modeling_gated.modeling_gated_llama import GatedLlamaAttention
from tests.helpers import reference_flash_attn
from tests.helpers.cache_by_version import cache_of, with_cache
from tests.helpers.gated_models import VARIANTS, close_gates, gated_model, without_attention


def own_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As a user would write it: [batch, heads, seq, head_dim] in, [batch, seq, heads, head_dim] out."""
    key, value = (states.repeat_interleave(query.shape[1] // states.shape[1], 1) for states in (key, value))
    scores = query @ key.mT * kwargs["scaling"] + attention_mask
    return (scores.softmax(-1) @ value).transpose(1, 2), scores


AttentionInterface.register("own_attention", own_attention)
AttentionMaskInterface.register("own_attention", eager_mask)
IMPLEMENTATIONS = ["sdpa", "flex_attention", "flash_attention_2", "own_attention"]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Flex attention uncompiled, and flash attention with a plain torch function in place of its kernel."""
    padding = ModuleType("flash_attn.bert_padding")
    padding.pad_input = modeling_flash_attention_utils._pad_input
    padding.unpad_input = modeling_flash_attention_utils._unpad_input
    monkeypatch.setitem(sys.modules, "flash_attn", reference_flash_attn)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    monkeypatch.setattr(modeling_flash_attention_utils, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    with torch.compiler.set_stance("force_eager"):
        yield request.param


@pytest.fixture(params=list(VARIANTS))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    model = gated_model(request.param)
    model.set_attn_implementation("eager")
    return model


def switch(model: PreTrainedModel, implementation: str) -> None:
    if model.config.gate_logit_lse_weight and implementation not in BACKENDS:
        pytest.skip("score-aware gates refuse it, see test_score_aware.py")
    # set_attn_implementation would ask for the package flash_attn.
    model.config._attn_implementation = implementation


def test_implementations_agree(model: PreTrainedModel, implementation: str, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        expected = model(tokens).logits
        switch(model, implementation)
        torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-5)


def test_implementations_agree_step_by_step(model: PreTrainedModel, implementation: str, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        expected = model(tokens).logits
        switch(model, implementation)
        output = model(tokens[:, :9])
        seen = [output.logits]
        for position in range(9, 33):
            output = model(tokens[:, position : position + 1], **with_cache(cache_of(output)))
            seen.append(output.logits)
        torch.testing.assert_close(torch.cat(seen, 1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model: PreTrainedModel, implementation: str, side: str, tokens: torch.Tensor) -> None:
    """The second sequence is shorter by 7, more than the sliding window, and its logits are as on its own."""
    real = slice(7, 33) if side == "left" else slice(0, 26)
    padded, mask = tokens.clone(), torch.zeros_like(tokens)
    mask[0], mask[1, real] = 1, 1
    padded[1, mask[1] == 0] = 0
    with torch.no_grad():
        expected = model(tokens[:1]).logits, model(tokens[1:, real]).logits
        switch(model, implementation)
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
        actual = model(padded, attention_mask=mask, position_ids=position_ids).logits
    torch.testing.assert_close(actual[:1], expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(actual[1:, real], expected[1], rtol=0, atol=1e-5)


def test_packed_sequences_equal_separate_ones(
    model: PreTrainedModel, implementation: str, tokens: torch.Tensor
) -> None:
    """Three sequences in one row, told apart by position_ids that restart; values and gradients."""
    row, parts = tokens.reshape(1, -1), tokens.reshape(-1).split([20, 33, 13])
    position_ids = torch.cat([torch.arange(len(sequence)) for sequence in parts])[None]
    expected = torch.cat([model(sequence[None]).logits for sequence in parts], 1)
    expected.square().sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    switch(model, implementation)
    has_gradient = implementation != "flex_attention"  # torch has none on CPU
    with torch.set_grad_enabled(has_gradient):
        actual = model(row, position_ids=position_ids, use_cache=False).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    if has_gradient:
        actual.square().sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-4, msg=name)


def test_sequences_that_nothing_tells_apart_are_one(tokens: torch.Tensor) -> None:
    """What the test above would find, were its position_ids ignored."""
    model = gated_model()
    with torch.no_grad():
        separate = torch.cat([model(sequence[None]).logits for sequence in tokens], 1)
        assert (model(tokens.reshape(1, -1)).logits - separate).abs().max() > 1e-3


def test_closed_gates_close_every_implementation(
    model: PreTrainedModel, implementation: str, tokens: torch.Tensor
) -> None:
    """Plain, padded and packed input; what is left is what the blocks compute without their attention."""
    mask = torch.ones_like(tokens)
    mask[1, :7] = 0
    positions = torch.cat([torch.arange(20), torch.arange(46)])[None]
    inputs: list[dict[str, torch.Tensor]] = [
        {"input_ids": tokens},
        {"input_ids": tokens, "attention_mask": mask},
        {"input_ids": tokens.reshape(1, -1), "position_ids": positions},
    ]
    switch(model, implementation)
    with torch.no_grad():
        for closed in (False, True):
            if closed:
                close_gates(model)
            for options in inputs:
                expected = model.lm_head(without_attention(model, options["input_ids"]))
                difference = (model(**options, use_cache=False).logits - expected).abs()
                if closed:
                    assert difference.max() < 1e-5
                else:
                    assert difference.max() > 1e-3


def test_attention_functions_get_what_they_need(tokens: torch.Tensor) -> None:
    """Flash attention makes no mask: it takes the window, and for packed sequences the lengths, from arguments."""
    seen = []

    def record(module: torch.nn.Module, *args: torch.Tensor, **kwargs: object) -> tuple[torch.Tensor, None]:
        seen.append((kwargs["sliding_window"], kwargs["dropout"], kwargs.pop("max_length_q")))
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("recording", record)
    model = gated_model("sliding upper layers", attention_dropout=0.25)
    model.set_attn_implementation("recording")
    model.train()(tokens, max_length_q=33)
    assert seen == [(None, 0.25, 33), (6, 0.25, 33), (6, 0.25, 33)]
    seen.clear()
    model.eval()(tokens, max_length_q=33)
    assert [dropout for _, dropout, _ in seen] == [0.0] * 3


def test_attentions_and_hidden_states_of_every_layer(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        output = model(tokens, output_attentions=True, output_hidden_states=True)
    assert [tuple(attention.shape) for attention in output.attentions] == [(2, 6, 33, 33)] * 3
    for attention in output.attentions:
        torch.testing.assert_close(attention.sum(-1), torch.ones(2, 6, 33))
    assert [tuple(hidden.shape) for hidden in output.hidden_states] == [(2, 33, 48)] * 4


def test_the_attention_is_written_as_vllm_reads_it() -> None:
    """Its Transformers backend parses `forward`: one call of what get_interface gave, under a name, with a scaling."""
    (function,) = ast.parse(textwrap.dedent(inspect.getsource(GatedLlamaAttention.forward))).body
    named = [
        (node.target if isinstance(node, ast.AnnAssign) else node.targets[0]).id
        for node in ast.walk(function)
        if isinstance(node, ast.Assign | ast.AnnAssign)
        and "ALL_ATTENTION_FUNCTIONS.get_interface(" in ast.unparse(node)
    ]
    assert len(named) == 1
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
    (call,) = [node for node in calls if isinstance(node.func, ast.Name) and node.func.id == named[0]]
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    assert keywords["scaling"] == "self.scaling"
    assert None in keywords  # **kwargs
    assert "super(" not in ast.unparse(function)
    attention = gated_model().model.layers[0].self_attn
    assert not hasattr(attention, "attn") and type(attention.layer_idx) is int
    assert GatedLlamaModel._supports_attention_backend
