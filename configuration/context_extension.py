"""
Longer contexts by RoPE: a larger base, which training at the new length goes with, or YaRN, which needs none.

The recipe of "Gated Attention for Large Language Models" (arXiv 2505.06708, Table 5) is the one, then the other.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedConfig


Method = Literal["rope_base", "yarn"]

# YaRN's, for Llama (arXiv 2309.00071, Section 3.2).
_BETA_FAST, _BETA_SLOW = 32.0, 1.0
_FIELDS = ("rope_parameters", "max_position_embeddings", "original_max_position_embeddings")
_MAX_LENGTH = 2**31
_PLAIN_FIELDS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_State = dict[str, Any]


@dataclass(frozen=True)
class ContextExtension:
    """
    What `extend_context` did to a config or a model: the new `rope_parameters` and `max_position_embeddings`, and
    those from before.
    """

    rope_parameters: dict[str, Any]
    max_position_embeddings: int
    previous_rope_parameters: dict[str, Any]
    previous_max_position_embeddings: int
    _configs: tuple[tuple[PreTrainedConfig, _State], ...]
    _rotary_states: tuple[tuple[nn.Module, _State], ...]

    def undo(self) -> None:
        """
        Give the config, or the model with its rotary module, what it had before. KV caches from between are invalid.

        Raises:
            ValueError: if `rope_parameters` or `max_position_embeddings` were changed since; undo that first.
        """
        for config, _ in self._configs:
            if (config.rope_parameters, config.max_position_embeddings) != (
                self.rope_parameters,
                self.max_position_embeddings,
            ):
                raise ValueError(
                    f"rope_parameters={config.rope_parameters}, "
                    f"max_position_embeddings={config.max_position_embeddings}: changed since, so there is nothing "
                    "to undo; undo later extensions first"
                )
        for config, fields in self._configs:
            _set_fields(config, fields)
        for module, state in self._rotary_states:
            _set_rotary_state(module, state)


def extend_context(
    config_or_model: PreTrainedConfig | nn.Module,
    length: int,
    method: Method = "rope_base",
    rope_theta: float | None = None,
    *,
    factor: float | None = None,
    original_max_position_embeddings: int | None = None,
    replace_scaling: bool = False,
) -> ContextExtension:
    """
    Make a config, or a loaded model at once, one for inputs of `length` tokens.

    Of a model the rotary module is rebuilt too, on its device. (Setting `config.rope_parameters` alone would change
    what is saved and not what is computed.) A KV cache from before is invalid afterwards: its keys were turned by the
    old frequencies. Change a model before `torch.compile` and before training starts.

    `"rope_base"` raises the base of RoPE, `rope_theta`. Training at the new length is expected to follow. If no
    `rope_theta` is given, it is

        rope_theta' = rope_theta * (length / original length) ** (d / (d - 2)),    d: head_dim

    with which the slowest pair of channels turns as far over the new length as over the old (NTK-aware scaling,
    arXiv 2309.00071, Section 3.1). That is the least that can be asked for; the paper takes more, 1e6 for 10k to reach
    32k tokens, where the rule gives 83k.

    `"yarn"` interpolates the pairs that turn slowly and leaves the fast ones, and scales attention logits
    (arXiv 2309.00071, Section 3.2 and 3.3), with factor = length / original length, attention_factor =
    0.1 ln(factor) + 1, beta_fast = 32, beta_slow = 1. As in Transformers and in its authors' code, the ramp between
    the two is linear in the index of the pair, from the floor of the index that turns `beta_fast` times over the
    original length to the ceiling of the one that turns `beta_slow` times (`truncate`); gamma(r) of the paper, Eq. 18,
    is linear in the number of turns r. It acts on every input, short ones too, and costs them some quality.

    Positions that are scaled already (`rope_type` `"yarn"`, `"llama3"`, `"linear"`, `"dynamic"`, `"longrope"`) are
    left alone unless `replace_scaling=True`, which takes that scaling away and starts from the plain RoPE under it, so
    that `length` may then be less than `max_position_embeddings`, though not than the length before the scaling. A
    model that was trained with its scaling, as Llama 3.1 was, then has to be trained again.

    Args:
        config_or_model: a config with one set of `rope_parameters` for all layers, changed in place; or a model, its
            heads and adapters included.
        length: the new `max_position_embeddings`, in tokens.
        method: `"rope_base"` or `"yarn"`.
        rope_theta: the new base, for `"rope_base"`.
        factor: what YaRN's factor is expected to be; it follows from the lengths, and another value is refused.
        original_max_position_embeddings: the length that the model was trained at, in tokens. If not given,
            `max_position_embeddings`; of a scaling that is replaced, its `original_max_position_embeddings` if it has
            one, and `max_position_embeddings` for `"dynamic"`.
        replace_scaling: replace a scaling that is there, YaRN by YaRN included.

    Returns:
        What was changed, with a method `undo`.

    Raises:
        ValueError: if the numbers contradict each other or what is there. Nothing is changed then.
    """
    configs, rotaries = _parts(config_or_model)
    extended = copy.deepcopy(configs[0])
    _standardize(extended)
    for name, number in (("rope_theta", rope_theta), ("factor", factor)):
        is_number = isinstance(number, float) or (type(number) is int and number < 1e300)
        if number is not None and not is_number:
            raise ValueError(f"{name} must be a finite number, got {number!r}")
    _check_length("length", length)
    original = _original_length(extended, original_max_position_embeddings, replace_scaling)
    if method == "rope_base":
        if factor is not None:
            raise ValueError(f"factor={factor} is for method='yarn'; method='rope_base' has none")
        new = _with_larger_base(extended, length, original, rope_theta)
    elif method == "yarn":
        new = _yarn(extended, length, original, rope_theta, factor)
    else:
        raise ValueError(f"method must be 'rope_base' or 'yarn', got {method!r}")

    if length < extended.max_position_embeddings and extended.rope_parameters["rope_type"] == "default":
        raise ValueError(f"length={length} is less than max_position_embeddings={extended.max_position_embeddings}")

    fields = {"rope_parameters": new, "max_position_embeddings": length}
    if hasattr(extended, "original_max_position_embeddings"):  # Transformers puts it before rope_parameters'
        fields["original_max_position_embeddings"] = new.get("original_max_position_embeddings", length)
    _set_fields(extended, fields)
    previous = [_fields_of(config) for config in configs]
    states = [(module, _rotary_state(module), _rotary_state(_rebuilt(module, extended))) for module in rotaries]
    for config in configs:
        _set_fields(config, fields)
    for module, _, state in states:
        _set_rotary_state(module, state)
    return ContextExtension(
        rope_parameters=new,
        max_position_embeddings=length,
        previous_rope_parameters=previous[0]["rope_parameters"],
        previous_max_position_embeddings=previous[0]["max_position_embeddings"],
        _configs=tuple(zip(configs, previous, strict=True)),
        _rotary_states=tuple((module, before) for module, before, _ in states),
    )


def describe_context(config: PreTrainedConfig) -> str:
    """Return the length that a config says its model is for, and its RoPE, in words."""
    rope = config.rope_parameters
    words = [f"{config.max_position_embeddings:,} tokens", f"rope_theta {_written(rope['rope_theta'], ',.0f')}"]
    if rope.get("rope_type", "default") != "default":
        words.append(f"{rope['rope_type']}")
    if "factor" in rope:
        words.append(f"factor {_written(rope['factor'], 'g')}")
    if "original_max_position_embeddings" in rope:
        words.append(f"from {_written(rope['original_max_position_embeddings'], ',')}")
    return ", ".join(words)


def _written(value: object, form: str) -> str:
    """Return a number, or whatever else a damaged config has in its place."""
    return format(value, form) if isinstance(value, int | float) else repr(value)


def _parts(config_or_model: PreTrainedConfig | nn.Module) -> tuple[tuple[PreTrainedConfig, ...], list[nn.Module]]:
    """Return the configs to change, which say the same, and the rotary modules that were made of them."""
    if isinstance(config_or_model, PreTrainedConfig):
        return (config_or_model,), []
    if not isinstance(config_or_model, nn.Module):
        raise ValueError(f"{type(config_or_model).__name__} is neither a config nor a model")
    modules = list(config_or_model.modules())
    rotaries = [module for module in modules if "inv_freq" in module._buffers and _config_of(module) is not None]
    if not rotaries:
        raise ValueError(f"{type(config_or_model).__name__} has no rotary module that was made of a config")
    first = _config_of(rotaries[0])
    assert first is not None
    # A head and the decoder under it may each have a config of their own.
    candidates = (_config_of(module) for module in modules)
    configs = {
        id(config): config for config in candidates if config is not None and config.model_type == first.model_type
    }
    if any(id(_config_of(module)) not in configs for module in rotaries) or any(
        _fields_of(config) != _fields_of(first) for config in configs.values()
    ):
        raise ValueError(f"{type(config_or_model).__name__} has rotary modules of different rope_parameters")
    return tuple(configs.values()), rotaries


def _config_of(module: nn.Module) -> PreTrainedConfig | None:
    config = getattr(module, "config", None)
    return config if isinstance(config, PreTrainedConfig) else None


def _fields_of(config: PreTrainedConfig) -> _State:
    return {name: copy.deepcopy(getattr(config, name)) for name in _FIELDS if hasattr(config, name)}


def _set_fields(config: PreTrainedConfig, fields: _State) -> None:
    for name, value in fields.items():
        setattr(config, name, copy.deepcopy(value))


def _standardize(config: PreTrainedConfig) -> None:
    """Give a config's rope_parameters the fields that Transformers reads, and check those that are computed with."""
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        raise ValueError(f"{type(config).__name__} has no rope_parameters")
    if any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(f"rope_parameters={rope}: differ from layer to layer, which is not supported")
    config.standardize_rope_params()
    if rope["rope_type"] == "default" and (unknown := rope.keys() - _PLAIN_FIELDS):
        raise ValueError(f"rope_parameters={rope}: {min(unknown)} is not known of a plain RoPE")
    theta = rope["rope_theta"]
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not 1 < theta < math.inf:
        raise ValueError(f"rope_theta in rope_parameters must be a positive number, got {theta!r}")


def _rotary_state(module: nn.Module) -> _State:
    """Return the buffers and attributes of a rotary module, except its config."""
    attributes = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    state = attributes | {name: buffer.clone() for name, buffer in module.named_buffers()}
    return {name: value for name, value in state.items() if name not in ("config", "training")}


def _rebuilt(module: nn.Module, config: PreTrainedConfig) -> nn.Module:
    """Return a rotary module like `module`, on its device, of another config."""
    return type(module)(config).to(module.inv_freq.device)  # type: ignore[arg-type]


def _set_rotary_state(module: nn.Module, state: _State) -> None:
    """Set it in place, so that hooks and parents hold the same module."""
    device = module.inv_freq.device
    buffers = dict(module.named_buffers())
    for name, value in state.items():
        setattr(module, name, value.to(device) if name in buffers else value)


def _original_length(config: PreTrainedConfig, length: int | None, replace_scaling: bool) -> int:
    """Return the length that the RoPE without its scaling, if there is one, was made for."""
    rope = config.rope_parameters
    rope_type = rope["rope_type"]
    if rope_type != "default" and not replace_scaling:
        numbers = ", ".join(f"{name}={value}" for name, value in rope.items() if name != "rope_type")
        raise ValueError(
            f"rope_parameters scale positions already: rope_type={rope_type!r}, {numbers}; replace_scaling=True takes "
            "that away first"
        )
    original = length
    if original is None and rope_type in ("default", "dynamic"):
        original = config.max_position_embeddings
    elif original is None and (original := rope.get("original_max_position_embeddings")) is None:
        raise ValueError(
            f"rope_type={rope_type!r} does not say what length the model had before, so "
            "original_max_position_embeddings has to be given"
        )
    _check_length("original_max_position_embeddings", original)
    return original


def _check_length(name: str, length: object) -> None:
    if isinstance(length, bool) or not isinstance(length, int) or not 0 < length < _MAX_LENGTH:
        raise ValueError(f"{name} must be a number of tokens, got {length!r}")


def _kept(config: PreTrainedConfig) -> dict[str, Any]:
    """Check what no extension may change."""
    return {name: value for name, value in config.rope_parameters.items() if name == "partial_rotary_factor"}


def _with_larger_base(config: PreTrainedConfig, length: int, original: int, rope_theta: float | None) -> dict[str, Any]:
    current = config.rope_parameters["rope_theta"]
    if length < original or (length == original and rope_theta is None):
        raise ValueError(f"length={length} is not more than the {original} tokens that the model is for")
    if rope_theta is None:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        rotated = int(head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
        if rotated < 4:
            raise ValueError(f"head_dim={head_dim} has one pair of channels, for which the rule has no rope_theta")
        rope_theta = current * (length / original) ** (rotated / (rotated - 2))
    if not math.isfinite(rope_theta) or rope_theta < current or (length == original and rope_theta == current):
        raise ValueError(f"rope_theta={rope_theta} does not raise the base, which is {current}")
    return {"rope_type": "default", "rope_theta": float(rope_theta)} | _kept(config)


def _yarn(
    config: PreTrainedConfig, length: int, original: int, rope_theta: float | None, factor: float | None
) -> dict[str, Any]:
    current = config.rope_parameters["rope_theta"]
    if rope_theta is not None and rope_theta != current:
        raise ValueError(
            f"rope_theta={rope_theta} with method='yarn', which keeps the base, here {current}; raise it first, with "
            "method='rope_base'"
        )
    if length <= original:
        raise ValueError(f"length={length} is not more than the {original} tokens that the model is for")
    expected = length / original
    if factor is not None and not math.isclose(factor, expected):
        raise ValueError(f"factor={factor} contradicts the lengths: {length} / {original} = {expected}")
    return {
        "rope_type": "yarn",
        "rope_theta": current,
        "factor": expected,
        "original_max_position_embeddings": original,
        "attention_factor": 0.1 * math.log(expected) + 1.0,
        "beta_fast": _BETA_FAST,
        "beta_slow": _BETA_SLOW,
        "truncate": True,
    } | _kept(config)
