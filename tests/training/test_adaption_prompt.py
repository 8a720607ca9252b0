"""PEFT's adaption prompts in a gated model: those of the ungated model, at the start and after training."""

from typing import Any

import pytest
import torch
from peft import AdaptionPromptConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from modeling_gated import GatedLlamaConfig
from tests.helpers.source_models import SIZES


CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, head_dim=8, sliding_window=4),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
}


def adapted(model: Any) -> Any:
    config = AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM")
    torch.manual_seed(1)
    actual = get_peft_model(model, config)
    for name, parameter in actual.named_parameters():
        if "adaption_gate" in name:  # at 0 the prompts have no effect
            parameter.data.fill_(0.5)
    return actual


@pytest.mark.parametrize("family", CONFIGS)
def test_prompts_have_the_effect_that_they_have_in_the_source(family: str, tmp_path: Any) -> None:
    config = CONFIGS[family]
    torch.manual_seed(0)
    source = AutoModelForCausalLM.from_config(config)
    gated = AutoModelForCausalLM.from_config(GatedLlamaConfig.from_source_config(config))
    gated.load_state_dict(source.state_dict(), strict=False)
    plain = gated(torch.arange(12)[None]).logits.detach()
    ids = torch.arange(12)[None]
    models = [adapted(gated)] + ([adapted(source)] if family in ("llama", "mistral") else [])  # the two that PEFT knows
    losses = []
    for model in models:
        optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.01)
        losses.append([])
        for _ in range(3):
            loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0][2] < losses[0][0]
    assert all(other == pytest.approx(losses[0], rel=1e-5) for other in losses[1:])
    changed = models[0].eval()(ids).logits.detach()
    assert (changed - plain).abs().max() > 1e-3

    # A cached step gives what the whole text does; an adapter comes back as it was saved.
    tokens = models[0].generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(models[0](tokens).logits[:, 11:-1].argmax(-1), tokens[:, 12:])
    models[0].save_pretrained(tmp_path)
    fresh = AutoModelForCausalLM.from_config(GatedLlamaConfig.from_source_config(config))
    fresh.load_state_dict(source.state_dict() if len(models) == 1 else _base(models[0]), strict=False)
    torch.testing.assert_close(PeftModel.from_pretrained(fresh, tmp_path).eval()(ids).logits, changed)


def _base(model: Any) -> dict[str, torch.Tensor]:
    """The weights of the model under the adapter, by the names that they have without it."""
    named = model.get_base_model().state_dict()
    return {name.replace("self_attn.model.", "self_attn."): tensor for name, tensor in named.items()}


def test_queries_of_gated_projections_are_gated(tmp_path: Any) -> None:
    """Against the block's own queries, which the attention function gets."""
    from modeling_gated.peft_additions import _query_states

    config = GatedLlamaConfig(**SIZES, gate_position=["G1", "G4"], use_qk_norm=True, gate_granularity="elementwise")
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "g_q_proj" in name or "q_norm" in name:
                parameter.normal_()
    seen = []

    def record(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(_query_states(module, **kwargs))

    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    queries = []

    def attention(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        queries.append(query)
        return sdpa_attention_forward(module, query, *args, **kwargs)

    AttentionInterface.register("recording", attention)
    model.set_attn_implementation("recording")
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(record, with_kwargs=True)
    model(torch.arange(7)[None])
    assert len(seen) == len(queries) == SIZES["num_hidden_layers"]
    for one, other in zip(seen, queries, strict=True):
        torch.testing.assert_close(one, other)
