"""
Print the rows of Llama and of gated Llama in PEFT's tables of target modules.

First where this package was imported before PEFT, then where PEFT was imported before this package.
"""

import json
import sys
from importlib import import_module
from types import ModuleType
from typing import Any


def is_imported(package: str) -> bool:
    return package in {name.partition(".")[0] for name in sys.modules}


def tables(constants: ModuleType) -> dict[str, dict[str, Any]]:
    return {name: table for name, table in vars(constants).items() if name.startswith("TRANSFORMERS_MODELS_TO_")}


def rows(constants: ModuleType) -> dict[str, list[Any]]:
    named = tables(constants).items()
    return {name: [table["llama"], table.get("gated_llama")] for name, table in named if "llama" in table}


import_module("modeling_gated")
assert not is_imported("peft")
constants = import_module("peft.utils.constants")
results = [rows(constants)]

for name in [name for name in sys.modules if name.partition(".")[0] == "modeling_gated"]:
    del sys.modules[name]
assert not is_imported("modeling_gated")
for table in tables(constants).values():
    if "llama" in table:
        del table["gated_llama"]
constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING["gated_llama"] = ["kept"]
import_module("modeling_gated")
print(json.dumps([*results, rows(constants)]))
