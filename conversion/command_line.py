"""The command lines that do what calls from Python did, for model cards and manifests."""

import os
import shlex
from collections.abc import Mapping
from typing import Any


# Arguments of extend_context whose flags have other names.
_FLAGS = {"length": "context_length"}


def command_line(
    subcommand: str, source: str | os.PathLike, output: str | os.PathLike, flags: Mapping[str, Any], overwrite: bool
) -> str:
    """Return the command line of a subcommand; flags that are None or at their defaults are left out."""
    words = ["gated-llama", subcommand, os.fspath(source), os.fspath(output)]
    for name, value in flags.items():
        if value is True:
            words.append(f"--{name.replace('_', '-')}")
        elif isinstance(value, list):
            words += [word for item in value for word in (f"--{name.replace('_', '-')}", str(item))]
        elif value is not None and value is not False and (name, value) != ("place", "auto"):
            words += [f"--{name.replace('_', '-')}", str(value).removeprefix("torch.")]
    return shlex.join(words + ["--overwrite"] * overwrite)


def context_flags(context: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the flags for these arguments of `extend_context`."""
    context = dict(context or {})
    is_yarn = context.pop("method", "rope_base") == "yarn"
    return {_FLAGS.get(name, name): value for name, value in context.items()} | {"yarn": is_yarn}
