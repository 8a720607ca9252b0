"""Checking a gated checkpoint against its source: the bytes of the tensors, then the logits on real text."""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from modeling_gated.configuration import GatedLlamaConfig
from modeling_gated.modeling_gated_llama import GatedLlamaForCausalLM

from .architecture import UNREAD, Architecture, naming, read_architecture, read_gated_config
from .card import with_verification
from .checkpoint import Checkpoint, open_checkpoint
from .errors import ConversionError
from .files import errors_naming, read_bytes, resolve
from .fused import is_qwen3_next
from .gates import changed_gate_layers, ranges
from .gguf import dequantize_gguf
from .manifest import read_manifest, record, replace_file
from .plan import CARD_NAME, norm_from_one
from .sources import Source, find_source
from .streaming import Comparison, StreamedModel
from .tensors import base_tensor_shapes, gate_tensor_shapes


# Imported gates multiply in float32; their source in its own dtype. So both are run in float32, where sums may be
# taken in another order.
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Verification:
    """
    What a comparison of a gated checkpoint with its source found.

    `differing` names the base tensors whose bytes differ, `changed_gates` the layers whose gates are not what
    conversion wrote (none for imported gates). The next four are of the logits, None where they were not compared;
    `text` says on what, or why not. `passed` is the verdict. `recorded` says whether the manifest and the model card
    now hold it.
    """

    tensors: int
    differing: tuple[str, ...]
    changed_gates: tuple[int, ...]
    text: str
    tokens: int
    max_difference: float | None
    kl_divergence: float | None
    top1_agreement: float | None
    passed: bool
    verdict: str
    recorded: bool = False

    def summary(self) -> dict[str, str]:
        """The findings in words, for a terminal or a model card."""
        if self.differing:
            tensors = f"{len(self.differing):,} differ; the source has {self.tensors:,}"
        else:
            tensors = f"all {self.tensors:,} have the source's bytes"
        found = {"verdict": self.verdict, "base_tensors": tensors}
        if self.differing:
            found["differing"] = ", ".join(self.differing[:5]) + (", ..." if len(self.differing) > 5 else "")
        if self.changed_gates:
            found["gates"] = f"changed since conversion in layers {ranges(list(self.changed_gates))}"
        if self.max_difference is None:
            return found | {"logits": f"not compared: {self.text}"}
        return found | {
            "logits": f"{self.tokens:,} tokens of {self.text}",
            "max_difference": f"{self.max_difference:.3g}",
            "KL_divergence": f"{self.kl_divergence:.3g}",
            "top-1_agreement": f"{self.top1_agreement:.2%}",
        }


def verify_checkpoint(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    text: str | os.PathLike | None = None,
    tokens: int = 512,
    revision: str | None = None,
    progress: bool = False,
) -> Verification:
    """
    Compare a gated checkpoint with what it was converted from.

    First the SHA-256 of every base tensor, then the logits of both models on the same text, layer by layer, so that
    it takes the memory of a layer and not of two models. The models run in the checkpoint's dtype; those with
    imported gates in float32. What is found is recorded in `output`'s manifest and model card, if it has them.

    Args:
        source: what `output` was converted from, named as for conversion.
        output: the gated checkpoint, a directory.
        text: a text file, UTF-8; Python's language reference if not given.
        tokens: how many tokens of it to compare.
        revision: the branch, tag or commit of a source on the hub.
        progress: show a progress bar, on a terminal.

    Raises:
        ConversionError: if either of them cannot be read, or they are not of the same model.
    """
    with errors_naming(output):
        if tokens < 1:
            raise ConversionError(f"--tokens {tokens}: at least 1 is needed")
        directory = Path(output).absolute()
        if not directory.is_dir():
            raise ConversionError(f"{directory}: no such directory")
        with _opened(find_source(os.fspath(source), revision), progress) as checkpoint:
            found = _compare(checkpoint, open_checkpoint(directory), text, tokens, progress)
        try:
            return replace(found, recorded=_record(found, directory))
        except PermissionError:
            return found


@contextmanager
def _opened(source: Source, progress: bool) -> Iterator[Checkpoint]:
    if not source.is_gguf:
        yield open_checkpoint(source.path)
        return
    with tempfile.TemporaryDirectory() as directory:
        dequantize_gguf(source.path, directory, progress=progress)
        yield open_checkpoint(Path(directory))


def _compare(
    source: Checkpoint, gated: Checkpoint, text: str | os.PathLike | None, tokens: int, progress: bool
) -> Verification:
    config = read_gated_config(gated)
    architecture = read_architecture(source, {})
    # Some tensors alone, such as biases, may come and go: then they differ, which the comparison tells.
    shapes = [dict(base_tensor_shapes(both)) for both in (config, architecture.config)]
    if any(shapes[0].get(name, shape) != shape for name, shape in shapes[1].items()) or (
        config.num_hidden_layers != architecture.config.num_hidden_layers
    ):
        raise ConversionError(f"{gated.directory}: has other tensors or shapes than {source.directory}")
    names, differing = _differing_tensors(source, gated, architecture, progress)
    imported = architecture.fused is not None
    changed = () if imported else tuple(changed_gate_layers(gated, config))
    found = Verification(names, differing, changed, "", 0, None, None, None, passed=False, verdict="different")

    if reason := _why_no_logits(source, architecture):
        found = replace(found, text=reason)
        passed = not differing and not changed
        return replace(found, passed=passed, verdict="equal tensors" if passed else "different")
    ids, text_name = _token_ids(source, text, tokens, config.vocab_size)
    comparison = _compare_logits(source, gated, architecture, config, ids)
    found = replace(
        found,
        text=text_name,
        tokens=len(ids),
        max_difference=comparison.max_difference,
        kl_divergence=comparison.kl_divergence,
        top1_agreement=comparison.top1_agreement,
    )
    if differing or changed:
        return found
    if comparison.max_difference == 0:
        return replace(found, passed=True, verdict="identical: the same function, bit for bit")
    if imported and comparison.max_difference <= _TOLERANCE * comparison.max_logit:
        return replace(found, passed=True, verdict="equal within the rounding of float32")
    return found


def _differing_tensors(
    source: Checkpoint, gated: Checkpoint, architecture: Architecture, progress: bool
) -> tuple[int, tuple[str, ...]]:
    """The number of the source's tensors, and those that the gated checkpoint does not hold byte for byte."""
    mine, others = source.tensors(), gated.tensors()
    names = sorted(name for name in mine if name in others or not UNREAD.fullmatch(name))
    own = {name for name, _ in gate_tensor_shapes(architecture.config)}
    extra = [name for name in others if name not in mine and name not in own and not UNREAD.fullmatch(name)]
    total = sum(shard.data_bytes for shard in source.shards)
    bar = tqdm(total=total, desc="Hashing", unit="B", unit_scale=True, disable=None if progress else True)

    def differs(name: str) -> bool:
        try:
            one, other = _digests(name, source, gated, architecture)
        except KeyError:  # the gated checkpoint lacks the tensor
            return True
        bar.update(mine[name][1].size)
        return one != other

    with bar, ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        flags = list(pool.map(differs, names))
    return len(names), tuple(name for name, flag in zip(names, flags, strict=True) if flag) + tuple(extra)


def _digests(name: str, source: Checkpoint, gated: Checkpoint, architecture: Architecture) -> tuple[Any, Any]:
    """What has to be equal for a tensor: its dtype, shape and SHA-256, or for imported gates what it was made of."""
    shard, tensor = source.tensors()[name]
    tensors, fused = gated.tensors(), architecture.fused
    if fused is not None and ".self_attn.q_proj." in name:
        gate = name.replace("q_proj", "g_proj")
        return _sha256(shard.chunks(name)), _sha256(fused.join((tensors[name][0], name), (tensors[gate][0], gate)))
    other_shard, other = tensors[name]
    if fused is not None and fused.norms_from_zero and name.endswith("norm.weight"):
        expected = norm_from_one(shard, name).numpy().tobytes()
        return ("F32", tensor.shape, _sha256([expected])), (other.dtype, other.shape, _sha256(other_shard.chunks(name)))
    if shard.path == other_shard.path or os.path.samefile(shard.path, other_shard.path):
        return tensor, other  # one file, hard-linked
    return (
        (tensor.dtype, tensor.shape, _sha256(shard.chunks(name))),
        (other.dtype, other.shape, _sha256(other_shard.chunks(name))),
    )


def _sha256(parts) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _why_no_logits(source: Checkpoint, architecture: Architecture) -> str | None:
    if source.raw_config.get("quantization_config"):
        return "the checkpoints are quantized"
    if architecture.fused is not None and not is_qwen3_next(source.raw_config):
        return "Transformers has no model of the source's format"
    return None


def _compare_logits(
    source: Checkpoint, gated: Checkpoint, architecture: Architecture, config: GatedLlamaConfig, ids: torch.Tensor
) -> Comparison:
    dtype = architecture.dtype if architecture.fused is None else torch.float32
    source_config = architecture.source_config
    if is_qwen3_next(source.raw_config):  # not the Qwen3 that stands for it
        source_config = CONFIG_MAPPING["qwen3_next"].from_dict(source.raw_config)
    with torch.device("meta"), naming(source.config_path):
        ungated = AutoModelForCausalLM.from_config(source_config, dtype=dtype)
    with torch.device("meta"), naming(gated.config_path):
        model = GatedLlamaForCausalLM._from_config(config, dtype=dtype)
    return Comparison(StreamedModel(ungated, source, dtype), StreamedModel(model, gated, dtype), ids)


def _token_ids(
    source: Checkpoint, text: str | os.PathLike | None, count: int, vocab_size: int
) -> tuple[torch.Tensor, str]:
    """Token ids [count] of a text, and what to call it."""
    tokenizer_file = source.directory / "tokenizer.json"
    if not tokenizer_file.exists():
        if text is not None:
            raise ConversionError(f"{tokenizer_file}: no such file, so {text} cannot be tokenized")
        generator = torch.Generator().manual_seed(0)
        return torch.randint(vocab_size, (count,), generator=generator), "random numbers (there is no tokenizer.json)"
    if text is None:
        from pydoc_data.topics import topics

        content, name = "\n".join(topics.values()), "Python's language reference"
    else:
        with open(text, encoding="utf-8", errors="replace") as file:
            content, name = file.read(100 * count), Path(text).name
    try:
        tokenizer = Tokenizer.from_buffer(read_bytes(resolve(source.directory, "tokenizer.json")))
    except ConversionError:
        raise
    except Exception as error:  # tokenizers has no error of its own
        raise ConversionError(f"{tokenizer_file}: {error}") from None
    ids = tokenizer.encode(content[: 100 * count]).ids[:count]
    if not ids or max(ids) >= vocab_size:
        raise ConversionError(f"{tokenizer_file}: {name} gives no tokens within the vocabulary of {vocab_size}")
    return torch.tensor(ids), name


def _record(found: Verification, directory: Path) -> bool:
    """Write what was found, and the hashes that the manifest lacks, into manifest and card, if there are any."""
    manifest = read_manifest(directory)
    if manifest is None or find_source(os.fspath(directory)).repo_id is not None:  # the hub's cache is not ours
        return False
    files = dict(manifest.files)
    if not found.differing:
        for name, known in manifest.files.items():
            if known.sha256 is None and (directory / name).is_file():
                files[name] = record(directory / name, known.source)
    card = directory / CARD_NAME
    if card.is_file():
        text = card.read_text(encoding="utf-8", errors="surrogateescape")
        new = with_verification(text, found.summary())
        replace_file(card, new.encode("utf-8", "surrogateescape"))
        files[CARD_NAME] = record(card)
    replace(manifest, files=files, verification=found.summary()).write(directory)
    return True
