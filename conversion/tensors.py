"""Names and shapes of the base tensors in a checkpoint of a `GatedLlamaConfig`."""

from collections.abc import Iterator

from modeling_gated.configuration import GatedLlamaConfig


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
