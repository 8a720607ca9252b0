"""Our writer and header reader against the library's."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modeling_gated.checkpoints.safetensors_file import (
    FLOATING_DTYPES,
    filled_tensor,
    new_tensor,
    read_shard,
    write_safetensors,
)


@pytest.mark.fast
def test_the_library_reads_what_the_writer_wrote(tmp_path: Path) -> None:
    for dtype in FLOATING_DTYPES.values():
        tensors = {"b": torch.randn(3, 5), "a": torch.randn(7), "empty": torch.empty(0, 4), "scalar": torch.tensor(2.5)}
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        tensors |= {"zeros": torch.zeros(9, dtype=dtype), "last": torch.zeros(2, 2**19 + 1, dtype=dtype)}
        path = tmp_path / f"{dtype}.safetensors"
        new = {
            name: new_tensor(
                tuple(tensor.shape), dtype, None if name in ("zeros", "last") else lambda tensor=tensor: tensor
            )
            for name, tensor in tensors.items()
        }
        digest = write_safetensors(path, new, {"format": "pt"})
        assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
        actual = load_file(path)
        assert actual.keys() == tensors.keys()
        shard = read_shard(path, path.name)
        assert shard.metadata == {"format": "pt"}
        assert shard.data_bytes == sum(tensor.nbytes for tensor in tensors.values())
        for name, tensor in tensors.items():
            assert actual[name].dtype == dtype
            assert torch.equal(actual[name], tensor)
            assert b"".join(shard.chunks(name)) == bytes(tensor.reshape(-1).view(torch.uint8).tolist())


@pytest.mark.parametrize("dtype", FLOATING_DTYPES.values(), ids=str)
def test_filled_tensors_are_made_in_small_parts(dtype: torch.dtype, tmp_path: Path) -> None:
    shapes = {"long": (3, 2**20 + 5), "part": (2**20 // dtype.itemsize,), "short": (7,), "empty": (0, 4)}
    tensors = {name: filled_tensor(shape, dtype, 2.0**-60) for name, shape in shapes.items()}
    for tensor in tensors.values():
        assert (tensor.parts is None) == (dtype == torch.float16)  # which has no such number
        assert all(len(part) <= 2**20 for part in (tensor.parts or list)())
    write_safetensors(tmp_path / "filled.safetensors", tensors, {})
    for name, tensor in load_file(tmp_path / "filled.safetensors").items():
        assert torch.equal(tensor, torch.full(shapes[name], 2.0**-60, dtype=dtype)), name
