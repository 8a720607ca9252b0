"""Plan of a conversion: every file of the result, the source of its bytes, and its size."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from transformers import PreTrainedConfig

from modeling_gated.checkpoints.checkpoint import Checkpoint
from modeling_gated.checkpoints.file_names import OWN_FILES
from modeling_gated.checkpoints.safetensors_file import NewTensor, Shard, new_tensor
from modeling_gated.checkpoints.sources import Source
from modeling_gated.configuration import GatedLlamaConfig
from modeling_gated.errors import ConversionError

from .architecture import Architecture, read_architecture
from .gates import gate_tensor_shapes, open_gates
from .tensors import base_tensor_shapes
from .tokenizers import is_tokenizer_file, load_tokenizer, tokenizer_changes
from .trial import check_configs_run


@dataclass(frozen=True)
class Plan:
    """
    A conversion that has been checked and can be carried out.

    `shards` maps each of the result's base shards to the source's; those in `rewritten` get new tensors, all others
    are placed as they are. `gates` are the tensors of one shard more, `gate_shard`. `side_files` are names of the
    source's files that come along byte for byte, `tokenizer_files` the content of those that must differ so that the
    result has the source's tokenizer, `tokenizer_error` why that could not be loaded, if so. `context` holds the
    arguments of each `extend_context`, `left_out` the sizes in bytes of the source's files that do not come along.
    """

    source: Source
    checkpoint: Checkpoint
    architecture: Architecture
    shards: dict[str, Shard]
    rewritten: dict[str, dict[str, NewTensor]]
    gate_shard: str
    gates: dict[str, NewTensor]
    side_files: tuple[str, ...]
    tokenizer_files: dict[str, bytes]
    tokenizer_error: str | None
    context: tuple[Mapping[str, Any], ...]
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def base_parameters(self) -> int:
        """Parameters of the ungated model."""
        return sum(prod(shape) for _, shape in base_tensor_shapes(self.architecture.config))

    @property
    def gate_parameters(self) -> int:
        """Parameters of the gates."""
        return sum(prod(tensor.shape) for tensor in self.gates.values())

    @property
    def placed(self) -> dict[str, Shard]:
        """The shards that are placed as they are."""
        return {name: shard for name, shard in self.shards.items() if name not in self.rewritten}

    @property
    def new_bytes(self) -> int:
        """Bytes of tensors that are written, whichever way the placed shards get there."""
        tensors = [*self.gates.values(), *(new for shard in self.rewritten.values() for new in shard.values())]
        return sum(tensor.size for tensor in tensors)

    def files(self) -> Iterator[tuple[str, int | None, str]]:
        """Name, bytes and origin of each file; the bytes are None where they depend on what is written."""
        kept = "dequantized" if self.source.is_gguf else "byte for byte"
        for name, shard in self.shards.items():
            new = self.rewritten.get(name)
            size = shard.file_bytes if new is None else sum(tensor.size for tensor in new.values())
            yield name, size, f"{shard.name}, {kept if new is None else 'its gates taken out'}"
        yield self.gate_shard, sum(tensor.size for tensor in self.gates.values()), f"{len(self.gates)} gate tensors"
        for name in OWN_FILES:
            yield name, None, "new"
        for name, content in self.tokenizer_files.items():
            yield name, len(content), "new, so that the tokenizer is the source's"
        for name in self.side_files:
            yield name, os.path.getsize(self.checkpoint.directory / name), "from the source, byte for byte"

    def index(self) -> dict[str, Any]:
        """Return the result's index: the source's, under the shards' new names, and the gates."""
        weight_map = {tensor: name for name, shard in self.shards.items() for tensor in shard.tensors}
        metadata = dict(self.checkpoint.index_metadata)
        metadata["total_size"] = self.new_bytes + sum(shard.data_bytes for shard in self.placed.values())
        if isinstance(metadata.get("total_parameters"), int) and self.architecture.fused is None:
            metadata["total_parameters"] += self.gate_parameters
        return {"metadata": metadata, "weight_map": weight_map | dict.fromkeys(self.gates, self.gate_shard)}


def make_plan(
    source: Source, checkpoint: Checkpoint, gate_options: dict[str, Any], context: tuple[Mapping[str, Any], ...] = ()
) -> Plan:
    """
    Check a source and plan its conversion, with the gate's fields and the extensions of the context that are wanted.

    Raises:
        ConversionError: if it cannot be converted.
    """
    architecture = read_architecture(checkpoint, gate_options, context)

    def configs(changed: Checkpoint) -> Iterator[PreTrainedConfig]:
        changed_architecture = read_architecture(changed, gate_options, context)
        yield changed_architecture.source_config
        saved = json.loads(changed_architecture.config.to_json_string())
        yield GatedLlamaConfig.from_dict(saved)

    check_configs_run(checkpoint, configs)
    count = len(checkpoint.shards) + 1
    *names, gate_shard = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    shards = dict(zip(names, checkpoint.shards, strict=True))
    rewritten: dict[str, dict[str, NewTensor]] = {}
    if architecture.fused is None:
        gates = open_gates(architecture.config, architecture.dtype)
    else:
        rewritten, gates = _take_apart(shards, architecture)
    side_files = [name for name in checkpoint.side_files() if name not in OWN_FILES]
    changes, unloaded = _tokenizer_files(checkpoint, side_files, architecture.config.to_json_string(), source.repo_id)
    kept = tuple(name for name in side_files if name not in changes)
    left_out = source.left_out | checkpoint.left_out()
    return Plan(
        source,
        checkpoint,
        architecture,
        shards,
        rewritten,
        gate_shard,
        gates,
        kept,
        changes,
        unloaded,
        context,
        left_out,
    )


def _tokenizer_files(
    checkpoint: Checkpoint, side_files: list[str], config: str, repo_id: str | None
) -> tuple[dict[str, bytes], str | None]:
    """Return the tokenizer files that must differ from the source's, or why its tokenizer cannot be loaded, if so."""
    if not checkpoint.directory.is_dir():  # a GGUF file's header
        return {}, None
    try:
        original = load_tokenizer(checkpoint.directory, repo_id)
    except ConversionError as error:  # there is none, or it has code of its own: the result has the same files
        return {}, str(error) if any(is_tokenizer_file(name) for name in side_files) else None
    changes, differences = tokenizer_changes(original, checkpoint.directory, side_files, config)
    if changes is None:
        raise ConversionError(
            f"{checkpoint.directory}: the tokenizer of the result would differ: {'; '.join(differences[:3])}; save it "
            "with AutoTokenizer.from_pretrained(SOURCE).save_pretrained(SOURCE), then convert again"
        )
    return changes, None


def _take_apart(
    shards: dict[str, Shard], architecture: Architecture
) -> tuple[dict[str, dict[str, NewTensor]], dict[str, NewTensor]]:
    """Return the new tensors of the shards that hold fused gates, and the gates."""
    fused, config = architecture.fused, architecture.config
    assert fused is not None
    rewritten, gates = {}, {}
    attention = [f"model.layers.{layer}.self_attn" for layer in range(config.num_hidden_layers)]
    q_proj = {
        f"{prefix}.q_proj.{kind}": f"{prefix}.g_proj.{kind}" for prefix in attention for kind in ("weight", "bias")
    }
    for new_name, shard in shards.items():
        tensors, is_changed = {}, False
        for name, tensor in shard.tensors.items():
            if name in q_proj:
                tensors[name], gates[q_proj[name]] = fused.split(shard, name)
            elif fused.norms_from_zero and name.endswith("norm.weight"):
                tensors[name] = _norm_from_one(shard, name)
            else:
                tensors[name] = NewTensor(tensor.dtype, tensor.shape, tensor.size, _bytes_of(shard, name))
                continue
            is_changed = True
        if is_changed:
            rewritten[new_name] = tensors
    return rewritten, {name: gates[name] for name, _ in gate_tensor_shapes(config)}


def _bytes_of(shard: Shard, name: str):
    return lambda: shard.chunks(name)


def norm_from_one(shard: Shard, name: str) -> torch.Tensor:
    """Return the float32 weight 1 + w, as Llama has it, of a norm whose weight w Qwen3-Next counts from zero."""
    return 1.0 + shard.read(name).float()


def _norm_from_one(shard: Shard, name: str) -> NewTensor:
    # Float32 whatever the checkpoint's dtype: 1 + w does not fit into w's bfloat16.
    return new_tensor(shard.tensors[name].shape, torch.float32, lambda: norm_from_one(shard, name))
