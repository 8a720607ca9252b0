"""The original and the model to edit, both as models of this package."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from modeling_gated.checkpoints.checkpoint import open_checkpoint
from modeling_gated.checkpoints.config import naming, with_default_run_settings
from modeling_gated.checkpoints.loading import check_weights
from modeling_gated.checkpoints.sources import Source
from modeling_gated.configuration import GatedLlamaConfig, open_gate
from modeling_gated.conversion import convert_checkpoint
from modeling_gated.conversion.architecture import read_gated_config
from modeling_gated.conversion.gates import changed_gate_layers, ranges
from modeling_gated.errors import AbsorptionError
from modeling_gated.modeling_gated_llama import GatedLlamaForCausalLM
from modeling_gated.training import ungated


def gated_original(source: Source, folder: Path, progress: bool) -> Path:
    """
    The directory of a checkpoint with gates that are exactly 1: its own, or one that is converted into `folder`.

    Raises:
        ConversionError: if it cannot be converted.
        AbsorptionError: if its gates are not 1 any more, or its weights are quantized.
    """
    path = folder
    if (
        source.path.is_dir()
        and open_checkpoint(source.path).raw_config.get("model_type") == GatedLlamaConfig.model_type
    ):
        path = source.path
    elif not folder.is_dir():
        convert_checkpoint(source.path, folder, progress=progress)
    checkpoint = open_checkpoint(path)
    if checkpoint.raw_config.get("quantization_config"):
        raise AbsorptionError(f"{source.path}: is quantized, so its weights cannot be edited")
    config = read_gated_config(checkpoint)
    if changed := changed_gate_layers(checkpoint, config):
        raise AbsorptionError(
            f"{source.path}: its gates are not 1 any more in layers {ranges(changed)}, but trained or imported"
        )
    if not config.gate_bias or config.gate_scale != open_gate(config.gate_init)[1]:
        raise AbsorptionError(f"{source.path}: its gates are not 1, as those that conversion writes are")
    return path


def load_original(path: Path, dtype: torch.dtype, device: torch.device, name: object = None) -> Any:
    """
    Load the model without its gates, frozen, in evaluation mode.

    Raises:
        ConversionError: if a weight is not finite. The message begins with `name`, or with `path` without one.
    """
    model = _load(path, dtype, device)
    check_weights(model, name or path)
    return ungated(model, share_weights=False)


def load_editable(path: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """The same model with gates, and with biases of all attention projections, which are 0 where it had none."""
    model = _load(path, dtype, device)
    model.config.attention_bias = model.config.attention_output_bias = True
    for layer in model.base_model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            projection = getattr(layer.self_attn, name)
            if projection.bias is None:
                zeros = projection.weight.new_zeros(projection.out_features)
                projection.bias = nn.Parameter(zeros, requires_grad=False)
    return model


def _load(path: Path, dtype: torch.dtype, device: torch.device) -> Any:
    # A checkpoint's own says how it is to be used, and may be one that Transformers refuses to save again.
    options = {"generation_config": GenerationConfig(), "use_safetensors": True}
    with naming(path):
        config = with_default_run_settings(read_gated_config(open_checkpoint(path)))
        model = GatedLlamaForCausalLM.from_pretrained(path, config=config, dtype=dtype, **options)
    return model.eval().requires_grad_(False).to(device)
