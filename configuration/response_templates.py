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
"""Response templates of `transformers serve`, by which it finds tool calls and reasoning in a model's output.

It picks one by the model type where a tokenizer has none. A gated model has that of its source. A saved config carries
this file's text inside its own.
"""

import sys
from functools import wraps
from types import ModuleType, SimpleNamespace
from typing import Any


_SERVING = "transformers.cli.serving.utils"


def use_response_templates_of_sources(serving: ModuleType) -> None:
    """
    Let `transformers serve` take the response template of the model type that a gated model was converted from.

    Args:
        serving: `transformers.cli.serving.utils`.
    """
    found = getattr(serving, "get_response_template", None)
    if found is None or hasattr(found, "__wrapped__"):  # another version of Transformers, or done before
        return

    @wraps(found)
    def get_response_template(processor: Any, model: Any) -> Any:
        template = found(processor, model)
        source = getattr(model.config, "source_model_type", None)
        if template is None and source is not None and model.config.model_type == "gated_llama":
            template = found(processor, SimpleNamespace(config=SimpleNamespace(model_type=source)))
        return template

    serving.get_response_template = get_response_template  # type: ignore[attr-defined]


# Code that a checkpoint carries is loaded when `transformers serve` runs; the package waits for its import.
if _SERVING in sys.modules:
    use_response_templates_of_sources(sys.modules[_SERVING])
