"""Quantized checkpoints keep their tensors and their scheme, and their gates stay out of it."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from modeling_gated.conversion import ConversionError, convert_checkpoint, ungate_checkpoint, verify_checkpoint
from modeling_gated.conversion.quantization import SCHEMES, exclude_gates
from modeling_gated.modeling_gated_llama import GatedLlamaGate
from tests.helpers.source_models import randomize
from tests.helpers.tiny_configs import tiny_llama


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A bfloat16 Llama whose linears are large enough to be quantized in blocks."""
    config = tiny_llama(hidden_size=128, intermediate_size=256, max_position_embeddings=256)
    model = AutoModelForCausalLM.from_config(config)
    randomize(model)
    model.bfloat16().save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def rewrite(
    plain: Path, quantize: Callable[[str, torch.Tensor], dict[str, torch.Tensor]], quantization_config: dict
) -> None:
    """Quantize a checkpoint's linears by hand."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        tensors |= quantize(name, tensor.float()) if name.endswith("_proj.weight") else {name: tensor}
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(config | {"quantization_config": quantization_config}))


def bitsandbytes(plain: Path, **how: object) -> None:
    quantization = BitsAndBytesConfig(**how, bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=quantization, dtype=torch.bfloat16)
    model.save_pretrained(plain)


def compressed_tensors(plain: Path) -> None:
    def quantize(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        scale = weight.abs().amax(1, keepdim=True) / 127
        return {name: (weight / scale).round().to(torch.int8), f"{name}_scale": scale.bfloat16()}

    symmetric = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": symmetric | {"strategy": "channel"},
        "input_activations": symmetric | {"strategy": "token", "dynamic": True},
    }
    rewrite(
        plain,
        quantize,
        {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": ["lm_head"],
        },
    )


def fp8(plain: Path, **lists: list[str] | None) -> None:
    def quantize(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        blocks = weight.unflatten(0, (-1, 64)).unflatten(2, (-1, 64))
        scale = blocks.abs().amax((1, 3), keepdim=True) / 448
        quantized = (blocks / scale).flatten(2, 3).flatten(0, 1).to(torch.float8_e4m3fn)
        return {name: quantized, f"{name}_scale_inv": scale[:, 0, :, 0]}

    rewrite(
        plain,
        quantize,
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [64, 64]} | lists,
    )


REAL: dict[str, Callable[[Path], None]] = {
    "bitsandbytes, nf4": lambda plain: bitsandbytes(
        plain, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "bitsandbytes, int8": lambda plain: bitsandbytes(plain, load_in_8bit=True),
    "compressed-tensors, int8": compressed_tensors,
    "fp8": lambda plain: fp8(plain, modules_to_not_convert=None),
    "fp8, its other list": lambda plain: fp8(plain, ignored_layers=["lm_head"]),
}


@pytest.mark.parametrize("granularity", ["headwise", "elementwise"])
@pytest.mark.parametrize("name", list(REAL))
def test_a_quantized_checkpoint_computes_what_its_source_does(
    plain: Path, tmp_path: Path, tokens: torch.Tensor, name: str, granularity: str
) -> None:
    REAL[name](plain)
    convert_checkpoint(plain, tmp_path / "gated", granularity=granularity)
    shards = [plain / "model.safetensors", tmp_path / "gated" / "model-00001-of-00002.safetensors"]
    assert len({hashlib.sha256(path.read_bytes()).digest() for path in shards}) == 1

    source = AutoModelForCausalLM.from_pretrained(plain)
    gated, info = AutoModelForCausalLM.from_pretrained(tmp_path / "gated", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    gate = gated.model.layers[1].self_attn.g_proj
    assert type(gate) is GatedLlamaGate
    assert gate.weight.dtype == gate.bias.dtype == torch.bfloat16
    kinds = [type(model.model.layers[1].self_attn.q_proj) for model in (source, gated)]
    assert kinds[0] is kinds[1]
    assert type(gated.lm_head) is type(source.lm_head)
    with torch.no_grad():
        expected, actual = source(tokens).logits, gated(tokens).logits
    assert expected.float().std() > 0.1
    assert torch.equal(actual, expected)

    ungate_checkpoint(tmp_path / "gated", tmp_path / "back")
    for path in plain.iterdir():
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()


def test_verification_compares_the_tensors_of_a_quantized_checkpoint(plain: Path, tmp_path: Path) -> None:
    fp8(plain)
    convert_checkpoint(plain, tmp_path / "gated")
    verification = verify_checkpoint(plain, tmp_path / "gated")
    assert verification.passed and verification.max_difference is None
    assert verification.text == "the checkpoints are quantized"


@pytest.mark.parametrize("method", [name for name, scheme in SCHEMES.items() if scheme.fields])
@pytest.mark.parametrize("listed", [None, [], ["lm_head", "model.layers.1.mlp.down_proj"]])
def test_every_scheme_s_list_leaves_the_gates_alone_and_nothing_else(method: str, listed: list[str] | None) -> None:
    """By structure: with Transformers' own matching, or for compressed-tensors its `re:`."""
    field = SCHEMES[method].fields[0]
    before = {"quant_method": method, field: listed, "bits": 4}
    after = exclude_gates(before)
    assert before[field] is listed and {**after, field: listed} == before
    names = after[field]
    if method == "compressed-tensors":

        def is_left_alone(module: str) -> bool:
            return any(re.match(name.removeprefix("re:"), module) for name in names)
    else:

        def is_left_alone(module: str) -> bool:
            return not should_convert_module(module, names)

    assert is_left_alone("model.layers.0.self_attn.g_proj")
    assert is_left_alone("layers.11.self_attn.g_proj")  # of the base model alone
    for module in ("model.layers.0.mlp.gate_proj", "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"):
        assert not is_left_alone(module)
    if listed is None and method not in ("aqlm", "awq", "compressed-tensors"):
        assert is_left_alone("lm_head")  # as Transformers does by itself where there is no list
    if listed:
        assert names[:2] == listed


@pytest.mark.parametrize("method", ["gptq", "auto-round"])
def test_schemes_that_follow_the_checkpoint_need_no_entry(method: str) -> None:
    config = {"quant_method": method, "bits": 4}
    assert exclude_gates(config) == config


def test_a_config_from_before_there_was_a_quant_method() -> None:
    assert exclude_gates({"load_in_4bit": True})["llm_int8_skip_modules"][0] == "lm_head"


@pytest.mark.parametrize(
    ("quantization_config", "message"),
    [
        ({"quant_method": "hqq"}, "quant_method='hqq' is not among"),
        ({"quant_method": ["fp8"]}, r"quant_method=\['fp8'\] is not among"),
        (
            {"quant_method": "fp8", "modules_to_not_convert": "lm_head"},
            "modules_to_not_convert='lm_head' is not a list",
        ),
        ({"quant_method": "fp8", "ignored_layers": [1]}, r"ignored_layers=\[1\] is not a list"),
    ],
)
def test_other_schemes_are_refused_by_name(
    plain: Path, tmp_path: Path, quantization_config: dict, message: str
) -> None:
    rewrite(plain, lambda name, tensor: {name: tensor.bfloat16()}, quantization_config)
    with pytest.raises(ConversionError, match=rf"config\.json: quantization_config: {message}"):
        convert_checkpoint(plain, tmp_path / "gated")


def test_a_quantized_checkpoint_that_lacks_a_linear_is_refused(plain: Path, tmp_path: Path) -> None:
    fp8(plain)
    tensors = load_file(plain / "model.safetensors")
    missing = "model.layers.1.mlp.up_proj"
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(missing)}
    save_file(kept, plain / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=f"asks for {missing}, which is in no shard"):
        convert_checkpoint(plain, tmp_path / "gated")


def test_heads_that_the_stored_bytes_cannot_hold_are_refused(plain: Path, tmp_path: Path) -> None:
    fp8(plain)
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(config | {"model_type": "qwen3", "num_attention_heads": 2**30}))
    with pytest.raises(ConversionError, match=r"asks for model\.layers\.0\.self_attn\.q_proj of shape .* cannot hold"):
        convert_checkpoint(plain, tmp_path / "gated")


def test_another_config_of_a_quantized_checkpoint_does_not_pass(plain: Path, tmp_path: Path) -> None:
    fp8(plain)
    convert_checkpoint(plain, tmp_path / "gated")
    path = tmp_path / "gated" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"gate_scale": 3.0, "rms_norm_eps": 0.5}))
    verification = verify_checkpoint(plain, tmp_path / "gated")
    assert not verification.passed and verification.differing_fields == ("rms_norm_eps", "gate_scale")


def test_gates_have_the_dtype_of_what_is_not_quantized(plain: Path, tmp_path: Path, tokens: torch.Tensor) -> None:
    """Whatever the config says: bitsandbytes loads the embeddings, norms and gates as they are stored."""
    bitsandbytes(plain, load_in_8bit=True)
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    done = convert_checkpoint(plain, tmp_path / "gated")
    assert done.config.dtype == torch.bfloat16
    with torch.no_grad():
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "gated")(tokens).logits.isfinite().all()
