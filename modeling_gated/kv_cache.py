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
"""The KV cache on its way from a model to its attention blocks.

Transformers 5.24 renamed the argument `past_key_values` to `cache`. Code with `**kwargs` ignores a name that it does
not know, and then generates from an empty cache. So this project reads the name from the running version, and checks
that the cache arrives. On versions of Transformers that came later, it tests cached generation.
"""

import inspect
import os
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
import transformers
from transformers import Cache
from transformers.models.llama.modeling_llama import LlamaAttention


_KNOWN_NAMES = ("cache", "past_key_values")
_REMEDIES = (
    "If the call is Transformers' own, install a version of transformers that GatedLlama was tested with, or a newer "
    "modeling-gated; for a checkpoint loaded by trust_remote_code: gated-llama refresh-code CHECKPOINT"
)
_SKIP_VARIABLE = "GATED_LLAMA_SKIP_SELF_TEST"
_TOLERANCE = 1e-3  # of float32 logits up to 9; without a cache they are off by 6.6, without a mask by 11.7
_is_self_tested = False


def cache_argument(function: Callable[..., Any] = LlamaAttention.forward) -> str:
    """
    Return the name of the argument in which a function of Transformers takes the KV cache.

    Args:
        function: such as a model's `forward`; by default that of Llama's attention block. A function that only takes
            the cache among its `**kwargs`, as a PEFT model's `forward` does, has Llama's name.

    Raises:
        TypeError: if the function takes no cache.
    """
    parameters = inspect.signature(function).parameters
    for name, parameter in parameters.items():
        if name in _KNOWN_NAMES or re.search(r"\bCache\b", str(parameter.annotation)):
            return name
    if function is LlamaAttention.forward or not any(
        parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()
    ):
        name = getattr(function, "__qualname__", repr(function))
        raise TypeError(
            f"{name} must take a KV cache, got {list(parameters)} with transformers {transformers.__version__}. "
            f"{_REMEDIES}"
        )
    return cache_argument()


def given_cache(arguments: Iterable[Any]) -> Cache | None:
    """Return the KV cache among the values of a call's arguments, whatever its name; None if there is none."""
    return next((value for value in arguments if isinstance(value, Cache)), None)


# The name by which Transformers' decoder layers give an attention block the cache.
CACHE_ARGUMENT = cache_argument()
_OTHER_NAME = "past_key_values" if CACHE_ARGUMENT == "cache" else "cache"
# Since 5.24, which renamed the argument, a layer gives `update` the keyword arguments, for the paged cache to change.
PASSES_KWARGS_TO_CACHE = CACHE_ARGUMENT != "past_key_values"


def take_cache(keywords: dict[str, Any]) -> Any:
    """
    Remove the KV cache from the keyword arguments of an attention block, and return it; None if there is none.

    Raises:
        RuntimeError: if there is a cache under another name than Transformers' own.
    """
    cache = keywords.pop(CACHE_ARGUMENT, None)
    # With a cache in place, only the other version's name is looked for: this runs for every layer and token.
    values = [keywords.get(_OTHER_NAME)] if cache is not None else keywords.values()
    if given_cache(values) is not None:
        names = ", ".join(name for name, value in keywords.items() if isinstance(value, Cache))
        raise RuntimeError(
            f"the KV cache must be passed as {CACHE_ARGUMENT!r}, got {names!r}: cached generation would be wrong with "
            f"transformers {transformers.__version__}. {_REMEDIES}"
        )
    return cache


class CacheReceipt:
    """Receipt that an attention block signs when it has used the cache that its decoder layer was given."""

    # An object and not a list, of which accelerate and FSDP make copies.
    is_signed = False


def forward_with_cache(forward: Callable[..., Any], layer: Any, *args: Any, **kwargs: Any) -> Any:
    """
    Call a decoder layer's forward, and check that a KV cache among its arguments reaches the attention block.

    Args:
        forward: the forward of Transformers' layer, called with `layer`, the other arguments and, if there is a cache,
            a `cache_receipt` for the attention block to sign.
        layer: a decoder layer. If its `self_attn` was replaced by a module without `signs_cache_receipts`, nothing is
            checked. A subclass, or another `forward`, must pass `cache_receipt` on or set `signs_cache_receipts` to
            False.

    Raises:
        RuntimeError: if the receipt is not signed.
    """
    has_cache = kwargs.get(CACHE_ARGUMENT) is not None or given_cache((*args, *kwargs.values())) is not None
    if not has_cache or not getattr(layer.self_attn, "signs_cache_receipts", False):
        return forward(layer, *args, **kwargs)
    receipt = CacheReceipt()
    output = forward(layer, *args, cache_receipt=receipt, **kwargs)
    if not receipt.is_signed:
        raise RuntimeError(
            f"the KV cache given to {type(layer).__name__} did not reach its attention block: cached generation would "
            f"be wrong with transformers {transformers.__version__}. {_REMEDIES}. If self_attn was changed on purpose, "
            "set self_attn.signs_cache_receipts to False"
        )
    return output


def check_cached_generation(model_class: type, config_class: type, running_version: str, tested_versions: str) -> None:
    """
    Compare cached generation of a tiny model with the full forward pass, once per process.

    The test takes some tens of milliseconds on the CPU and leaves the global random state and the default dtype as
    they are. It does not run while `torch.compile` traces, nor where new parameters are not real: on the meta device,
    under `accelerate.init_empty_weights`, with fake tensors. Then the next model runs it. The environment variable
    `GATED_LLAMA_SKIP_SELF_TEST=1` skips it.

    Args:
        model_class: a causal language model.
        config_class: the class of its config.
        running_version: the version of Transformers, for the error.
        tested_versions: versions of Transformers with which cached generation is known to be right, for the error.

    Raises:
        RuntimeError: if cached generation is wrong or fails.
    """
    global _is_self_tested
    if _is_self_tested or os.environ.get(_SKIP_VARIABLE, "0") not in ("", "0"):
        return
    if torch.compiler.is_compiling() or torch.get_default_device().type == "meta":
        return
    _is_self_tested = True  # first, since the test builds a model itself
    passed, reason, cause = False, "", None
    try:
        difference = _largest_difference(model_class, config_class)
        passed = difference is not None and difference <= _TOLERANCE
        if difference is not None and not passed:
            reason = f"the last logits of a test model are off by {difference:.2g}"
    except Exception as error:
        reason, cause = f"generating with a test model raised {type(error).__name__}: {error}", error
    finally:
        _is_self_tested = passed
    if reason:
        raise RuntimeError(
            f"cached generation is wrong with transformers {running_version}: {reason}. Install transformers "
            f"{tested_versions}, or a newer modeling-gated; for a checkpoint loaded by trust_remote_code, replace the "
            f"code in it by a newer one: gated-llama refresh-code CHECKPOINT. {_SKIP_VARIABLE}=1 skips this test"
        ) from cause


def _largest_difference(model_class: Any, config_class: Any) -> float | None:
    """
    Return the largest difference between the logits after eight tokens, of which the last went through the cache, and
    those of the full forward pass, for one prompt and for a left-padded batch; None where parameters are not real.
    """
    # Weights are drawn by a generator of their own; building a model draws from the global one.
    with torch.no_grad(), torch.device("cpu"), torch.autocast("cpu", enabled=False), torch.random.fork_rng(devices=[]):
        sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
        config = config_class(
            **sizes, num_attention_heads=2, num_key_value_heads=1, pad_token_id=0, bos_token_id=None, eos_token_id=None
        )
        model = model_class(config).eval()
        if not all(map(_is_real, model.parameters())):
            return None
        model.float()
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        tokens = torch.randint(1, 32, (2, 7), generator=generator)
        padding = torch.ones_like(tokens)
        padding[1, :3] = 0
        differences = []
        for prompts, mask in ((tokens[:1], padding[:1]), (tokens * padding, padding)):
            # Not synced_gpus, which `generate` sets under ZeRO-3: it would wait for other processes.
            output = model.generate(
                prompts, attention_mask=mask, max_new_tokens=2, do_sample=False, use_cache=True,
                return_dict_in_generate=True, output_logits=True, synced_gpus=False,
            )  # fmt: skip
            for row, sequence in enumerate(output.sequences):
                full = model(sequence[None, int((mask[row] == 0).sum()) : 8], use_cache=False).logits[0, -1]
                differences.append((output.logits[1][row] - full).abs().max())
        return torch.stack(differences).max().item()  # unlike Python's max, NaN if any is


def _is_real(parameter: torch.nn.Parameter) -> bool:
    """Return whether a new parameter has numbers on the CPU: no meta, fake or partitioned tensor."""
    return type(parameter.data) is torch.Tensor and parameter.device.type == "cpu" and parameter.numel() > 0
