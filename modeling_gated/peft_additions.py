"""Additions to PEFT: targets in a gated model, and errors for what PEFT cannot do with gates or a KV cache."""

from collections.abc import Iterable
from functools import wraps
from importlib.metadata import version
from types import ModuleType
from typing import Any, NoReturn

import transformers
from packaging.version import Version
from wrapt import wrap_function_wrapper

from .configuration import GatedLlamaConfig
from .gate_names import is_gate
from .kv_cache import CACHE_ARGUMENT, given_cache


GATES_IN_FULL = (
    "PEFT can neither average adapters that train gates in full nor swap them in place: load each under a name of its "
    "own (load_adapter) and switch between them (set_adapter), or train with gates frozen"
)


def add_default_target_modules(constants: ModuleType) -> None:
    """
    Let PEFT's methods target in a gated model what they target in a Llama where a config names no `target_modules`.

    Args:
        constants: `peft.utils.constants`, whose tables PEFT has no other way to add to.
    """
    for table in _targets(constants):
        table.setdefault(GatedLlamaConfig.model_type, table["llama"])


def use_target_modules_of_sources(tuners_utils: ModuleType) -> None:
    """
    Let PEFT's methods target in a converted model what they target in its source, if all of them know its model type.

    Args:
        tuners_utils: `peft.tuners.tuners_utils`.
    """
    original_function = tuners_utils.BaseTuner.get_model_config

    def get_model_config(model: Any) -> dict[str, Any]:
        from peft.utils import constants

        config = original_function(model)
        source = config.get("source_model_type")
        if config["model_type"] == GatedLlamaConfig.model_type and all(
            source in table for table in _targets(constants)
        ):
            return config | {"model_type": source}
        return config

    tuners_utils.BaseTuner.get_model_config = staticmethod(get_model_config)


def _targets(constants: ModuleType) -> list[dict[str, Any]]:
    """Return PEFT's tables of target modules by model type, as far as they know Llama."""
    tables = [table for name, table in vars(constants).items() if name.startswith("TRANSFORMERS_MODELS_TO_")]
    return [table for table in tables if isinstance(table, dict) and "llama" in table]


def add_adaption_prompt(config: ModuleType) -> None:
    """
    Let PEFT's adaption prompts work in a gated model as in a Llama.

    The prompts' output is added to that of the attention block, after its gates.

    Args:
        config: `peft.tuners.adaption_prompt.config`, whose table PEFT has no other way to add to.
    """
    table = config.TRANSFORMERS_MODEL_CONFIG
    _, *names = table["llama"]  # a named tuple, whose first field is the function
    table.setdefault(GatedLlamaConfig.model_type, config.ModelTypeConfig(_query_states, *names))


def _query_states(model: Any, *, hidden_states: Any, position_embeddings: Any, **_: Any) -> Any:
    """Return an attention block's queries [batch, heads, seq, head_dim], gated, normalized and rotated."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    queries = model.q_proj(hidden_states).view(*hidden_states.shape[:-1], -1, model.head_dim)
    gate_input = hidden_states.new_ones(1, 1) if model.is_input_independent else hidden_states
    queries = model.gated(queries, model.g_q_proj, gate_input)
    if model.q_norm is not None:
        queries = model.q_norm(queries)
    queries = queries.transpose(1, 2)
    return apply_rotary_pos_emb(queries, queries, *position_embeddings)[0]


def refuse_hotswapping_gates(hotswap: ModuleType) -> None:
    """
    Let PEFT's hot-swapping say why it can't be done with adapters that train gates in full; it would raise a KeyError.

    Args:
        hotswap: `peft.utils.hotswap`.
    """

    def checked(swap: Any, instance: None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        from peft.utils.other import ModulesToSaveWrapper

        arguments = dict(zip(("model", "state_dict"), args, strict=False)) | kwargs
        in_full = [
            name for name, module in arguments["model"].named_modules() if isinstance(module, ModulesToSaveWrapper)
        ]
        in_full += [name for name in arguments["state_dict"] if ".lora_" not in name]
        for name in in_full:
            if is_gate(name):
                raise ValueError(f"{name}: {GATES_IN_FULL}")
        return swap(*args, **kwargs)

    wrap_function_wrapper(hotswap, "hotswap_adapter_from_state_dict", checked)


def refuse_averaging_gates(ln_tuning: ModuleType) -> None:
    """
    Let PEFT's LayerNorm tuning, with which gates alone are trained, say that it can't average adapters.

    Args:
        ln_tuning: `peft.tuners.ln_tuning.model`.
    """

    def add_weighted_adapter(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        if not any(is_gate(name) for name in self.targeted_module_names):
            raise AttributeError("PEFT's LayerNorm tuning has no add_weighted_adapter")
        raise ValueError(GATES_IN_FULL)

    if not hasattr(ln_tuning.LNTuningModel, "add_weighted_adapter"):
        ln_tuning.LNTuningModel.add_weighted_adapter = add_weighted_adapter


def refuse_losing_the_cache(peft_model: ModuleType) -> None:
    """
    Let prompt learning refuse cached generation with a gated model where PEFT would lose the cache and generate wrong
    text without an error: PEFT before 0.22 does not know the cache's name in Transformers 5.24.

    Args:
        peft_model: `peft.peft_model`.
    """

    def checked(prepare: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        config = instance.active_peft_config
        if config.is_prompt_learning:
            _refuse_cache(instance.get_base_model(), (*args, *kwargs.values()), config.peft_type.value)
        return prepare(*args, **kwargs)

    if _peft_loses_caches():
        wrap_function_wrapper(peft_model, "PeftModelForCausalLM.prepare_inputs_for_generation", checked)


def refuse_losing_the_cache_of_shadows(shadow: ModuleType) -> None:
    """
    Let Shadow tuning refuse a KV cache with a gated model, as `refuse_losing_the_cache` lets prompt learning.

    Args:
        shadow: `peft.tuners.shadow.model`.
    """

    if not _peft_loses_caches() or not hasattr(shadow.ShadowModel, "_seed_shadow_pre_hook"):
        return
    seed = shadow.ShadowModel._seed_shadow_pre_hook

    @wraps(seed)  # a plain function: PEFT keeps it as a hook of the model, which must stay to be copied and pickled
    def checked(self: Any, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._shadow_path_active():
            _refuse_cache(module, kwargs.values(), "SHADOW")
        return seed(self, module, args, kwargs)

    shadow.ShadowModel._seed_shadow_pre_hook = checked


def _peft_loses_caches() -> bool:
    return CACHE_ARGUMENT != "past_key_values" and Version(version("peft")) < Version("0.22.0.dev0")


def _refuse_cache(model: Any, arguments: Iterable[Any], method: str) -> None:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type == GatedLlamaConfig.model_type and given_cache(arguments) is not None:
        raise ValueError(
            f"{method} must generate with use_cache=False: PEFT {version('peft')} loses the KV cache of transformers "
            f"{transformers.__version__}; or install peft>=0.22 or transformers<5.24"
        )
