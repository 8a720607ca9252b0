"""Our writer and header reader against the library's."""

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file

from modeling_gated.conversion.safetensors_file import FLOATING_DTYPES, new_tensor, read_shard, write_safetensors


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
        found = load_file(path)
        assert found.keys() == tensors.keys()
        shard = read_shard(path, path.name)
        assert shard.metadata == {"format": "pt"}
        assert shard.data_bytes == sum(tensor.nbytes for tensor in tensors.values())
        for name, tensor in tensors.items():
            assert found[name].dtype == dtype
            assert torch.equal(found[name], tensor)
            assert b"".join(shard.chunks(name)) == bytes(tensor.reshape(-1).view(torch.uint8).tolist())
