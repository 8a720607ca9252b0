from pathlib import Path

import torch
from safetensors.torch import load_file

from modeling_gated.conversion.writer import FLOATING_DTYPES, write_safetensors


def test_the_library_reads_what_the_writer_wrote(tmp_path: Path) -> None:
    for dtype in FLOATING_DTYPES.values():
        tensors = {"b": torch.randn(3, 5), "a": torch.randn(7), "empty": torch.empty(0, 4), "scalar": torch.tensor(2.5)}
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        tensors |= {"zeros": torch.zeros(9, dtype=dtype), "last": torch.zeros(2, dtype=dtype)}
        path = tmp_path / f"{dtype}.safetensors"
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        zeros = dict.fromkeys(("zeros", "last"))
        write_safetensors(path, shapes, dtype, (tensors | zeros).__getitem__)
        found = load_file(path)
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == dtype
            assert torch.equal(found[name], tensor)
