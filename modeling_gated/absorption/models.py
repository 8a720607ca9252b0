"""Load the source model and the model to edit, both as models of this package."""

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
    Return the directory of a checkpoint whose gates are exactly 1.

    Args:
        source: source checkpoint. A gated checkpoint is used as it is.
        folder: directory for the conversion of an ungated checkpoint; not converted again if it exists.
        progress: show a progress bar, on a terminal.

    Raises:
        ConversionError: if the checkpoint cannot be converted.
        AbsorptionError: if gates are not 1, or weights are quantized.
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
        raise AbsorptionError(
            f"{source.path}: weights must not be quantized, because they are edited; use the unquantized checkpoint"
        )
    config = read_gated_config(checkpoint)
    if changed := changed_gate_layers(checkpoint, config):
        raise AbsorptionError(
            f"{source.path}: gates must be 1, got trained or imported gates in layers {ranges(changed)}; use the "
            "checkpoint from before training"
        )
    if not config.gate_bias or config.gate_scale != open_gate(config.gate_init)[1]:
        raise AbsorptionError(
            f"{source.path}: gates must be 1, as conversion writes them, got gate_bias={config.gate_bias}, "
            f"gate_scale={config.gate_scale}; use an ungated checkpoint"
        )
    return path


def load_original(path: Path, dtype: torch.dtype, device: torch.device, name: object = None) -> Any:
    """
    Load the source model without gates, frozen, in evaluation mode.

    Args:
        path: directory of the checkpoint with gates that are 1.
        dtype: dtype of the weights.
        device: device to load the model on.
        name: name of the checkpoint in errors; `path` by default.

    Raises:
        ConversionError: if a weight is not finite.
    """
    model = _load(path, dtype, device)
    check_weights(model, name or path)
    return ungated(model, share_weights=False)


def load_editable(path: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """Load the model with gates, frozen, in evaluation mode. Missing biases of attention projections are added as 0."""
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
    # An empty generation config, because Transformers refuses to save some checkpoints' own.
    options = {"generation_config": GenerationConfig(), "use_safetensors": True}
    with naming(path):
        config = with_default_run_settings(read_gated_config(open_checkpoint(path)))
        model = GatedLlamaForCausalLM.from_pretrained(path, config=config, dtype=dtype, **options)
    return model.eval().requires_grad_(False).to(device)
