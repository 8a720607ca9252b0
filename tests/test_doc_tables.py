"""Tables and figures of the documents against the code."""

import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_gated import GatedLlamaConfig, GatedLlamaForCausalLM
from modeling_gated.configuration import SOURCE_FAMILIES, extend_context
from modeling_gated.conversion.quantization import SCHEMES


def page(name: str) -> str:
    return (Path(__file__).parents[1] / "docs" / name).read_text()


@pytest.mark.fast
def test_the_families_are_those_that_are_converted() -> None:
    section = page("families.md").partition("# Supported models")[2].partition("## ")[0]
    assert set(re.findall(r"`([a-z0-9_]+)`", section)) - {"model_type", "residual_dropout"} == SOURCE_FAMILIES.keys()


@pytest.mark.fast
def test_every_quantization_scheme_is_in_the_table() -> None:
    section = page("families.md").partition("| scheme (`quant_method`)")[2].partition("## ")[0]
    *known, refused = [line for line in section.splitlines()[1:] if line.startswith("| ")][1:]
    for method in SCHEMES:
        assert any(re.search(rf"\b{re.escape(method)}\b", line) for line in known), method
        assert method not in re.findall(r"[\w-]+", refused)


@pytest.mark.fast
def test_the_base_that_the_rule_gives_the_paper_s_model() -> None:
    """The paper takes 4,096 tokens to 32,768."""
    config = GatedLlamaConfig(hidden_size=2048, num_attention_heads=16, max_position_embeddings=4096)
    base = extend_context(config, 32768).rope_parameters["rope_theta"]
    assert f"where the rule gives {base / 1000:.0f}k" in " ".join(page("long-context.md").split())


def variants() -> list[tuple[str, str, str]]:
    """Name, fields and parameters in each row of the table of variants."""
    section = page("paper-variants.md").partition("| in the paper |")[2].partition("\n\n")[0]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines()[2:]]
    return [(name, fields, count) for name, fields, _, count, _ in cells]


@pytest.mark.fast
@pytest.mark.parametrize(("name", "fields", "count"), variants())
def test_a_variant_s_fields_add_the_parameters_that_the_table_says(name: str, fields: str, count: str) -> None:
    sizes = {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32, "num_key_value_heads": 4}
    sizes |= {"head_dim": 128, "intermediate_size": 8, "vocab_size": 8}
    fields = {} if fields == "the defaults" else eval(f"dict({fields.strip('`')})")
    fields.setdefault("gate_bias", fields.get("gate_input_independent", False))
    with torch.device("meta"):
        ungated = LlamaForCausalLM(LlamaConfig(**sizes)).num_parameters()
        added = GatedLlamaForCausalLM(GatedLlamaConfig(**sizes | fields)).num_parameters() - ungated
    assert count == (f"{added / 1e6:.2f}" if added else "0")
