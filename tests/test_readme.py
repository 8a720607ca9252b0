"""The README's tables against the code."""

import re
from pathlib import Path

from modeling_gated.configuration import SOURCE_FAMILIES
from modeling_gated.conversion.quantization import SCHEMES


README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_families_are_those_that_are_converted() -> None:
    section = README.partition("## Supported families")[2].partition("Each is mapped exactly")[0]
    assert set(re.findall(r"`([a-z0-9_]+)`", section)) - {"model_type", "residual_dropout"} == SOURCE_FAMILIES.keys()


def test_every_quantization_scheme_is_in_the_table() -> None:
    section = README.partition("| scheme (`quant_method`)")[2].partition("## ")[0]
    *known, refused = [line for line in section.splitlines()[1:] if line.startswith("| ")][1:]
    for method in SCHEMES:
        assert any(re.search(rf"\b{re.escape(method)}\b", line) for line in known), method
        assert method not in re.findall(r"[\w-]+", refused)
