"""PEFT configs that treat gates in a way of their own."""

from collections.abc import Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any, Literal

from modeling_gated.configuration.configuration_gated_llama import GATE_PROJECTIONS
from modeling_gated.gate_names import ALL_GATES, GATE_NAMES, is_gate


if TYPE_CHECKING:
    from peft import PeftConfig


def gate_peft_config(
    base: "PeftConfig | None" = None,
    gates: Literal["full", "frozen"] = "full",
    gate_position: Sequence[str] = ("G1",),
) -> "PeftConfig":
    """
    Return the PEFT config with which a gated model's gates are trained in full, or left alone.

    | `base` | `gates` | what is trained |
    | --- | --- | --- |
    | None | `"full"` | gates only: weights and biases, as PEFT's LayerNorm tuning trains layers (`LNTuningConfig`) |
    | `LoraConfig(...)` | `"full"` | `base`, and the gates' weights and biases (`modules_to_save`) |
    | `LoraConfig(...)` | `"frozen"` | `base` alone; the gates stay as they are, also with `"all-linear"` |

    With gates in full, adapters can be saved, loaded, switched and merged into the model; averaging them and swapping
    them in place, `add_weighted_adapter` and `hotswap_adapter`, raise a ValueError. Both work with gates frozen.

    Gates in full have the dtype that they have in the model. In a bfloat16 one small updates of them round away, unless
    it was loaded with `gate_dtype="float32"`; an adapter's base has to be loaded so, too, or its config has to say so.

    Args:
        base: a config of any PEFT method that has `modules_to_save` and `exclude_modules`. It is not changed.
        gates: `"full"` or `"frozen"`.
        gate_position: what is gated in the model: `model.config.gate_position`, unless it has G1 gates alone. PEFT
            takes no notice of gates in full that a model lacks.

    Raises:
        ImportError: if PEFT is not installed.
        ValueError: if nothing would be trained, `base` targets the gates itself or can't leave modules out, or `gates`
            or `gate_position` is not known.
    """
    if gates not in ("full", "frozen"):
        raise ValueError(f"gates must be 'full' or 'frozen', got {gates!r}")
    if unknown := [position for position in gate_position if position not in GATE_PROJECTIONS]:
        raise ValueError(f"gate_position must be among {', '.join(GATE_PROJECTIONS)}, got {unknown[0]!r}")
    names = [GATE_PROJECTIONS[position] for position in gate_position]
    if gates == "full" and not names:
        raise ValueError("gate_position must name a position, got []: there is no gate to train")
    if base is None:
        if gates == "frozen":
            raise ValueError("gates='frozen' without a base: nothing would be trained")
        from peft import LNTuningConfig

        return LNTuningConfig(target_modules=names, task_type="CAUSAL_LM")

    config: Any = deepcopy(base)
    for field in ("target_modules", "modules_to_save", "exclude_modules"):
        if not hasattr(config, field):
            raise ValueError(
                f"base must have {field}, got {type(base).__name__}, which cannot treat gates apart from other layers"
            )
    for field in ("target_modules", "target_parameters", "modules_to_save"):
        named = getattr(config, field, None) or []
        if not isinstance(named, str) and (theirs := [name for name in named if is_gate(name)]):
            raise ValueError(
                f"base.{field} must not include {theirs[0]!r}: gates={gates!r} already sets how gates are trained"
            )
    if gates == "frozen" and getattr(config, "bias", None) == "all":
        raise ValueError("base.bias='all' with gates='frozen': it would train the gates' biases")
    if gates == "full":
        config.modules_to_save = [*(config.modules_to_save or []), *names]
    if isinstance(config.target_modules, str):  # "all-linear", or an expression that the gates' names may match
        excluded = config.exclude_modules
        if isinstance(excluded, str):
            config.exclude_modules = f"{excluded}|{ALL_GATES}"
        else:
            config.exclude_modules = [*(excluded or []), *sorted(GATE_NAMES)]
    return config
