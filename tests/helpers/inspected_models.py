"""Tiny models to inspect, inputs to inspect them on, and what eager attention says of them in float64."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
)

from tests.helpers.gated_models import gated_model
from tests.helpers.source_models import SIZES, randomize


TOKENS = 40
SLIDING: dict[str, Any] = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}
EXPERTS: dict[str, Any] = {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8, "sliding_window": 8}


def inspected_model(name: str) -> PreTrainedModel:
    """In float32, of a kind that differs in its attention."""
    configs = {
        "llama, grouped queries": lambda: LlamaConfig(**SIZES),
        "mistral, sliding window": lambda: MistralConfig(**SIZES, sliding_window=8, head_dim=16),
        "qwen2, upper layers sliding": lambda: Qwen2Config(**SIZES, **SLIDING),
        "gemma2, softcap": lambda: Gemma2Config(**SIZES, head_dim=8, sliding_window=8, attn_logit_softcapping=2.0),
        "gpt_oss, learned sinks": lambda: GptOssConfig(**SIZES, **EXPERTS),
        "gpt2, no o_proj": lambda: GPT2Config(vocab_size=96, n_embd=72, n_layer=3, n_head=9, n_positions=256),
    }
    if name == "gated_llama":
        return gated_model("sliding upper layers")
    model = AutoModelForCausalLM.from_config(configs[name]())
    randomize(model)
    # gpt_oss and gemma2 have no softcap or sinks by sdpa
    eager = name.startswith(("gemma2", "gpt_oss"))
    model.set_attn_implementation("eager" if eager else "sdpa")
    return model.eval()


MODELS = (
    "llama, grouped queries",
    "mistral, sliding window",
    "qwen2, upper layers sliding",
    "gemma2, softcap",
    "gpt_oss, learned sinks",
    "gpt2, no o_proj",
    "gated_llama",
)
# First token of each sequence, and the tokens of each: by sequence of the batch.
INPUTS: dict[str, list[list[range]]] = {
    "plain": [[range(0, 40)], [range(0, 40)]],
    "padded left": [[range(0, 40)], [range(13, 40)]],
    "padded right": [[range(0, 31)], [range(0, 40)]],
    "packed": [[range(0, 11), range(11, 12), range(12, 40)], [range(0, 25), range(25, 40)]],
}


def inputs_of(kind: str) -> dict[str, Any]:
    """Arguments of a model's forward."""
    ids = torch.randint(1, 96, (2, TOKENS), generator=torch.Generator().manual_seed(3))
    inputs: dict[str, Any] = {"input_ids": ids}
    if kind.startswith("padded"):
        inputs["attention_mask"] = torch.zeros(2, TOKENS, dtype=torch.long)
        for row, sequences in enumerate(INPUTS[kind]):
            inputs["attention_mask"][row, list(sequences[0])] = 1
    if kind == "packed":  # with a cache, Transformers takes all for one sequence
        inputs["use_cache"] = False
        rows = [[place for sequence in sequences for place in range(len(sequence))] for sequences in INPUTS[kind]]
        inputs["position_ids"] = torch.tensor(rows)
    return inputs


@torch.no_grad()
def eager_attention(model: PreTrainedModel, inputs: dict[str, Any]) -> list[np.ndarray]:
    """Of each layer, float64 [batch, heads, queries, keys], from a float64 model, whose eager softmax is float32."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    output = model(**inputs, output_attentions=True)
    model.set_attn_implementation(before)
    return [attention.double().numpy() for attention in output.attentions]


def sequences(kind: str) -> Iterator[tuple[int, range]]:
    """Each sequence of an input that has more than one token, with its row of the batch."""
    for row, parts in enumerate(INPUTS[kind]):
        yield from ((row, places) for places in parts if len(places) > 1)


def mean_over_queries(attention: np.ndarray, kind: str, value: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """[heads]: mean over all queries but the first of `value` of a sequence's probabilities [heads, queries, keys]."""
    parts = []
    for row, places in sequences(kind):
        probabilities = attention[row][:, places.start : places.stop, places.start : places.stop]
        parts.append(value(probabilities)[:, 1:])
    return np.concatenate(parts, axis=1).mean(axis=1)
