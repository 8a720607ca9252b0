"""A program run by two processes that know of each other, on one machine."""

import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path


def run_two_ranks(code: str, folder: Path, *arguments: Path) -> None:
    """
    Run `python -c code arguments` as ranks 0 and 1.

    Args:
        code: in which torch.distributed can be initialised from the environment.
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
                [sys.executable, "-c", code, *arguments],
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
