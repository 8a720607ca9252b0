"""
Import the model where Transformers reports another version: `python import_with_version.py VERSION WHAT`.

WHAT is "package", "command", or a folder whose code is loaded twice.
"""

import importlib
import sys

import transformers


_, transformers.__version__, what = sys.argv
if what == "package":
    importlib.import_module("modeling_gated")
elif what == "command":
    sys.argv = ["gated-llama", "convert", "a", "b"]
    importlib.import_module("modeling_gated.cli").app()
else:
    for _time in range(2):
        transformers.AutoConfig.from_pretrained(what, trust_remote_code=True)
