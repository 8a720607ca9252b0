"""Comparison of a checkpoint's index with its shards, from which Transformers reads every tensor, listed or not."""

from collections.abc import Callable, Sequence

from modeling_gated.errors import ConversionError

from .checkpoint import Checkpoint, rewriting_command
from .safetensors_file import Shard


def check_index(checkpoint: Checkpoint, is_read: Callable[[str], bool]) -> tuple[str, ...]:
    """
    Check that the index and the shards of a checkpoint agree about every tensor that the model reads.

    Transformers takes from the index only the names of the shards. It loads all tensors of all shards in the order of
    the file names, so a tensor that the index misses or misplaces is loaded too.

    Args:
        checkpoint: a checkpoint; one without an index agrees with itself.
        is_read: tells of a tensor's name whether the model reads such a tensor.

    Returns:
        Notes on the disagreements that change nothing, one sentence each.

    Raises:
        ConversionError: if the index lists a tensor that is read and in no shard, or two shards hold different values.
    """
    if not checkpoint.has_index:
        return ()
    holders: dict[str, list[Shard]] = {}
    for shard in checkpoint.shards:
        for name in shard.tensors:
            holders.setdefault(name, []).append(shard)
    listed = checkpoint.weight_map
    absent = [name for name in listed if name not in holders]
    for name in absent:
        if is_read(name):
            raise ConversionError(
                f"{checkpoint.index_path}: {name} must be in {listed[name]}, got no shard that holds it; download the "
                "checkpoint again, or save the whole model again with save_pretrained"
            )
    repeated = [name for name, shards in holders.items() if len(shards) > 1 and is_read(name)]
    for name in repeated:
        _check_equal(checkpoint, name, holders[name])
    misplaced = [
        name
        for name, shards in holders.items()
        if name in listed and listed[name] not in [shard.name for shard in shards]
    ]
    unlisted = [name for name in holders if name not in listed and is_read(name)]
    notes = {
        "lists tensors that no shard holds and the model does not read": absent,
        "names a shard that does not hold the tensor, which was read from the shard that does": misplaced,
        "misses tensors, which were read from their shards": unlisted,
        "describes shards that repeat tensors, with the same bytes": repeated,
    }
    return tuple(f"{checkpoint.index_path.name} {note}: {_first(names)}" for note, names in notes.items() if names)


def _check_equal(checkpoint: Checkpoint, name: str, shards: Sequence[Shard]) -> None:
    """Raise ConversionError unless shards hold the same dtype, shape and bytes of a tensor."""
    first, last = shards[0], shards[-1]
    for shard in shards[1:]:
        first_tensor, other_tensor = first.tensors[name], shard.tensors[name]
        if (first_tensor.dtype, first_tensor.shape) != (other_tensor.dtype, other_tensor.shape) or any(
            left != right for left, right in zip(first.chunks(name), shard.chunks(name), strict=True)
        ):
            raise ConversionError(
                f"{checkpoint.index_path}: {name} must be the same in all shards, got different values in "
                f"{first.name} and {shard.name}; to keep that of {last.name}, which Transformers loads, rewrite the "
                f"checkpoint with: {rewriting_command(str(checkpoint.directory), f'{checkpoint.directory}-rewritten')}"
            )


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
