"""Programs that run as on a machine that has nothing but the libraries."""

import os
import subprocess
import sys
from pathlib import Path


def isolated(code: str, *arguments: Path, online: bool = False) -> subprocess.CompletedProcess[str]:
    """Run in an interpreter of its own, with an empty cache, offline and with nobody to answer prompts."""
    home = {"HF_HOME": str(arguments[-1].with_suffix(".home")), "HF_HUB_OFFLINE": str(int(not online))}
    home["PYTHONSAFEPATH"] = "1"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **home},
        cwd=arguments[-1].parent,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
