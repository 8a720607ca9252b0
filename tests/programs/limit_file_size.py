"""Run `gated-llama` with a limit on the size of files: `python limit_file_size.py BYTES ARGUMENTS ...`."""

import resource
import sys

import modeling_gated.conversion
import modeling_gated.modeling_gated_llama  # noqa: F401 - imported before the limit holds
from modeling_gated.cli import app


limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
app(sys.argv[2:])
