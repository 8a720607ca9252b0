"""The promise: a converted model's logits equal its source's bit for bit."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from modeling_gated import GatedLlamaForCausalLM
from modeling_gated.conversion import convert_checkpoint
from tests.helpers.checkpoints import contents, forget_gates


@pytest.mark.fast(only="bfloat16-headwise-single")
@pytest.mark.parametrize("max_shard_size", ["50GB", "60KB"], ids=["single", "sharded"])
@pytest.mark.parametrize("granularity", ["headwise", "elementwise"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_logits_are_bit_identical(
    source_model: PreTrainedModel,
    tokens: torch.Tensor,
    tmp_path: Path,
    dtype: torch.dtype,
    granularity: str,
    max_shard_size: str,
) -> None:
    source, output = tmp_path / "source", tmp_path / "output"
    source_model.to(dtype).save_pretrained(source, max_shard_size=max_shard_size)
    shards = sorted(path.name for path in source.glob("*.safetensors"))
    assert (shards == ["model.safetensors"]) == (max_shard_size == "50GB")
    before = contents(source)

    convert_checkpoint(source, output, granularity=granularity)

    after = contents(output)
    assert contents(source) == before
    assert [after[f"model-{n + 1:05}-of-{len(shards) + 1:05}.safetensors"] for n in range(len(shards))] == [
        before[name] for name in shards
    ]
    reloaded = AutoModelForCausalLM.from_pretrained(source)
    gated, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert type(gated) is GatedLlamaForCausalLM
    assert gated.dtype == dtype
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (gated.get_output_embeddings().weight is gated.get_input_embeddings().weight) == (
        source_model.config.tie_word_embeddings
    )
    with torch.no_grad():
        expected, actual = reloaded(tokens).logits, gated(tokens).logits
        assert expected.std() > 0.1
        assert torch.equal(actual, expected)
        for implementation in ("eager", "sdpa"):
            reloaded.set_attn_implementation(implementation)
            gated.set_attn_implementation(implementation)
            assert torch.equal(gated(tokens).logits, reloaded(tokens).logits)
    generate = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1}
    assert torch.equal(gated.generate(tokens[:1, :12], **generate), reloaded.generate(tokens[:1, :12], **generate))


@pytest.mark.parametrize("gate_init", [0.02, 0.5, 0.7, 0.95, 0.999])
def test_identity_holds_for_any_opening(llama: Path, tokens: torch.Tensor, tmp_path: Path, gate_init: float) -> None:
    convert_checkpoint(llama, tmp_path / "gated", granularity="elementwise", gate_init=gate_init)
    gated = AutoModelForCausalLM.from_pretrained(tmp_path / "gated")
    bias = gated.model.layers[0].self_attn.g_proj.bias
    assert torch.sigmoid(bias).mean().item() == pytest.approx(gate_init, abs=0.004 if gate_init >= 0.4 else 0.015)
    with torch.no_grad():
        assert torch.equal(gated(tokens).logits, AutoModelForCausalLM.from_pretrained(llama)(tokens).logits)


@pytest.mark.parametrize(
    "stray",
    [
        {"sliding_window": 4},
        {"layer_types": ["sliding_attention"] * 3, "sliding_window": 4},
        {"use_qk_norm": True, "attention_output_bias": True},
        {"gate_scale": 3.0, "gate_init": 0.5, "gate_bias": False, "gate_granularity": "elementwise"},
        {"max_window_layers": 0, "use_sliding_window": True, "sliding_window": 4},
    ],
    ids=lambda stray: next(iter(stray)),
)
def test_fields_that_the_source_does_not_read_change_nothing(
    llama: Path, tokens: torch.Tensor, tmp_path: Path, stray: dict
) -> None:
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | stray))
    convert_checkpoint(llama, tmp_path / "gated")
    source = AutoModelForCausalLM.from_pretrained(llama)
    gated = AutoModelForCausalLM.from_pretrained(tmp_path / "gated")
    with torch.no_grad():
        assert torch.equal(gated(tokens).logits, source(tokens).logits)


@pytest.mark.fast
def test_padding_and_training_mode_are_identical_too(llama: Path, tokens: torch.Tensor, tmp_path: Path) -> None:
    convert_checkpoint(llama, tmp_path / "gated")
    source = AutoModelForCausalLM.from_pretrained(llama).train()
    gated = AutoModelForCausalLM.from_pretrained(tmp_path / "gated").train()
    mask = (torch.arange(33) >= torch.tensor([[0], [5]])).long()
    losses = [model(tokens, attention_mask=mask, labels=tokens).loss for model in (source, gated)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    gradients = dict(gated.named_parameters())
    for name, parameter in source.named_parameters():
        assert torch.equal(gradients[name].grad, parameter.grad), name


@pytest.mark.fast
def test_gates_learn_from_the_first_step(llama: Path, tokens: torch.Tensor, tmp_path: Path) -> None:
    convert_checkpoint(llama, tmp_path / "gated")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "gated")
    gates = {name: parameter for name, parameter in model.named_parameters() if "g_proj" in name}
    before = {name: gate.detach().clone() for name, gate in gates.items()}
    optimizer = torch.optim.SGD(gates.values(), lr=1.0)
    first = model(tokens, labels=tokens).loss
    first.backward()
    assert all(torch.all(gate.grad != 0) for gate in gates.values())
    optimizer.step()
    assert all(torch.all(gate != before[name]) for name, gate in gates.items())
    assert model(tokens, labels=tokens).loss < first


def test_a_checkpoint_without_its_gate_shard_is_still_the_identity(
    sharded: Path, tokens: torch.Tensor, tmp_path: Path
) -> None:
    convert_checkpoint(sharded, tmp_path / "gated", granularity="elementwise", gate_init=0.9)
    index = tmp_path / "gated" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    gate_shards = {file for name, file in content["weight_map"].items() if "g_proj" in name}
    assert len(gate_shards) == 1
    (tmp_path / "gated" / gate_shards.pop()).unlink()
    forget_gates(tmp_path / "gated")

    gated, info = AutoModelForCausalLM.from_pretrained(tmp_path / "gated", output_loading_info=True)
    assert len(info["missing_keys"]) == 6
    with torch.no_grad():
        assert torch.equal(gated(tokens).logits, AutoModelForCausalLM.from_pretrained(sharded)(tokens).logits)
