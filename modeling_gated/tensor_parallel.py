# Copyright 2026 The GatedLlama authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The tensor-parallel style of gates that all heads share. A saved model includes this text."""

import torch
from torch import nn


def register_shared_gate_style() -> None:
    """
    Register the tensor-parallel style `"shared_gate"`, which the plan of a config with `gate_head_shared` names.

    A gate that all heads share is whole on every rank, where it gates that rank's heads alone, so its gradients are
    summed over the ranks.
    """
    # Imported here: only these configs need the names.
    from torch.distributed.device_mesh import DeviceMesh
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer

    class SharedGateParallel(TensorParallelLayer):
        def transform_output_post_forward(
            self, module: nn.Module, output: torch.Tensor, mesh: DeviceMesh
        ) -> torch.Tensor:
            def sum_over_ranks(gradient: torch.Tensor) -> torch.Tensor:
                gradient = gradient.clone()
                torch.distributed.all_reduce(gradient, group=mesh.get_group())
                return gradient

            if output.requires_grad:
                output.register_hook(sum_over_ranks)
            return output

    ALL_PARALLEL_STYLES.register("shared_gate", SharedGateParallel())  # type: ignore[arg-type]  # annotated for functions
