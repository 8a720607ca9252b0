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
"""Entries for GatedLlama where Transformers looks things up by a name: classes, parallel styles, response templates."""

import sys
from collections.abc import Mapping
from functools import wraps
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.utils import logging


def register_class_names(classes: Mapping[str, type]) -> None:
    """
    Make Transformers find classes where it looks for names and not for classes.

    - Trainer's label smoothing shifts the labels of models whose class name is in a table.
    - Trainer's model card takes its task from such a table.
    - `transformers serve` loads the class that `transformers` has under the name in a config's `architectures`.

    Args:
        classes: the model's classes by the task in the names of Transformers' tables, such as `"CAUSAL_LM"`.
    """
    # Transformers may import itself anew, so that `serve` holds another module of the name.
    serving = sys.modules.get("transformers.cli.serving.model_manager")
    homes: list[Any] = [transformers, getattr(serving, "transformers", transformers)]
    for task, model in classes.items():
        table = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", None)
        if table is not None:
            table["gated_llama"] = model.__name__
        elif task == "CAUSAL_LM":
            logging.get_logger(__name__).warning_once(
                "label_smoothing_factor must stay 0 with GatedLlama: Trainer of transformers "
                f"{transformers.__version__} shifts no labels"
            )
        for home in homes:
            setattr(home, model.__name__, model)  # of several checkpoints' code, that which is loaded last


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


def use_response_templates_of_sources(serving: ModuleType) -> None:
    """
    Let `transformers serve` take the response template of the model type that a gated model was converted from.

    By the template it finds tool calls and reasoning in a model's output. Where a tokenizer has none, it picks one by
    the model type.

    Args:
        serving: `transformers.cli.serving.utils`.
    """
    original = getattr(serving, "get_response_template", None)
    if original is None or hasattr(original, "__wrapped__"):  # another version of Transformers, or already wrapped
        return

    @wraps(original)
    def get_response_template(processor: Any, model: Any) -> Any:
        template = original(processor, model)
        source = getattr(model.config, "source_model_type", None)
        if template is None and source is not None and model.config.model_type == "gated_llama":
            template = original(processor, SimpleNamespace(config=SimpleNamespace(model_type=source)))
        return template

    serving.get_response_template = get_response_template  # type: ignore[attr-defined]


# Code that a checkpoint carries is loaded when `transformers serve` runs; the package waits for its import.
if "transformers.cli.serving.utils" in sys.modules:
    use_response_templates_of_sources(sys.modules["transformers.cli.serving.utils"])
