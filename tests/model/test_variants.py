"""Every variant of the paper's design space: its parameters, its start, generation, saving, compiling."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from examples.benchmarks.variants import VARIANTS, equal_parameters, forward_flops, main
from modeling_gated import GatedLlamaConfig, GatedLlamaForCausalLM
from modeling_gated.modeling_gated_llama import GatedLlamaGate
from tests.helpers.paper_variants import CONFIGS, SIZES, random_model


# Tables 1, 3 and 4 were measured on 24 layers of these shapes; only the MLP, there a mixture of experts, is another.
PAPER = {
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 768,
    "vocab_size": 8,
}
# What the tables say is added, in millions, as they round it.
ADDED = {
    "baseline": "0",
    "twice the kv heads": "50",
    "1.5 times the query heads": "201",
    "G1 elementwise": "201",
    "G2 elementwise": "25",
    "G3 elementwise": "25",
    "G4 elementwise": "201",
    "G5": "100",
    "G1 headwise": "1.6",
    "G2 headwise": "0.2",
    "G1 additive, SiLU": "201",
    "G1 SiLU": "201",
    "SiLU alone": "0",
    "G1 NS-sigmoid": "201",
}
# The tables count these as if each head had gates of its own.
COUNTED_AS_UNSHARED = {"G1 elementwise, head-shared": "201", "G2 elementwise, head-shared": "25"}
SHARED = 24 * 2048 * 128


def added_at_the_paper_s_shapes(name: str, **options: bool) -> int:
    fields = (VARIANTS | equal_parameters(GatedLlamaConfig(**PAPER)))[name].fields | options
    with torch.device("meta"):
        of_baseline = LlamaForCausalLM(LlamaConfig(**PAPER)).num_parameters()
        return GatedLlamaForCausalLM(GatedLlamaConfig(**PAPER | fields)).num_parameters() - of_baseline


def is_printed_as(count: int, printed: str) -> bool:
    """In millions, rounded to as many decimals as what is printed, or cut off: 100.66 is 100 in the paper."""
    digits = float(printed) * (scale := 10 ** len(printed.partition(".")[2]))
    return digits in (round(count * scale / 10**6), count * scale // 10**6)


@pytest.mark.parametrize("gate_bias", [False, True])
@pytest.mark.parametrize("name", list(ADDED))
def test_parameters_are_the_paper_s(name: str, gate_bias: bool) -> None:
    """The authors' gates have no bias; with one the tables' digits are the same."""
    assert is_printed_as(added_at_the_paper_s_shapes(name, gate_bias=gate_bias), ADDED[name])


@pytest.mark.parametrize("name", list(COUNTED_AS_UNSHARED))
def test_parameters_of_shared_gates_are_fewer_than_the_paper_s(name: str) -> None:
    assert added_at_the_paper_s_shapes(name, gate_bias=False) == SHARED == 6_291_456
    unshared = added_at_the_paper_s_shapes(name, gate_bias=False, gate_head_shared=False)
    assert is_printed_as(unshared, COUNTED_AS_UNSHARED[name])


def test_parameters_that_the_paper_does_not_print() -> None:
    """By their shapes: heads x head_dim scalars, one weight per channel of a head, one row per layer."""
    assert added_at_the_paper_s_shapes("G1 input-independent") == 24 * 32 * 128
    assert added_at_the_paper_s_shapes("RMSNorm of each head") == 24 * 128
    assert added_at_the_paper_s_shapes("G1 one gate per layer", gate_bias=False) == 24 * 2048
    assert added_at_the_paper_s_shapes("sandwich norm") == 24 * 2 * 2048
    assert added_at_the_paper_s_shapes("QK-norm") == 24 * 2 * 128
    assert added_at_the_paper_s_shapes("plain MLP") == -24 * 2048 * 768


@pytest.mark.parametrize("name", ["G1 elementwise, narrower MLP"])
def test_a_narrower_mlp_makes_room_for_the_gates(name: str) -> None:
    """To within half a channel of each layer's MLP."""
    fields = PAPER | {"intermediate_size": 6144}
    actual = equal_parameters(GatedLlamaConfig(**fields))[name]
    with torch.device("meta"):
        ungated = LlamaForCausalLM(LlamaConfig(**fields)).num_parameters()
        gated = GatedLlamaForCausalLM(GatedLlamaConfig(**fields | actual.fields)).num_parameters()
    assert abs(gated - ungated) <= 24 * 3 * 2048 / 2
    assert GatedLlamaConfig(**fields | actual.fields).intermediate_size < 6144 * 0.8


def test_the_ungated_baseline_is_llama(tokens: torch.Tensor) -> None:
    """Parameter for parameter and bit for bit."""
    llama = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    model = GatedLlamaForCausalLM(CONFIGS["baseline"]).eval()
    model.load_state_dict(llama.state_dict())
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, llama(tokens).logits)


@pytest.mark.parametrize("activation", ["sigmoid", "gelu", "relu", "silu"])
def test_the_glu_family_is_llama_s_with_another_activation(activation: str, tokens: torch.Tensor) -> None:
    llama = LlamaForCausalLM(LlamaConfig(**SIZES, hidden_act=activation)).eval()
    model = GatedLlamaForCausalLM(GatedLlamaConfig(**SIZES, hidden_act=activation, gate_position=[])).eval()
    model.load_state_dict(llama.state_dict())
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, llama(tokens).logits)


@pytest.mark.parametrize(
    "fields",
    [
        {"gate_position": ["G1", "G2", "G3", "G4"]},
        {"gate_position": ["G1", "G2", "G3", "G4", "G5"], "gate_granularity": "elementwise"},
        {"gate_position": ["G2"], "gate_input_independent": True, "gate_head_shared": True},
        {"gate_form": "additive", "gate_activation": "silu", "gate_granularity": "elementwise"},
    ],
)
def test_open_gates_at_any_position_are_the_identity(fields: dict, tokens: torch.Tensor) -> None:
    llama = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    model = GatedLlamaForCausalLM(GatedLlamaConfig.from_source_config(llama.config, **fields)).eval()
    missing, unexpected = model.load_state_dict(llama.state_dict(), strict=False)
    assert missing
    assert not unexpected
    for dtype in (torch.float32, torch.bfloat16):
        with torch.no_grad():
            assert torch.equal(model.to(dtype)(tokens).logits, llama.to(dtype)(tokens).logits)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_every_parameter_learns_from_the_start(name: str, tokens: torch.Tensor) -> None:
    """A new model's gates have gradients; those with a bias are where gate_init says, at every token."""
    torch.manual_seed(0)
    config = CONFIGS[name]
    model = GatedLlamaForCausalLM(config)
    scores = []
    for module in model.modules():
        if isinstance(module, GatedLlamaGate):
            module.register_forward_hook(lambda _module, _args, logits: scores.append(logits.detach()))
    model(tokens, labels=tokens).loss.backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, parameter_name
    assert len(scores) == len(config.gate_position) * config.num_hidden_layers
    act_fn = model.model.layers[0].self_attn.gate_act_fn
    expected = 0.0 if config.gate_form == "additive" else config.gate_init
    for logits in scores:
        torch.testing.assert_close(act_fn(logits), torch.full_like(logits, expected), rtol=0, atol=0.004)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_cached_generation_equals_the_full_forward(name: str, tokens: torch.Tensor) -> None:
    model = random_model(name)
    options = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True, "output_logits": True}
    output = model.generate(tokens[:, :9], max_new_tokens=8, **options)
    with torch.no_grad():
        full = model(output.sequences).logits[:, 8:-1]
    torch.testing.assert_close(torch.stack(output.logits, 1), full, rtol=1e-4, atol=1e-4)
    assert torch.equal(full.argmax(-1), output.sequences[:, 9:])


@pytest.mark.parametrize("name", list(CONFIGS))
def test_saved_and_loaded_it_is_the_same(name: str, tokens: torch.Tensor, tmp_path: Path) -> None:
    model = random_model(name)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(loaded) is GatedLlamaForCausalLM
    for parameter_name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(parameter_name), parameter), parameter_name
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_half_precision_is_close(name: str, tokens: torch.Tensor) -> None:
    model = random_model(name)
    with torch.no_grad():
        expected = model(tokens).logits
        actual = model.bfloat16()(tokens).logits
    assert actual.dtype == torch.bfloat16
    assert torch.cosine_similarity(actual.float(), expected, -1).min() > 0.99


@pytest.mark.parametrize("name", ["G1 to G5", "G1 input-independent"])
def test_variants_compile_without_a_graph_break(name: str, tokens: torch.Tensor) -> None:
    model = random_model(name)
    torch.compiler.reset()
    with torch.no_grad():
        actual = torch.compile(model, backend="aot_eager", fullgraph=True)(tokens).logits
        torch.testing.assert_close(actual, model(tokens).logits, rtol=1e-5, atol=1e-5)


def test_the_example_s_flops_are_those_of_the_matrix_products() -> None:
    """Two for each weight and token, two for each channel of a head and each pair of tokens in both its products."""
    seq, heads, head_dim, layers = 12, SIZES["num_attention_heads"], SIZES["head_dim"], SIZES["num_hidden_layers"]
    for name in ("baseline", "G1 headwise", "G2 elementwise", "G5", "plain MLP"):
        matrices = [p for p in random_model(name).model.layers.parameters() if p.dim() == 2]
        weights = sum(matrix.numel() for matrix in matrices) + SIZES["vocab_size"] * SIZES["hidden_size"]
        expected = 2 * weights * seq + 4 * heads * head_dim * seq**2 * layers
        # The rotary angles, which Transformers computes as a product, are not worth a formula.
        assert forward_flops(CONFIGS[name], seq) == pytest.approx(expected, rel=0.005)


def test_the_example_prints_every_variant(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {name: size for name, size in SIZES.items() if name != "pad_token_id"}
    main(**sizes, sequence_length=8, steps=0)
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    assert [row[0] for row in cells[1:]] == list(CONFIGS)
    added = {row[0]: row[2] for row in cells[1:]}
    assert added["baseline"] == "0"
    assert added["G1 headwise"] == f"+{2 * 4 * (64 + 1)}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 7}, "error: head_dim must be even"),
        ({"num_key_value_heads": 3}, "error: num_attention_heads=8 is not a multiple of num_key_value_heads=3"),
        ({"device": "mps"}, "error: --device must be cpu, cuda or cuda:N, got mps"),
    ],
)
def test_the_example_refuses_nonsense_in_one_line(options: dict, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main(**options)
