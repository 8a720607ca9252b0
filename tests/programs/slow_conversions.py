"""
Convert a checkpoint for each line of standard input, `[source, output]` in JSON, in a process of its own.

Print the process id and, once another line was read, the exit status. Every step of writing takes some time, so that
a signal can arrive during any of them.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modeling_gated.checkpoints import placement
from modeling_gated.conversion import convert_checkpoint


STEPS: list[tuple[Any, str]] = [
    (os, "copy_file_range"),
    (os, "fsync"),
    (shutil, "copy"),
    (Path, "rename"),
    (Path, "mkdir"),
    (Path, "write_text"),
    (os, "replace"),
    (shutil, "rmtree"),
]


def slowly(function: Callable[..., Any]) -> Callable[..., Any]:
    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.005)
        result = function(*args, **kwargs)
        time.sleep(0.005)
        return result

    return slow


placement._CHUNK = 8192
for module, name in STEPS:
    setattr(module, name, slowly(getattr(module, name)))
for line in sys.stdin:
    if not (process := os.fork()):
        try:
            convert_checkpoint(*json.loads(line), place="copy", overwrite=True)
            os._exit(0)
        finally:
            os._exit(1)
    print(process, flush=True)
    sys.stdin.readline()  # until then the process keeps its id, even when it has ended
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
