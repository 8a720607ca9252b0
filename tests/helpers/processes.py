"""Programs in tests/programs, run in processes of their own."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any


PROGRAMS = Path(__file__).parents[1] / "programs"


def run_program(name: str, *arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `python tests/programs/name arguments`; options are those of `subprocess.run`."""
    return subprocess.run([sys.executable, PROGRAMS / name, *arguments], capture_output=True, text=True, **options)


def run_isolated(
    name: str, *arguments: str | Path, is_package: bool = False, is_online: bool = False
) -> subprocess.CompletedProcess[str]:
    """
    Run a program with an empty cache and with nobody to answer prompts.

    Args:
        name: file in tests/programs.
        arguments: absolute paths, as the program runs in a folder of its own, and other arguments.
        is_package: whether `modeling_gated` can be imported.
        is_online: whether Hugging Face's libraries may use the network.
    """
    command = [name] if is_package else ["without_package.py", PROGRAMS / name]
    with tempfile.TemporaryDirectory() as home:
        offline = str(int(not is_online))
        environment = os.environ | {"HF_HOME": home, "HF_HUB_OFFLINE": offline, "PYTHONSAFEPATH": "1"}
        return run_program(*command, *arguments, env=environment, cwd=home, stdin=subprocess.DEVNULL)


def run_two_ranks(name: str, folder: Path, *arguments: Path) -> None:
    """
    Run a program as ranks 0 and 1 on one machine.

    Args:
        name: file in tests/programs, in which torch.distributed can be initialised from the environment.
        folder: for what they write on standard error, which an AssertionError shows if one fails.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with ExitStack() as stack:
        processes = []
        for rank in ("0", "1"):
            errors = stack.enter_context((folder / f"errors{rank}").open("w"))
            process = subprocess.Popen(
                [sys.executable, PROGRAMS / name, *arguments],
                env=environment | {"RANK": rank, "LOCAL_RANK": rank},
                stderr=errors,
            )
            stack.callback(process.kill)
            processes.append(process)
        deadline = time.monotonic() + 300
        # Where one rank fails, the other waits for it.
        while None in (statuses := [process.poll() for process in processes]) and not any(statuses):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert statuses == [0, 0], "".join((folder / f"errors{rank}").read_text() for rank in (0, 1))
