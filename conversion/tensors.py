"""Names, shapes and values of the tensors in a checkpoint of a `GatedLlamaConfig`."""

from collections.abc import Iterator

import torch

from modeling_gated.configuration import OPEN_GATE_WEIGHT, GatedLlamaConfig, open_gate


# The modules that quantization may replace, by the ends of their names.
LINEARS = (
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    "lm_head",
)


def base_tensor_shapes(config: GatedLlamaConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """
    Name and shape of every tensor but the gates': what the ungated source has to hold.

    A tied `lm_head.weight` is left out, as a checkpoint may or may not store it.
    """
    assert config.head_dim and config.num_key_value_heads  # the config has filled them in
    hidden, intermediate = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    linears = {
        "self_attn.q_proj": (queries, hidden, config.attention_bias),
        "self_attn.k_proj": (keys, hidden, config.attention_bias),
        "self_attn.v_proj": (keys, hidden, config.attention_bias),
        "self_attn.o_proj": (hidden, queries, config.attention_output_bias),
        "mlp.gate_proj": (intermediate, hidden, config.mlp_bias),
        "mlp.up_proj": (intermediate, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, intermediate, config.mlp_bias),
    }
    norms: dict[str, int] = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if config.use_qk_norm:
        norms |= {"self_attn.q_norm": config.head_dim, "self_attn.k_norm": config.head_dim}

    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        for name, (rows, columns, bias) in linears.items():
            yield f"{prefix}.{name}.weight", (rows, columns)
            if bias:
                yield f"{prefix}.{name}.bias", (rows,)
        for name, size in norms.items():
            yield f"{prefix}.{name}.weight", (size,)
    yield "model.norm.weight", (hidden,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, hidden)


def gate_tensor_shapes(config: GatedLlamaConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """
    Name and shape of every gate tensor: per layer a weight [gates, hidden_size] and, with `gate_bias`, a bias
    [gates], where gates is `num_attention_heads`, elementwise times `head_dim`.
    """
    gates = config.num_attention_heads
    if config.gate_granularity == "elementwise":
        assert config.head_dim
        gates *= config.head_dim
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}.self_attn.g_proj"
        yield f"{prefix}.weight", (gates, config.hidden_size)
        if config.gate_bias:
            yield f"{prefix}.bias", (gates,)


def open_gate_value(name: str, gate_init: float) -> float:
    """Return the number that fills an open gate's tensor: OPEN_GATE_WEIGHT or, for a bias, logit(`gate_init`)."""
    return open_gate(gate_init)[0] if name.endswith(".bias") else OPEN_GATE_WEIGHT


def open_gate_tensor(name: str, shape: tuple[int, ...], gate_init: float, dtype: torch.dtype) -> torch.Tensor:
    """Return the tensor of an open gate, filled with `open_gate_value`; a float16 weight rounds to 0."""
    return torch.full(shape, open_gate_value(name, gate_init), dtype=dtype)
