"""A trial of a config: a small model that has it must compute, before anything is written."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig

from modeling_gated.checkpoints.checkpoint import Checkpoint
from modeling_gated.checkpoints.config import with_default_run_settings
from modeling_gated.errors import ConversionError

from .quiet import quiet_transformers


_PROMPT_TOKENS, _VOCABULARY = 4, 64
_MOST_TRIALS = 200  # for the field that is wrong: some seconds
# Fields that are never wrong alone, or whose removal would make another model.
_KEPT_FIELDS = (
    *("model_type", "architectures", "transformers_version", "rope_type", "type"),
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
)


def check_configs_run(checkpoint: Checkpoint, configs: Callable[[Checkpoint], Iterable[PreTrainedConfig]]) -> None:
    """
    Check that models with a checkpoint's configs compute finite logits for a prompt and, with a KV cache, a next token.

    The models keep heads and RoPE, and are narrow and one layer deep, with a layer more for each further
    kind of attention, so that this takes no weights and a second at most. It finds fields of a wrong type or value, and
    fields that one type of RoPE ignores and another one reads.

    Args:
        checkpoint: the checkpoint that the configs come from.
        configs: makes the configs, of Transformers' classes or ours, of a checkpoint with this or another config.json.

    Raises:
        ConversionError: if a model does not compute. The line names the field to change, if one alone is the reason.
    """
    if (error := _failure(checkpoint, configs)) is None:
        return
    culprit = None
    for field, value, rest in islice(_without_a_field(checkpoint.raw_config), _MOST_TRIALS):
        other = _failure(replace(checkpoint, raw_config=rest), configs)
        if other is None or (culprit is None and other != error):  # another error: there are two wrong fields
            culprit = f"{field}={value!r:.200}"
        if other is None:
            break
    named = f"{culprit}: the model cannot run with it" if culprit else "the model cannot run"
    raise ConversionError(f"{checkpoint.config_path}: {named}: {error}; correct the {'field' if culprit else 'config'}")


def _without_a_field(raw: dict[str, Any]) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Yield each field's name and value with a config that has it nowhere: RoPE's whole dict last, after its fields."""
    named = [(name, name, value) for name, value in raw.items() if not name.startswith("rope_")]
    for outer, fields in raw.items():
        if isinstance(fields, dict) and outer.startswith("rope_"):
            named += [(f"{outer}.{name}", name, value) for name, value in fields.items()]
    named += [(name, name, value) for name, value in raw.items() if name.startswith("rope_")]
    for label, name, value in named:
        if name not in _KEPT_FIELDS:
            rest = {key: other for key, other in raw.items() if key != name}
            for outer, fields in rest.items():
                if isinstance(fields, dict):
                    rest[outer] = {key: fields[key] for key in fields if key != name}
            yield label, value, rest


def _failure(checkpoint: Checkpoint, configs: Callable[[Checkpoint], Iterable[PreTrainedConfig]]) -> str | None:
    """Return what goes wrong with a checkpoint's configs, None if nothing does."""
    try:
        with quiet_transformers():
            for config in configs(checkpoint):
                _run(config)
    except MemoryError:
        raise
    except Exception as error:  # of any kind: it comes from whatever a field's value meets in a model's code
        return f"{type(error).__name__}: {error}"
    return None


@torch.no_grad()
def _run(config: PreTrainedConfig) -> None:
    # Here, as the rest of a conversion needs no model.
    from transformers import AutoModelForCausalLM

    import modeling_gated.registration  # noqa: F401 - makes the Auto classes know gated_llama
    from modeling_gated.kv_cache import cache_argument

    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(_small(config), dtype=torch.float32, trust_remote_code=False).eval()
        ids = torch.arange(_PROMPT_TOKENS + 1)[None] % config.vocab_size
        cache: dict[str, Any] = {cache_argument(model.forward): DynamicCache(config=model.config)}
        for tokens in ids.split([_PROMPT_TOKENS, 1], dim=-1):
            logits = model(input_ids=tokens, **cache).logits
            if not torch.isfinite(logits).all():
                raise ValueError("the logits are not finite")


def _small(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config of a model with the same heads that is cheap to make."""
    heads, return_dict = config.num_attention_heads, config.return_dict
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    layer_types = getattr(config, "layer_types", None)
    config = with_default_run_settings(config)
    config.return_dict = return_dict  # Transformers' models have no forward pass without it
    config._attn_implementation = "eager"  # other kernels may make a finite number of a NaN
    config.quantization_config = None
    config.head_dim, config.hidden_size, config.intermediate_size = head_dim, heads, 8
    if config.pad_token_id is not None and -config.vocab_size <= config.pad_token_id < config.vocab_size:
        config.pad_token_id = None  # within the vocabulary, which becomes smaller
    config.vocab_size = min(config.vocab_size, _VOCABULARY)
    kinds = sorted(set(layer_types)) if layer_types else []
    config.num_hidden_layers = len(kinds) or 1
    if kinds:
        config.layer_types = kinds
    return config
