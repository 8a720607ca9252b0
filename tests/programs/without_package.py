"""Run a script where `modeling_gated` cannot be imported: `python without_package.py SCRIPT [ARGUMENTS ...]`."""

import runpy
import sys


sys.modules["modeling_gated"] = None  # type: ignore[assignment]
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
