"""Run a script and check that it imports no large library: `python check_imports.py SCRIPT [ARGUMENTS ...]`."""

import runpy
import sys


del sys.argv[0]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
heavy = {"torch", "transformers", "numpy", "safetensors"} & sys.modules.keys()
assert not heavy, heavy
