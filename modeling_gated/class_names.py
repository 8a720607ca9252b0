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
"""Lookups of Transformers by the name of a model's class. A saved model includes this text."""

import sys
from collections.abc import Mapping
from typing import Any

import transformers
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
