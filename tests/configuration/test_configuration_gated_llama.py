import json
import math
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig, Qwen3Config

from modeling_gated import GatedLlamaConfig
from modeling_gated.configuration import initial_gate_bias, open_gate
from tests.helpers.tiny_configs import tiny_llama


@pytest.mark.fast
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gate_init": 0.0}, r"gate_init.*0\.0"),
        ({"gate_init": 1.0}, r"gate_init.*1\.0"),
        ({"gate_init": -0.5}, r"gate_init.*-0\.5"),
        ({"gate_init": float("nan")}, r"gate_init.*nan"),
        ({"gate_init": 1 - 1e-12}, r"gate_init=0\.999999999999"),
        ({"gate_init": "0.85"}, r"gate_init.*0\.85"),
        ({"gate_granularity": "channelwise"}, r"gate_granularity.*channelwise"),
        ({"gate_activation": "softmax"}, r"gate_activation.*softmax"),
        ({"gate_form": "residual"}, r"gate_form.*residual"),
        ({"gate_position": ["G6"]}, r"gate_position must be among G1, G2, G3, G4, G5, got 'G6'"),
        ({"gate_position": "G1"}, r"gate_position.*expected a list"),
        ({"gate_position": ["G1", "G2", "G1"]}, r"gate_position must name each position once"),
        ({"gate_position": ["G5"]}, r"gate_position.*'G5'.*no heads.*gate_granularity='elementwise'.*'headwise'"),
        (
            {"gate_position": ["G1", "G5"], "gate_granularity": "elementwise", "gate_head_shared": True},
            r"gate_position.*'G5'.*no heads.*gate_head_shared=False.*True",
        ),
        ({"gate_position": ["G3"], "use_qk_norm": True}, r"\['G3'\].*headwise.*use_qk_norm=True: the norm divides"),
        (
            {"gate_position": ["G4"], "use_qk_norm": True, "gate_head_shared": True, "gate_activation": "tanh"},
            r"\['G4'\].*headwise.*use_qk_norm=True: the norm divides",
        ),
        (
            {"gate_head_shared": True, "use_sandwich_norm": True},
            r"\['G1'\].*headwise.*gate_head_shared=True.*use_sandwich_norm=True: the norm divides",
        ),
        (
            {"gate_position": ["G2"], "gate_input_independent": True, "use_attention_output_norm": True},
            r"\['G2'\].*headwise.*use_attention_output_norm=True: the norm divides",
        ),
        (
            {
                "gate_position": ["G2"],
                "gate_head_shared": True,
                "gate_input_independent": True,
                "use_sandwich_norm": True,
            },
            r"\['G2'\].*headwise.*use_sandwich_norm=True: the norm divides",
        ),
        ({"gate_activation": "tanh", "gate_init": 1 - 1e-12}, r"gate_init=0\.9999.*too close to 1.*tanh"),
        ({"gate_activation": "linear", "gate_init": 1e-45}, r"gate_init=.*too close to 0.*linear"),
        ({"gate_form": "additive"}, r"gate_form='additive' with gate_activation='sigmoid', which is never 0"),
        ({"gate_form": "additive", "gate_activation": "ns_sigmoid"}, r"gate_activation='ns_sigmoid', which is never 0"),
        ({"gate_form": "additive", "gate_activation": "relu"}, r"'additive'.*'relu'.*gate_bias=True.*no gradient"),
        (
            {"gate_input_independent": True, "gate_bias": False},
            r"gate_bias must be True with gate_input_independent=True",
        ),
        ({"gate_activation": "ns_sigmoid", "gate_init": 0.5}, r"gate_init must be between 0\.5 and 1.*got 0\.5"),
        ({"hidden_act": "swish7"}, r"hidden_act='swish7' is not among gelu"),
        ({"attention_output_activation": "swish7"}, r"attention_output_activation.*swish7"),
        ({"use_glu": "yes"}, r"use_glu.*yes"),
        ({"gate_scale": 0.0}, r"gate_scale must be .*got 0\.0"),
        ({"gate_scale": float("inf")}, r"gate_scale must be .*got inf"),
        ({"num_attention_heads": 32, "num_key_value_heads": 5}, r"num_attention_heads=32.*num_key_value_heads=5"),
        ({"hidden_size": 100, "num_attention_heads": 3}, r"hidden_size=100.*num_attention_heads=3"),
        ({"num_attention_heads": 0}, r"num_attention_heads must be at least 1, got 0"),
        ({"hidden_size": -1}, r"hidden_size must be at least 1, got -1"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers must be at least 1, got 0"),
        ({"head_dim": 0}, r"head_dim must be even and .*got 0"),
        ({"head_dim": 65}, r"head_dim.*65"),
        ({"sliding_window": 0}, r"sliding_window must be at least 1, got 0"),
        ({"layer_types": ["sliding_attention"] * 32}, r"sliding_window=None"),
        ({"layer_types": ["full_attention"]}, r"num_hidden_layers.*32.*1"),
        ({"layer_types": ["conv"] * 32}, r"layer_types.*conv"),
    ],
)
def test_nonsense_is_refused_by_field_and_value(fields: dict, message: str) -> None:
    with pytest.raises((StrictDataclassError, ValueError), match=f"(?s){message}"):
        GatedLlamaConfig(**fields)


def test_a_value_that_becomes_nonsense_is_not_saved(tmp_path: Path) -> None:
    config = GatedLlamaConfig(num_hidden_layers=2)
    config.gate_scale = -1.0
    with pytest.raises(StrictDataclassError, match=r"gate_scale must be .*got -1\.0"):
        config.save_pretrained(tmp_path / "config")
    assert not (tmp_path / "config" / "config.json").exists()


def test_head_dim_frees_hidden_size() -> None:
    assert GatedLlamaConfig(hidden_size=100, num_attention_heads=3, num_key_value_heads=1, head_dim=32).head_dim == 32


def test_layer_types_follow_the_sliding_window() -> None:
    assert GatedLlamaConfig(num_hidden_layers=2).layer_types == ["full_attention"] * 2
    assert GatedLlamaConfig(num_hidden_layers=2, sliding_window=8).layer_types == ["sliding_attention"] * 2


@pytest.mark.fast
def test_save_and_load_keep_every_field(tmp_path: Path) -> None:
    config = GatedLlamaConfig(
        num_hidden_layers=2,
        sliding_window=8,
        layer_types=["full_attention", "sliding_attention"],
        attention_bias=True,
        attention_output_bias=True,
        use_qk_norm=True,
        gate_granularity="elementwise",
        gate_init=0.7,
        gate_scale=1.5,
        gate_bias=False,
        gate_position=["G1", "G2"],
        gate_head_shared=True,
        gate_form="additive",
        gate_activation="silu",
        use_attention_output_norm=True,
        attention_output_activation="tanh",
        use_sandwich_norm=True,
        use_glu=False,
        hidden_act="gelu",
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, GatedLlamaConfig)
    expected, actual = config.to_dict(), loaded.to_dict()
    assert {key: actual[key] for key in expected if key != "_name_or_path"} == {
        key: value for key, value in expected.items() if key != "_name_or_path"
    }
    assert "attn_output_gate" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.fast
def test_from_source_config_keeps_what_the_source_says(source_config: PreTrainedConfig) -> None:
    before = source_config.to_dict()
    config = GatedLlamaConfig.from_source_config(source_config, gate_granularity="elementwise")
    assert source_config.to_dict() == before

    new = {
        "transformers_version",
        "model_type",
        "layer_types",
        "attention_bias",
        "use_sliding_window",
        "max_window_layers",
        "attention_out_bias",
        "residual_dropout",
        "clip_qkv",
    }
    for name, value in before.items():
        if name not in new and not name.startswith("_"):
            assert getattr(config, name) == value, name
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(source_config)
    attention = model.model.layers[0].self_attn
    assert config.attention_bias == (attention.q_proj.bias is not None)
    assert config.attention_output_bias == (attention.o_proj.bias is not None)
    assert config.mlp_bias == (model.model.layers[0].mlp.down_proj.bias is not None)
    assert config.use_qk_norm == hasattr(attention, "q_norm")
    sliding = [kind == "sliding_attention" for kind in config.layer_types]
    if source_config.model_type == "mistral":
        assert sliding == [source_config.sliding_window is not None] * 3
    else:
        assert sliding == [kind == "sliding_attention" for kind in getattr(source_config, "layer_types", [""] * 3)]
    assert config.gate_granularity == "elementwise"
    assert config.gate_scale == open_gate(0.85)[1]
    assert config.model_type == "gated_llama"


@pytest.mark.parametrize("field", ["attn_output_gate", "headwise_attn_output_gate", "elementwise_attn_output_gate"])
def test_what_engines_read_as_a_double_q_proj_is_not_carried_over(field: str) -> None:
    assert field not in GatedLlamaConfig.from_source_config(Qwen3Config(**{field: True})).to_dict()


def test_other_families_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'gpt2' is not supported"):
        GatedLlamaConfig.from_source_config(GPT2Config())
    with pytest.raises(ValueError, match="already gated"):
        GatedLlamaConfig.from_source_config(GatedLlamaConfig())
    for gate_init in (1.5, "open"):
        with pytest.raises(StrictDataclassError, match=f"(?s)gate_init.*{gate_init}"):
            GatedLlamaConfig.from_source_config(LlamaConfig(), gate_init=gate_init)


@pytest.mark.parametrize(
    "fields",
    [
        {"gate_position": [], "gate_form": "additive"},  # there is no gate to object to
        {"gate_position": ["G3", "G4"], "use_qk_norm": True, "gate_granularity": "elementwise"},
        {"use_qk_norm": True, "use_sandwich_norm": True, "use_attention_output_norm": True},
        {"gate_head_shared": True, "use_sandwich_norm": True, "attention_output_bias": True},
        {"gate_position": ["G2"], "use_attention_output_norm": True},  # tokens' gates differ
        {"gate_position": ["G2"], "gate_head_shared": True, "use_sandwich_norm": True},
        {
            "gate_position": ["G2"],
            "gate_head_shared": True,
            "gate_input_independent": True,
            "use_sandwich_norm": True,
            "attention_output_activation": "tanh",
        },
        {"gate_form": "additive", "gate_activation": "relu", "gate_bias": False},
    ],
)
def test_what_makes_sense_is_accepted(fields: dict) -> None:
    assert GatedLlamaConfig(**fields).to_diff_dict().items() >= fields.items()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gate_form": "additive"}, "gate_form='additive'"),
        ({"gate_position": ["G5"]}, "'G5'"),
        ({"gate_position": ["G9"]}, "'G9'"),
        ({"gate_activation": "ns_sigmoid", "gate_init": 0.3}, r"gate_init must be between 0\.5 and 1.*got 0\.3"),
    ],
)
def test_a_config_that_became_nonsense_makes_no_model(fields: dict, message: str, tmp_path: Path) -> None:
    """Whether it was changed, or loaded with other values: not only its first save is refused."""
    config = tiny_llama(GatedLlamaConfig)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path, **fields)
    for name, value in fields.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_config(config)


@pytest.mark.fast
@settings(deadline=None, max_examples=300)
@given(st.floats(1e-4, 1 - 1e-4))
@example(0.85)
@example(0.5)
@example(0.5 + 1e-7)
@example(0.4998)
@example(0.02047)  # torch's vectorised exp is off by 0.78 units there, its scalar one by 0.22
def test_an_open_gate_is_exactly_one(gate_init: float) -> None:
    bias, scale = open_gate(gate_init)
    assert abs(1 / (1 + math.exp(-bias)) - gate_init) < (0.004 if gate_init >= 0.4 else 0.015)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert torch.tensor(bias, dtype=dtype).item() == bias
    assert torch.tensor(scale, dtype=torch.float32).item() == scale
    # One element, several, and more than a vector register holds: three code paths of torch's sigmoid.
    for size in (1, 7, 577):
        assert torch.all(torch.sigmoid(torch.full((size,), bias)) * scale == 1)


def test_the_default_opening_is_the_nearest_bfloat16() -> None:
    assert open_gate(0.85)[0] == torch.tensor(math.log(0.85 / 0.15), dtype=torch.bfloat16).item()


@pytest.mark.parametrize("gate_init", [1e-300, 1 - 1e-12])
def test_an_opening_without_slope_is_refused(gate_init: float) -> None:
    with pytest.raises(ValueError, match="flat"):
        open_gate(gate_init)


ACTIVATIONS = {
    "sigmoid": torch.sigmoid,
    "ns_sigmoid": lambda x: 0.5 + 0.5 * torch.sigmoid(x),
    "silu": torch.nn.functional.silu,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "linear": lambda x: x,
}


@pytest.mark.fast
@settings(deadline=None)
@given(st.floats(1e-3, 1 - 1e-3), st.sampled_from(list(ACTIVATIONS)))
def test_a_gate_starts_where_the_config_says(gate_init: float, activation: str) -> None:
    if activation == "ns_sigmoid":
        gate_init = 0.5 + gate_init / 2
    bias = torch.tensor(initial_gate_bias(gate_init, activation), dtype=torch.float64)
    assert bias.bfloat16().double() == bias
    assert ACTIVATIONS[activation](bias).item() == pytest.approx(gate_init, abs=0.015, rel=0.01)


def test_additive_gates_start_at_nothing() -> None:
    for activation in ("silu", "tanh", "linear"):
        bias = torch.tensor(initial_gate_bias(0.85, activation, "additive"), requires_grad=True)
        gate = ACTIVATIONS[activation](bias)
        assert gate == 0
        assert torch.autograd.grad(gate, bias)[0] >= 0.5


def test_gates_of_other_forms_get_no_scale_from_a_source() -> None:
    """The scale makes a sigmoid gate that multiplies 1; any other would be changed by it for nothing."""
    expected = open_gate(0.85)[1]
    for fields, scale in (
        ({"gate_position": ["G2"], "gate_input_independent": True}, expected),
        ({"gate_form": "additive", "gate_activation": "silu"}, 1.0),
        ({"gate_activation": "tanh"}, 1.0),
        ({"gate_bias": False}, 1.0),
        ({"gate_scale": 2.0}, 2.0),
        ({"gate_position": []}, 1.0),
    ):
        assert GatedLlamaConfig.from_source_config(LlamaConfig(), **fields).gate_scale == scale


def test_the_tensor_parallel_plan_follows_the_fields() -> None:
    """Also when they change later; and no plan is saved."""
    config = GatedLlamaConfig(num_hidden_layers=2)
    assert config.base_model_tp_plan == LlamaConfig.base_model_tp_plan | {"layers.*.self_attn.g_proj": "colwise"}
    config.gate_position = ["G2", "G5"]
    config.gate_granularity = "elementwise"
    config.use_qk_norm = config.use_attention_output_norm = True
    config.use_glu = False
    plan = config.base_model_tp_plan
    assert plan["layers.*.self_attn.g_v_proj"] == "colwise"
    assert plan["layers.*.self_attn.g_o_proj"] == "colwise_gather_output"
    assert {"g_proj", "gate_proj"}.isdisjoint(name.rsplit(".", 1)[-1] for name in plan)
    for norm in ("q_norm", "k_norm", "o_norm"):
        assert plan[f"layers.*.self_attn.{norm}"] == "replicated_with_grad_allreduce"
    assert "base_model_tp_plan" not in config.to_dict()
    assert "base_model_tp_plan" not in GatedLlamaConfig(tie_word_embeddings=True).to_diff_dict()


@pytest.mark.parametrize("window", [None, 8])
def test_layers_that_are_all_alike_follow_their_number(window: int | None, tmp_path: Path) -> None:
    """As in Llama and Mistral: a config or checkpoint is loaded with other values of the two fields."""
    kind, other = ("full_attention", "sliding_attention") if window is None else ("sliding_attention", "full_attention")
    GatedLlamaConfig(num_hidden_layers=3, sliding_window=window).save_pretrained(tmp_path)
    for layers in (1, 5):
        assert AutoConfig.from_pretrained(tmp_path, num_hidden_layers=layers).layer_types == [kind] * layers
    changed = AutoConfig.from_pretrained(tmp_path, sliding_window=4 if window is None else None)
    assert changed.layer_types == [other] * 3
    both = AutoConfig.from_pretrained(tmp_path, num_hidden_layers=2, sliding_window=changed.sliding_window)
    both.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["layer_types"] == [other] * 2


def test_layers_that_differ_stay_as_they_are_given() -> None:
    mixed = ["full_attention", "sliding_attention"]
    config = GatedLlamaConfig(num_hidden_layers=2, sliding_window=8, layer_types=list(mixed))
    assert GatedLlamaConfig.from_dict(config.to_dict(), sliding_window=4).layer_types == mixed
    alike = GatedLlamaConfig(num_hidden_layers=2, sliding_window=8, layer_types=["full_attention"] * 2)
    assert alike.layer_types == ["full_attention"] * 2
    assert GatedLlamaConfig.from_dict(alike.to_dict(), num_hidden_layers=3).layer_types == ["full_attention"] * 3
