"""Checkpoints with their gates in `q_proj`: taken apart, they compute what they did."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM

from modeling_gated import GatedLlamaForCausalLM
from modeling_gated.checkpoints.safetensors_file import Shard
from modeling_gated.conversion import (
    ConversionError,
    convert_checkpoint,
    plan_conversion,
    ungate_checkpoint,
    verify_checkpoint,
)
from modeling_gated.modeling_gated_llama import GatedLlamaAttention
from tests.helpers.cache_by_version import NAME
from tests.helpers.fused_reference import fused_logits


CONFIG = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_qwen3.Qwen3ForCausalLM"},
    "vocab_size": 96,
    "hidden_size": 72,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_qk_norm": True,
    "qkv_bias": False,
}
FORMATS = {  # name: fields of the config, layout, rows of q_proj
    "authors, headwise": ({"headwise_attn_output_gate": True, "elementwise_attn_output_gate": False}, "grouped", 102),
    "authors, elementwise": ({"elementwise_attn_output_gate": True}, "grouped", 192),
    "authors, headwise, no QK-norm": ({"headwise_attn_output_gate": True, "use_qk_norm": False}, "grouped", 102),
    "authors, elementwise, biases": ({"elementwise_attn_output_gate": True, "qkv_bias": True}, "grouped", 192),
    "Qwen3-Next's rows in a Qwen3": ({"attn_output_gate": True}, "per head", 192),
}


def write_fused(directory: Path, fields: dict[str, Any], rows: int, dtype: torch.dtype = torch.float32) -> None:
    """A random checkpoint in two shards, the layers' `q_proj` of `rows` rows."""
    config = CONFIG | fields
    queries, keys = 96, 32
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (96, 72)}
    for layer in range(3):
        p = f"model.layers.{layer}."
        for name, shape in {"q": (rows, 72), "k": (keys, 72), "v": (keys, 72), "o": (72, queries)}.items():
            shapes[f"{p}self_attn.{name}_proj.weight"] = shape
            if config["qkv_bias"]:
                shapes[f"{p}self_attn.{name}_proj.bias"] = shape[:1]
        for name, shape in {"gate": (80, 72), "up": (80, 72), "down": (72, 80)}.items():
            shapes[f"{p}mlp.{name}_proj.weight"] = shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{p}{name}.weight"] = (72,)
        if config["use_qk_norm"]:
            shapes[f"{p}self_attn.q_norm.weight"] = shapes[f"{p}self_attn.k_norm.weight"] = (16,)
    shapes |= {"model.norm.weight": (72,), "lm_head.weight": (96, 72)}
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in shapes.items():
        weights[name] = (0.2 * torch.randn(shape, generator=generator) + ("norm" in name)).to(dtype)
    directory.mkdir()
    upper = {name for name in weights if ".layers.2." in name or "lm_head" in name}
    for file, names in (("a.safetensors", weights.keys() - upper), ("b.safetensors", upper)):
        save_file({name: weights[name] for name in sorted(names)}, directory / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: f"{'ab'[name in upper]}.safetensors" for name in weights}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(config))


def load_all(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("name", list(FORMATS))
def test_an_imported_checkpoint_computes_what_its_fused_source_does(
    tmp_path: Path, tokens: torch.Tensor, name: str
) -> None:
    fields, layout, rows = FORMATS[name]
    write_fused(tmp_path / "source", fields, rows)
    done = convert_checkpoint(tmp_path / "source", tmp_path / "gated")
    assert done.config.gate_granularity == ("headwise" if "headwise" in name else "elementwise")
    assert done.config.gate_scale == 1.0
    assert done.config.gate_bias == ("biases" in name)
    raw = json.loads((tmp_path / "gated" / "config.json").read_text())
    assert not raw.keys() & {"attn_output_gate", "headwise_attn_output_gate", "elementwise_attn_output_gate"}

    gated, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "gated", dtype=torch.float64, output_loading_info=True
    )
    assert type(gated) is GatedLlamaForCausalLM
    assert not info["missing_keys"] and not info["unexpected_keys"]
    weights, config = load_all(tmp_path / "source"), CONFIG | fields
    for sequence in tokens:
        expected = fused_logits(weights, config, sequence, layout)
        assert expected.std() > 0.5
        with torch.no_grad():
            actual = gated(sequence[None]).logits[0]
        # The model's sigmoid and its frequencies of RoPE are float32.
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0)
        # A gate that belongs to another head would show.
        assert (
            fused_logits(weights, config, sequence, "per head" if layout == "grouped" else "grouped") - expected
        ).abs().max() > 0.1


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_imported_tensors_are_the_source_s_rows(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    fields, layout, rows = FORMATS[name]
    write_fused(tmp_path / "source", fields, rows, dtype)
    convert_checkpoint(tmp_path / "source", tmp_path / "gated")
    source, gated = load_all(tmp_path / "source"), load_all(tmp_path / "gated")
    assert source.keys() == {name for name in gated if "g_proj" not in name}
    blocks = 2 if layout == "grouped" else 6
    queries, gates = 96 // blocks, (rows - 96) // blocks
    for name, tensor in source.items():
        if "q_proj" not in name:
            assert torch.equal(gated[name], tensor)
            continue
        for block, group in enumerate(tensor.split(queries + gates)):
            q = gated[name][block * queries : (block + 1) * queries]
            g = gated[name.replace("q_proj", "g_proj")][block * gates : (block + 1) * gates]
            assert torch.equal(group, torch.cat([q, g]))


def qwen3_next(**fields: Any) -> Qwen3NextConfig:
    sizes = {
        name: CONFIG[name] for name in CONFIG if name.startswith(("num_", "hidden_", "inter", "vocab", "head_dim"))
    }
    return Qwen3NextConfig(
        **sizes
        | {
            "layer_types": ["full_attention"] * 3,
            "num_experts": 0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        }
        | fields
    )


@pytest.mark.parametrize("attention_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_qwen3_next_s_layers_against_transformers_own(
    tmp_path: Path, tokens: torch.Tensor, attention_bias: bool, dtype: torch.dtype
) -> None:
    source = Qwen3NextForCausalLM(qwen3_next(attention_bias=attention_bias)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    source.to(dtype).save_pretrained(tmp_path / "source")
    done = convert_checkpoint(tmp_path / "source", tmp_path / "gated")
    assert done.config.gate_granularity == "elementwise" and done.config.use_qk_norm
    # In float32 whatever the checkpoint's dtype: bfloat16 rounds at other places.
    source = Qwen3NextForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32)
    gated = AutoModelForCausalLM.from_pretrained(tmp_path / "gated", dtype=torch.float32)
    with torch.no_grad():
        expected, actual = source(tokens).logits, gated(tokens).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", list(FORMATS))
def test_an_import_is_verified_by_its_tensors(tmp_path: Path, name: str) -> None:
    fields, _, rows = FORMATS[name]
    write_fused(tmp_path / "source", fields, rows)
    convert_checkpoint(tmp_path / "source", tmp_path / "gated")
    verification = verify_checkpoint(tmp_path / "source", tmp_path / "gated")
    assert verification.passed and verification.max_difference is None
    assert verification.text == "Transformers has no model of the source's format"
    for path in (tmp_path / "gated").glob("*.safetensors"):
        tensors = load_file(path)
        if changed := [name for name in tensors if "layers.1.self_attn.g_proj.weight" in name]:
            tensors[changed[0]][3] += 1
            save_file(tensors, path, metadata={"format": "pt"})
    verification = verify_checkpoint(tmp_path / "source", tmp_path / "gated")
    assert not verification.passed and verification.differing == ("model.layers.1.self_attn.q_proj.weight",)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_qwen3_next_is_verified_by_its_logits_too(tmp_path: Path, dtype: torch.dtype) -> None:
    source = Qwen3NextForCausalLM(qwen3_next())
    source.to(dtype).save_pretrained(tmp_path / "source", max_shard_size="100KB")
    convert_checkpoint(tmp_path / "source", tmp_path / "gated")
    verification = verify_checkpoint(tmp_path / "source", tmp_path / "gated")
    assert verification.passed, verification
    assert verification.max_difference is not None and not verification.differing


def test_an_import_that_generates_otherwise_does_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its verdict has a tolerance, which is not for a mask that is forgotten."""
    Qwen3NextForCausalLM(qwen3_next()).save_pretrained(tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "gated")
    forward = GatedLlamaAttention.forward

    def without_mask(self: Any, hidden_states: torch.Tensor, **keywords: Any) -> Any:
        if keywords.get(NAME) is not None:
            keywords["attention_mask"] = None
        return forward(self, hidden_states, **keywords)

    monkeypatch.setattr(GatedLlamaAttention, "forward", without_mask)
    verification = verify_checkpoint(tmp_path / "source", tmp_path / "gated")
    assert not verification.passed and verification.max_difference is not None and verification.max_difference < 1e-4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_types": ["full_attention", "linear_attention", "full_attention"]}, "layer 1 of this qwen3_next"),
        ({"num_experts": 4, "num_experts_per_tok": 2}, "layer 0 is a mixture of experts"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}}, "=0.25"),
    ],
)
def test_what_is_no_qwen3_around_its_gates_is_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    config = qwen3_next(**fields | {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8})
    Qwen3NextForCausalLM(config).save_pretrained(tmp_path / "source")
    with pytest.raises(ConversionError, match=rf"config\.json: .*{message}"):
        convert_checkpoint(tmp_path / "source", tmp_path / "gated")
    assert not (tmp_path / "gated").exists()


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({"attn_output_gate": True}, {}, "more than one of"),
        ({"elementwise_attn_output_gate": True}, {}, "more than one of"),
        ({}, {"granularity": "elementwise"}, "gate_granularity='elementwise' does not apply"),
        ({}, {"gate_init": 0.9}, "gate_init=0.9 does not apply"),
        ({"quantization_config": {"quant_method": "fp8"}}, {}, "quantized checkpoints with fused gates"),
        ({"num_attention_heads": 12}, {}, r"q_proj\.weight has shape \[102, 72\], config.json asks for \[204, 72\]"),
        ({"headwise_attn_output_gate": False}, {}, r"q_proj\.weight has shape \[102, 72\]"),
    ],
)
def test_contradictions_are_refused(
    tmp_path: Path, fields: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    write_fused(tmp_path / "source", {"headwise_attn_output_gate": True} | fields, 102)
    with pytest.raises(ConversionError, match=message):
        convert_checkpoint(tmp_path / "source", tmp_path / "gated", **options)
    assert not (tmp_path / "gated").exists()


def test_a_stated_granularity_that_is_the_source_s_is_fine(tmp_path: Path) -> None:
    write_fused(tmp_path / "source", {"headwise_attn_output_gate": True}, 102)
    plan = plan_conversion(tmp_path / "source", tmp_path / "gated", granularity="headwise")
    assert plan.gate_parameters == 3 * 6 * 72


def test_rows_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No part that is read is larger than a block's rows, nor, of other tensors, than the size of a chunk."""
    sizes = []
    chunks = Shard.chunks

    def spy(shard: Shard, tensor: str, *where: int):
        for chunk in chunks(shard, tensor, *where):
            sizes.append((tensor, len(chunk)))
            yield chunk

    monkeypatch.setattr(Shard, "chunks", spy)
    monkeypatch.setattr("modeling_gated.checkpoints.files.CHUNK", 1000)
    write_fused(tmp_path / "source", {"headwise_attn_output_gate": True}, 102)
    convert_checkpoint(tmp_path / "source", tmp_path / "gated")
    assert {tensor for tensor, _ in sizes} == load_all(tmp_path / "source").keys()
    assert max(size for _, size in sizes) == 1000


def test_there_is_no_way_back_from_an_import(tmp_path: Path) -> None:
    write_fused(tmp_path / "source", {"headwise_attn_output_gate": True}, 102)
    convert_checkpoint(tmp_path / "source", tmp_path / "gated")
    with pytest.raises(ConversionError, match="its gates come from the source"):
        ungate_checkpoint(tmp_path / "gated", tmp_path / "back")
