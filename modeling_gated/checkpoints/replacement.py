"""New content for files, in one step: whoever opens such a file finds the old content or the new."""

import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from .files import sync


def replace_file(path: Path, content: bytes) -> None:
    """Give a file new content in one step: whoever opens it finds the old or the new."""
    replace_files({path: content})


def replace_files(contents: Mapping[Path, bytes]) -> None:
    """
    Give files new content, each in one step, in the order of `contents`; if that fails, the old content is put back.

    All that takes room on the disk is done before the first file changes. Old content that cannot be put back stays
    beside its file under a hidden name.
    """
    new, old, replaced = {}, {}, []
    try:
        for path, content in contents.items():
            new[path] = _hidden(path)
            new[path].write_bytes(content)
            if path.exists():
                shutil.copymode(path, new[path])
                if len(contents) > 1:
                    old[path] = _hidden(path)
                    shutil.copy2(path, old[path])
            sync(new[path])
        for path in contents:
            replaced.append(path)  # first: an interrupt may come right after the replacement
            os.replace(new[path], path)
    except BaseException:
        for path in reversed(replaced):
            with suppress(OSError):
                if path in old:
                    os.replace(old[path], path)
                elif len(contents) > 1:
                    path.unlink(missing_ok=True)
        for path in old.keys() - set(replaced):
            old[path].unlink(missing_ok=True)
        raise
    else:
        for path in old.values():
            path.unlink(missing_ok=True)
    finally:
        for path in new.values():
            path.unlink(missing_ok=True)


def _hidden(path: Path) -> Path:
    """Return a new hidden name beside a file."""
    return path.with_name(f".{path.name}.{uuid4().hex}")
