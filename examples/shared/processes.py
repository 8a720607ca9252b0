"""Run a command and measure its time and memory, for the demo and the benchmarks."""

import os
import subprocess
import sys
import time
from pathlib import Path


def run_measured(command: list[str | Path], *, capture: bool = False) -> tuple[float, int, str]:
    """
    Run a command to its end. Exit with an error that names the command if the command fails.

    The measured memory includes the memory of this process at the start, so the caller should be small.

    Args:
        command: program and arguments.
        capture: return the standard output.

    Returns:
        Duration in seconds, peak memory in bytes, and the standard output, or "" without `capture`.
    """
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE if capture else None, text=True)
    output = process.stdout.read() if process.stdout is not None else ""
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        sys.exit(
            f"error: {' '.join(map(str, command))} failed with exit code {os.waitstatus_to_exitcode(status)}; see above"
        )
    return time.perf_counter() - started, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), output
