"""Print a Llama config gated by the code in a checkpoint: `python gate_source_config.py CHECKPOINT`."""

import json
import sys
from typing import Any

from transformers import LlamaConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module


config_class: Any = get_class_from_dynamic_module("modeling_gated_llama.GatedLlamaConfig", sys.argv[1])
try:
    config_class.from_source_config(LlamaConfig())
except ModuleNotFoundError as error:
    assert "modeling_gated" in str(error)
    del sys.modules["modeling_gated"]
    config = config_class.from_source_config(LlamaConfig())
    assert type(config) is config_class
    print(json.dumps(config.to_dict()))
