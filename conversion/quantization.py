"""Quantized checkpoints: their tensors and their `quantization_config` stay, and the gates are kept out of it."""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from modeling_gated.gate_names import OUTPUT_LAYERS


GATES = r".*\.g_proj"


@dataclass(frozen=True)
class Scheme:
    """
    How a `quant_method` names the modules that it leaves alone.

    `fields` are the names of the list in `quantization_config`, the first one's being its own; `pattern` is the entry
    for the gates, and `otherwise` what else has to be listed where there was no list. A scheme without fields needs
    no entry: it quantizes nothing that its checkpoint does not hold in quantized form.
    """

    fields: tuple[str, ...] = ("modules_to_not_convert",)
    pattern: str = GATES
    otherwise: tuple[str, ...] = OUTPUT_LAYERS


SCHEMES: dict[str, Scheme] = {
    "aqlm": Scheme(("linear_weights_not_to_quantize",), otherwise=()),
    "auto-round": Scheme(()),
    "awq": Scheme(otherwise=()),  # Transformers adds its own to any list
    "bitnet": Scheme(),
    "bitsandbytes": Scheme(("llm_int8_skip_modules",)),
    # Names the modules it quantizes by their class, Linear; without an entry the gates would be quantized.
    "compressed-tensors": Scheme(("ignore",), r"re:.*\.g_proj$", otherwise=()),
    "eetq": Scheme(),
    "fbgemm_fp8": Scheme(),
    "fp8": Scheme(("modules_to_not_convert", "ignored_layers")),
    "gptq": Scheme(()),
    "higgs": Scheme(),
    "metal": Scheme(),
    "torchao": Scheme(),
}


def exclude_gates(quantization_config: dict[str, Any]) -> dict[str, Any]:
    """
    Return the `quantization_config` of a gated checkpoint: the source's, with the gates left in full precision.

    Raises:
        ValueError: if it is of a scheme that is not known to work.
    """
    config = deepcopy(quantization_config)
    method = config.get("quant_method")
    if method is None and (config.get("load_in_4bit") or config.get("load_in_8bit")):
        method = "bitsandbytes"  # as Transformers takes configs from before there was a quant_method
    if not isinstance(method, str) or method not in SCHEMES:
        raise ValueError(f"quantization_config: quant_method={method!r} is not among {', '.join(SCHEMES)}")
    scheme = SCHEMES[method]
    if not scheme.fields:
        return config
    field = next((name for name in scheme.fields if config.get(name) is not None), scheme.fields[0])
    listed = config.get(field)
    if not (listed is None or (isinstance(listed, list) and all(isinstance(name, str) for name in listed))):
        raise ValueError(f"quantization_config: {field}={listed!r} is not a list of names")
    config[field] = [*(scheme.otherwise if listed is None else listed), scheme.pattern]
    return config
