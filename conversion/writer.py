"""Writing a safetensors file one tensor at a time, so that memory does not grow with the file."""

import json
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path

import torch


# safetensors' names of the dtypes that a model is stored in.
FLOATING_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def write_safetensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, tensor: Callable[[str], torch.Tensor | None]
) -> None:
    """
    Write tensors of one dtype to a new safetensors file.

    The library's `save_file` takes all tensors at once; elementwise gates of a large model are gigabytes.

    Args:
        path: the file, which must not exist yet.
        shapes: each tensor's name and shape, in the order of the file.
        dtype: one of `FLOATING_DTYPES`.
        tensor: makes the contiguous tensor of a name on the CPU, when its turn comes; None stands for zeros, which
            are left as a hole in the file and take neither time nor, on most filesystems, room.
    """
    code = next(code for code, known in FLOATING_DTYPES.items() if known == dtype)
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format aligns the data to 8 bytes
    with open(path, "xb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        start = file.tell()
        for name in shapes:
            if (value := tensor(name)) is not None:
                file.seek(start + header[name]["data_offsets"][0])
                file.write(value.reshape(-1).view(torch.uint8).numpy().data)
        file.truncate(start + end)
