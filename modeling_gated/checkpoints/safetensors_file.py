"""Safetensors files: reading their headers, and writing them one tensor at a time."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from modeling_gated.errors import ConversionError

from .files import chunks, opened, parse_json


# safetensors' names of the dtypes that a model is stored in.
FLOATING_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit


@dataclass(frozen=True)
class Tensor:
    """A tensor in a safetensors file: safetensors' code of its dtype, and where its bytes lie in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class Shard:
    """One safetensors file. `name` is its path in the checkpoint, `path` the regular file that it leads to."""

    name: str
    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    file_bytes: int

    @property
    def data_bytes(self) -> int:
        """Bytes of the tensors alone."""
        return sum(tensor.size for tensor in self.tensors.values())

    def chunks(self, tensor: str, start: int = 0, size: int | None = None) -> Iterator[bytes]:
        """Yield a tensor's bytes, or `size` of them from `start` on, in parts of bounded size."""
        where = self.tensors[tensor]
        with open(self.path, "rb") as file:
            yield from chunks(file, where.offset + start, where.size if size is None else size)

    def read(self, tensor: str, first: int = 0, last: int | None = None) -> torch.Tensor:
        """
        Return a floating tensor, or of its first dimension the elements `first` to `last` (not included), on the CPU.

        It is read, not mapped: memory then holds what was asked for, and not the file.
        """
        where = self.tensors[tensor]
        rows = where.shape[0] if where.shape else 1
        last = rows if last is None else min(last, rows)
        row = where.size // max(rows, 1)
        content, end = bytearray((last - first) * row), 0
        for chunk in self.chunks(tensor, first * row, len(content)):
            content[end : end + len(chunk)] = chunk
            end += len(chunk)
        values = torch.frombuffer(content, dtype=FLOATING_DTYPES[where.dtype]) if content else torch.empty(0)
        return values.reshape(last - first, *where.shape[1:]) if where.shape else values.reshape(())


def read_shard(path: Path, name: str) -> Shard:
    """
    Read and check the header of a safetensors file, without its tensors.

    Args:
        path: a regular file, its links resolved.
        name: its name in the checkpoint.

    Raises:
        ConversionError: if the file is not a complete, well-formed safetensors file.
    """
    try:
        with opened(path) as file:
            with safe_open(path, framework="np") as library:  # it checks the format: offsets, overlaps, sizes, dtypes
                names = list(library.keys())  # in the order in which Transformers reads them
            length = int.from_bytes(file.read(8), "little")
            header = parse_json(path, file.read(min(length, MAX_HEADER_BYTES)))  # here, that no name is there twice
            file_bytes = file.seek(0, 2)
    except OSError as error:
        raise ConversionError(f"{path}: cannot be read: {error.strerror or error}") from None
    except SafetensorError as error:
        raise ConversionError(f"{path}: not a complete safetensors file: {error}") from None
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for tensor in names:
        entry = header[tensor]
        start, end = entry["data_offsets"]
        tensors[tensor] = Tensor(entry["dtype"], tuple(entry["shape"]), 8 + length + start, end - start)
    return Shard(name, path, tensors, metadata, file_bytes)


@dataclass(frozen=True)
class NewTensor:
    """
    A tensor to write. `parts` makes its bytes when its turn comes; without it the tensor is zero, and left as a hole
    in the file that takes neither time nor, on most filesystems, room.
    """

    dtype: str
    shape: tuple[int, ...]
    size: int
    parts: Callable[[], Iterable[bytes | memoryview]] | None = None


def write_safetensors(path: Path, tensors: Mapping[str, NewTensor], metadata: Mapping[str, str]) -> str:
    """
    Write a new safetensors file part by part, so that memory does not grow with the file.

    The library's `save_file` takes all tensors at once; elementwise gates of a large model are gigabytes.

    Args:
        path: the file, which must not exist yet.
        tensors: the tensors by name, in the order of the file.
        metadata: the header's metadata, such as `{"format": "pt"}`.

    Returns:
        The file's SHA-256 in hexadecimal.
    """
    header: dict[str, dict] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.size
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format aligns the data to 8 bytes
    encoded = len(encoded).to_bytes(8, "little") + encoded
    digest = hashlib.sha256(encoded)
    zeros = memoryview(bytes(min(max((tensor.size for tensor in tensors.values()), default=0), 2**20)))
    with open(path, "xb") as file:
        file.write(encoded)
        for name, tensor in tensors.items():
            end = file.tell() + tensor.size
            if tensor.parts is None:
                for start in range(0, tensor.size, 2**20):
                    digest.update(zeros[: tensor.size - start])
                file.seek(end)
            else:
                for chunk in tensor.parts():
                    digest.update(chunk)
                    file.write(chunk)
                assert file.tell() == end, name
        file.truncate()
    return digest.hexdigest()


def new_tensor(shape: tuple[int, ...], dtype: torch.dtype, make: Callable[[], torch.Tensor] | None) -> NewTensor:
    """Return a `NewTensor` of the torch tensor, on the CPU, that `make` makes when its turn comes, or of zeros."""

    def parts() -> Iterator[memoryview]:
        assert make is not None
        yield make().contiguous().reshape(-1).view(torch.uint8).numpy().data

    return NewTensor(_code(dtype), shape, prod(shape) * dtype.itemsize, parts if make is not None else None)


def filled_tensor(shape: tuple[int, ...], dtype: torch.dtype, value: float) -> NewTensor:
    """Return a `NewTensor` of which every element is `value`, rounded to `dtype`, in parts of at most 1 MiB."""
    size = prod(shape) * dtype.itemsize
    is_zero = not torch.tensor(value, dtype=dtype).any()

    def parts() -> Iterator[memoryview]:
        chunk = torch.full((min(size, 2**20) // dtype.itemsize,), value, dtype=dtype).view(torch.uint8).numpy().data
        for start in range(0, size, 2**20):
            yield chunk[: size - start]

    return NewTensor(_code(dtype), shape, size, None if is_zero else parts)


def _code(dtype: torch.dtype) -> str:
    return next(code for code, known in FLOATING_DTYPES.items() if known == dtype)
