"""Looking at, and spoiling, checkpoints in tests."""

import hashlib
import json
from pathlib import Path


def contents(directory: Path) -> dict[str, str]:
    """The SHA-256 of every file, by its path in the directory."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def forget_gates(directory: Path) -> None:
    """Take the gates out of the index."""
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {name: file for name, file in content["weight_map"].items() if "g_proj" not in name}
    index.write_text(json.dumps(content))
