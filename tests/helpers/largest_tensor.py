"""How large tensors get."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation made, and of the largest in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.float32 = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
                if tensor.dtype == torch.float32:
                    self.float32 = max(self.float32, tensor.numel())
        return result
