"""
Checkpoints whose gates are rows of `q_proj`: the paper's authors' format, and Qwen3-Next's.

Either way `q_proj` [rows, hidden_size] is a sequence of blocks, each the rows of some query heads and then those of
the same heads' gates. Taking them apart, and putting them together again, moves whole rows and computes nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from modeling_gated.checkpoints.config import is_qwen3_next
from modeling_gated.checkpoints.safetensors_file import NewTensor, Shard


AUTHORS_FLAGS = {"headwise": "headwise_attn_output_gate", "elementwise": "elementwise_attn_output_gate"}
QWEN3_NEXT_FLAG = "attn_output_gate"
# What Qwen3NextConfig and Qwen3Config have in common and the model reads.
_QWEN3_NEXT_FIELDS = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_bias",
    "attention_dropout",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "dtype",
]


@dataclass(frozen=True)
class FusedGates:
    """
    How `q_proj` holds the gates: `groups` blocks of `query_rows` rows of queries and `gate_rows` rows of gates.

    `norms_from_zero` says that norm weights w stand for 1 + w, as in Qwen3-Next.
    """

    granularity: str
    groups: int
    query_rows: int
    gate_rows: int
    norms_from_zero: bool = False

    @property
    def rows(self) -> int:
        """Rows of the fused `q_proj`."""
        return self.groups * (self.query_rows + self.gate_rows)

    def split(self, shard: Shard, name: str) -> tuple[NewTensor, NewTensor]:
        """Return the query rows and the gate rows of a fused weight [rows, hidden_size] or bias [rows] in a shard."""
        return self._part(shard, name, 0, self.query_rows), self._part(shard, name, self.query_rows, self.gate_rows)

    def _part(self, shard: Shard, name: str, first: int, count: int) -> NewTensor:
        fused = shard.tensors[name]
        row = fused.size // fused.shape[0]
        block = self.query_rows + self.gate_rows

        def parts() -> Iterator[bytes]:
            for group in range(self.groups):
                yield from shard.chunks(name, (group * block + first) * row, count * row)

        return NewTensor(fused.dtype, (self.groups * count, *fused.shape[1:]), self.groups * count * row, parts)

    def join(self, query: tuple[Shard, str], gate: tuple[Shard, str]) -> Iterator[bytes]:
        """Yield the bytes of the fused tensor whose query and gate rows are these tensors."""
        for group in range(self.groups):
            for (shard, name), count in ((query, self.query_rows), (gate, self.gate_rows)):
                tensor = shard.tensors[name]
                size = count * tensor.size // tensor.shape[0]
                yield from shard.chunks(name, group * size, size)


def is_fused(raw: dict[str, Any]) -> bool:
    """Return whether a config.json says that `q_proj` holds gates."""
    return any(raw.get(flag) for flag in (*AUTHORS_FLAGS.values(), QWEN3_NEXT_FLAG)) or is_qwen3_next(raw)


def fused_gates(raw: dict[str, Any], config: PreTrainedConfig) -> FusedGates:
    """
    Return the layout of the gates in `q_proj`.

    Args:
        raw: what config.json says; `is_fused` holds.
        config: the `ungated_config` of it.

    Raises:
        ValueError: if the config contradicts itself.
    """
    heads, head_dim = config.num_attention_heads, config.head_dim
    flags = [granularity for granularity, flag in AUTHORS_FLAGS.items() if raw.get(flag)]
    if len(flags) + bool(raw.get(QWEN3_NEXT_FLAG)) > 1:
        raise ValueError(f"more than one of {', '.join((*AUTHORS_FLAGS.values(), QWEN3_NEXT_FLAG))} is set")
    if flags:  # modeling_qwen3.py of the authors' code: view(batch, seq, num_key_value_heads, -1), then split
        groups = config.num_key_value_heads
        gates = heads // groups * (1 if flags == ["headwise"] else head_dim)
        return FusedGates(flags[0], groups, heads // groups * head_dim, gates)
    # Qwen3NextAttention: view(batch, seq, heads, 2 * head_dim), then chunk. vLLM reads the flag the same way.
    return FusedGates("elementwise", heads, head_dim, head_dim, norms_from_zero=is_qwen3_next(raw))


def ungated_config(raw: dict[str, Any]) -> PreTrainedConfig:
    """
    Return the config, of Transformers' own class, of the decoder around the fused gates.

    Raises:
        ValueError: if the decoder has parts that a Qwen3 does not.
    """
    if not is_qwen3_next(raw):
        # qkv_bias: the authors' name for the biases of q, k, v and o.
        bias = raw.get("qkv_bias", raw.get("attention_bias", False))
        return CONFIG_MAPPING[raw["model_type"]].from_dict(raw | {"attention_bias": bias})
    config = CONFIG_MAPPING["qwen3_next"].from_dict(raw)
    for layer, layer_type in enumerate(config.layer_types):
        if layer_type != "full_attention":
            raise ValueError(
                f"layer_types: layer {layer} of this qwen3_next model is {layer_type!r}, not full attention"
            )
        if layer not in config.mlp_only_layers and config.num_experts and (layer + 1) % config.decoder_sparse_step == 0:
            raise ValueError(f"num_experts={config.num_experts}: layer {layer} is a mixture of experts")
    rotary = config.rope_parameters.get("partial_rotary_factor", 1.0)
    if rotary != 1:
        raise ValueError(f"partial_rotary_factor={rotary}: models that rotate a part of each head are not supported")
    return CONFIG_MAPPING["qwen3"](**{name: getattr(config, name) for name in _QWEN3_NEXT_FIELDS})
