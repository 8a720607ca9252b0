"""Running a command and measuring it, as the demo and the benchmark do."""

import os
import subprocess
import sys
import time
from pathlib import Path


def run_measured(command: list[str | Path], *, capture: bool = False) -> tuple[float, int, str]:
    """
    Run a command to its end; exit, naming it, if it fails.

    Its memory includes what this process held when it started, so the caller should be small.

    Returns:
        Its seconds, the peak of its memory in bytes, and its standard output if `capture`, else "".
    """
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE if capture else None, text=True)
    output = process.stdout.read() if process.stdout is not None else ""
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        sys.exit(f"{' '.join(map(str, command))} failed")
    return time.perf_counter() - started, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), output
