"""
Runs a script as one process of several that shard a model on CPUs. Accelerate has FSDP on accelerators alone.

    torchrun --standalone --nproc_per_node 2 tests/programs/fsdp_on_cpu.py SCRIPT [FLAGS ...]
"""

import runpy
import sys
from pathlib import Path

from accelerate.state import PartialState
from accelerate.utils import DistributedType


PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)

if __name__ == "__main__":
    script = sys.argv[1]
    sys.path[0] = str(Path(script).parent)
    sys.argv = sys.argv[1:]
    runpy.run_path(script, run_name="__main__")
