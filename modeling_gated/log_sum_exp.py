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
"""The log-sum-exp of attention scores, for gates whose logits include it."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward


# Attention functions whose scores follow from queries, keys and mask as they are passed.
BACKENDS = ("eager", "sdpa", "flex_attention")
_SCORES = 2**22  # float32 scores in memory at a time


def check_backend(implementation: str | None) -> None:
    """
    Check that the log-sum-exp of an attention implementation's scores is known.

    Raises:
        ValueError: if it is not.
    """
    if implementation not in BACKENDS:
        raise ValueError(
            f"attn_implementation must be one of {', '.join(BACKENDS)} with gate_logit_lse_weight, which needs the "
            f"log-sum-exp of the attention scores, got {implementation!r}"
        )


def attend_with_log_sum_exp(
    attention_function: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **arguments: Any,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """
    Call an attention function, and compute the log-sum-exp of its scores.

    Args:
        attention_function: function of `module.config._attn_implementation`.
        module: attention block.
        query: [batch, heads, queries, head_dim].
        key: [batch, key-value heads, keys, head_dim].
        value: as `key`.
        attention_mask: mask of that implementation: a tensor, a BlockMask or None.
        arguments: further arguments of the function, `scaling` among them.

    Returns:
        Attention output [batch, queries, heads, head_dim], attention weights if the function returns them, and the
        log-sum-exp in float32 [batch, queries, heads].

    Raises:
        ValueError: if the implementation is not in `BACKENDS`.
    """
    implementation = module.config._attn_implementation
    check_backend(implementation)
    is_causal = False
    if attention_mask is None and implementation != "eager" and query.shape[2] > 1:
        given = arguments.get("is_causal")
        is_causal = getattr(module, "is_causal", True) if given is None else given
    scaling = arguments["scaling"]
    needs_gradient = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    # Another function may stand in its place, to watch or change attention.
    is_plain = implementation == "sdpa" and attention_function is sdpa_attention_forward
    if is_plain and not needs_gradient and query.device.type == "cpu" and not arguments.get("dropout"):
        output, log_sum_exp = _cpu_kernel(query, key, value, attention_mask, is_causal, scaling)
        return output.transpose(1, 2), None, log_sum_exp.transpose(1, 2)
    output, weights = attention_function(module, query, key, value, attention_mask, **arguments)
    mask = _dense(attention_mask, query, key)
    # torch.compile decides on its own what to save and what to recompute.
    function = LogSumExp.apply if needs_gradient and not torch.compiler.is_compiling() else LogSumExp.forward
    # Scores are float32 whatever a trainer's autocast says. There is none on the meta device.
    device = query.device.type
    with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
        log_sum_exp = function(query, key, mask, scaling, is_causal)
    return output, weights, log_sum_exp.transpose(1, 2)


def _cpu_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, causal: bool, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return output and log-sum-exp of the kernel that `scaled_dot_product_attention` takes on a CPU."""
    batch, heads, queries, channels = query.shape
    group = heads // key.shape[1]
    is_packed = queries == 1 and (mask is None or mask.shape[1] == 1)
    if is_packed:  # heads of a group as queries, so that no keys are copied
        query = query.reshape(batch, key.shape[1], group, channels)
    else:
        key, value = (states.repeat_interleave(group, 1) if group > 1 else states for states in (key, value))
    if mask is not None:
        mask = mask[..., : key.shape[2]]
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, float("-inf"))
    output, log_sum_exp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, attn_mask=mask, scale=scaling
    )
    return output.reshape(batch, heads, queries, channels), log_sum_exp.reshape(batch, heads, queries)


def _dense(mask: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    """Return a mask as a tensor [batch or 1, heads or 1, queries, keys], boolean or additive, or None."""
    if mask is None or isinstance(mask, torch.Tensor):
        return mask if mask is None else mask[..., : key.shape[2]]
    from torch.nn.attention.flex_attention import create_mask

    batch, heads = mask.shape[:2]
    return create_mask(mask.mask_mod, batch, heads, query.shape[2], key.shape[2], device=query.device)


class LogSumExp(torch.autograd.Function):
    """
    Log-sum-exp of attention scores, float32 [batch, heads, queries].

    Scores are computed blockwise, here and for the backward pass, so memory is linear in the number of tokens.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scaling: float, is_causal: bool
    ) -> torch.Tensor:
        blocks = _score_blocks(query, key, mask, scaling, is_causal)
        return torch.cat([scores.logsumexp(-1) for _, scores in blocks], -1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        query, key, mask, ctx.scaling, ctx.is_causal = inputs
        ctx.save_for_backward(query, key, mask, output)
        ctx.save_for_forward(query, key, mask, output)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, mask, output = ctx.saved_tensors
        groups = key.shape[1]
        query_gradients, key_gradient = [], torch.zeros_like(_at_least_float32(key))
        for rows, scores in _score_blocks(query, key, mask, ctx.scaling, ctx.is_causal):
            weighted = _probabilities(scores, output[..., rows]) * gradient[..., rows, None] * ctx.scaling
            weighted = weighted.unflatten(1, (groups, -1))  # [batch, key-value heads, heads of a group, queries, keys]
            query_gradients.append((weighted @ _at_least_float32(key)[:, :, None]).flatten(1, 2))
            of_rows = _at_least_float32(query[..., rows, :]).unflatten(1, (groups, -1))
            key_gradient = key_gradient + (weighted.transpose(3, 4) @ of_rows).sum(2)
        return torch.cat(query_gradients, 2).to(query.dtype), key_gradient.to(key.dtype), None, None, None

    @staticmethod
    def jvp(ctx: Any, query_tangent: torch.Tensor, key_tangent: torch.Tensor, *_: None) -> torch.Tensor:
        query, key, mask, output = ctx.saved_tensors
        tangents = []
        for rows, scores in _score_blocks(query, key, mask, ctx.scaling, ctx.is_causal):
            changes = _products(query_tangent[..., rows, :], key) + _products(query[..., rows, :], key_tangent)
            tangents.append((_probabilities(scores, output[..., rows]) * changes * ctx.scaling).sum(-1))
        return torch.cat(tangents, -1)


def _score_blocks(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scaling: float, is_causal: bool
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield places of queries and their scores, float32 [batch, heads, rows, keys], -inf where a key is hidden."""
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    if torch.compiler.is_compiling():  # one block, since a number of blocks would fix the graph's sizes
        blocks = [slice(None)]
    else:
        size = max(1, _SCORES // (batch * heads * keys))
        blocks = [slice(start, start + size) for start in range(0, queries, size)]
    for rows in blocks:
        scores = _products(query[..., rows, :], key) * scaling
        if is_causal:
            places = torch.arange(keys, device=key.device)
            scores = scores.masked_fill(places > places[:queries][rows, None], float("-inf"))
        if mask is not None:
            of_rows = mask[..., rows, :] if mask.shape[-2] > 1 else mask
            is_boolean = of_rows.dtype == torch.bool
            scores = scores.masked_fill(~of_rows, float("-inf")) if is_boolean else scores + of_rows
        yield rows, scores


def _products(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Return products of queries and keys, float32 [batch, heads, queries, keys]."""
    grouped = _at_least_float32(query).unflatten(1, (key.shape[1], -1))
    return (grouped @ _at_least_float32(key)[:, :, None].transpose(3, 4)).flatten(1, 2)


def _probabilities(scores: torch.Tensor, log_sum_exp: torch.Tensor) -> torch.Tensor:
    """Return attention probabilities; 0 where a query sees no key."""
    return (scores - log_sum_exp[..., None]).exp().nan_to_num(0.0)


def _at_least_float32(states: torch.Tensor) -> torch.Tensor:
    return states if states.dtype == torch.float64 else states.float()
