"""Checking a gated checkpoint against its source: the tensors' bytes, logits on real text, cached generation."""

import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from modeling_gated.checkpoints.checkpoint import Checkpoint, open_checkpoint
from modeling_gated.checkpoints.config import is_qwen3_next, naming, stored_dtype, with_default_run_settings
from modeling_gated.checkpoints.file_names import CARD_NAME, OWN_FILES
from modeling_gated.checkpoints.files import errors_naming, read_bytes, resolve, sha256, sha256_of
from modeling_gated.checkpoints.placement import check_space
from modeling_gated.checkpoints.records import record
from modeling_gated.checkpoints.replacement import replace_file
from modeling_gated.checkpoints.safetensors_file import Shard, Tensor
from modeling_gated.checkpoints.sources import Source, find_source
from modeling_gated.configuration import GatedLlamaConfig, describe_context
from modeling_gated.defaults import VERIFIED_TOKENS
from modeling_gated.errors import ConversionError

from .architecture import UNREAD, Architecture, read_architecture, read_gated_config
from .card import with_verification
from .fused import FusedGates, is_fused
from .gates import changed_gate_layers, gate_tensor_shapes, ranges
from .generation import GenerationComparison, compare_generation
from .gguf import dequantize_gguf, gguf_headers
from .manifest import as_bytes, as_text, read_manifest
from .plan import norm_from_one
from .refresh import outdated_code
from .streaming import LogitsComparison, StreamedModel
from .tensors import base_tensor_shapes
from .tokenizers import TokenizerComparison, compare_tokenizers, token_ids


# The fields of the config that say what the model computes.
_FIELDS = (
    *("hidden_act", "rms_norm_eps", "rope_parameters", "attention_bias", "attention_output_bias", "mlp_bias"),
    *("use_qk_norm", "sliding_window", "layer_types", "tie_word_embeddings", "head_dim", "num_attention_heads"),
    *("num_key_value_heads", "dtype", "gate_position", "gate_granularity", "gate_activation", "gate_bias"),
    "gate_scale",
)
# Imported gates multiply in float32; their source in its own dtype. So both are run in float32, where sums may be
# taken in another order.
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Verification:
    """
    What a comparison of a gated checkpoint with its source found.

    `differing` names the base tensors whose bytes differ, `changed_gates` the layers whose gates are not what
    conversion wrote (none for imported gates), `differing_fields` the fields of the config that are not the source's,
    `changed_code` the code in the directory that is not what the manifest says. `text` says on what the logits were
    compared, over how many `tokens`, and the next three what was found; they are None where logits were not compared,
    and `text` then says why. `context` says to what the source's context was extended for the comparison, if the
    checkpoint's was. `generation` compares cached greedy generation; it is None where the models differ anyway.
    `tokenizer` compares what `AutoTokenizer` loads.
    `passed` is the verdict, which is of the package's model. `outdated_code` names carried code that is not this
    version's, or missing; it was not run. `recorded` says whether the manifest and the model card hold it.
    """

    tensors: int
    differing: tuple[str, ...]
    changed_gates: tuple[int, ...]
    differing_fields: tuple[str, ...]
    changed_code: tuple[str, ...]
    context: str | None
    is_imported: bool
    text: str
    tokens: int
    max_difference: float | None
    kl_divergence: float | None
    top1_agreement: float | None
    generation: GenerationComparison | None
    tokenizer: TokenizerComparison
    passed: bool
    verdict: str
    outdated_code: tuple[str, ...] = ()
    recorded: bool = False

    def summary(self) -> dict[str, str]:
        """Return the findings in words, for a terminal or a model card."""
        if self.differing:
            tensors = f"{len(self.differing):,} differ; the source has {self.tensors:,}"
        else:
            rows = ", the gates among the rows of q_proj" if self.is_imported else ""
            tensors = f"all {self.tensors:,} have the source's bytes{rows}"
        lines = {"verdict": self.verdict, "base_tensors": tensors}
        if self.context is not None:
            lines["context"] = f"the source's extended alike: {self.context}"
        if self.differing:
            lines["differing"] = ", ".join(self.differing[:5]) + (", ..." if len(self.differing) > 5 else "")
        if self.differing_fields:
            lines["config"] = f"{', '.join(self.differing_fields)} not as in the source"
        if self.changed_code:
            lines["code"] = f"{', '.join(self.changed_code)} changed since conversion"
        elif self.outdated_code:
            lines["code"] = (
                f"{', '.join(self.outdated_code)} of another version, which may generate wrong text; `gated-llama "
                "refresh-code` replaces it"
            )
        if self.changed_gates:
            lines["gates"] = f"changed since conversion in layers {ranges(list(self.changed_gates))}"
        lines["tokenizer"] = self.tokenizer.summary()
        if self.tokenizer.differences:
            lines["tokenizer"] += "; `gated-llama repair-tokenizer` may mend it"
        if self.max_difference is None:
            return lines | {"logits": f"not compared: {self.text}"}
        return lines | {
            "logits": f"{self.tokens:,} tokens of {self.text}",
            "max_difference": f"{self.max_difference:.3g}",
            "KL_divergence": f"{self.kl_divergence:.3g}",
            "top-1_agreement": f"{self.top1_agreement:.2%}",
            "cached_generation": self._generation(),
        }

    def _generation(self) -> str:
        if self.generation is None:
            return "not compared, as the models differ"
        within = self.passed and not self.generation.is_same
        return self.generation.summary() + (", where logits are equal within rounding" if within else "")


def verify_checkpoint(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    text: str | os.PathLike | None = None,
    tokens: int = VERIFIED_TOKENS,
    revision: str | None = None,
    progress: bool = False,
) -> Verification:
    """
    Compare a gated checkpoint with what it was converted from.

    First the SHA-256 of every base tensor, the fields of the config that say what is computed, and the code that the
    directory carries, against its manifest; then the ids that both tokenizers give; then the logits of both models on
    the same text; then the tokens that both generate with a KV cache, from a prompt and for a left-padded batch of two.
    The models run layer by layer, so that it takes the memory of a layer and not of two models; each reads its weights
    nine times. They run in the checkpoint's dtype; those with imported gates in float32. What is found is recorded in
    `output`'s manifest and model card, if it has them.

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
            raise ConversionError(f"tokens must be at least 1, got {tokens}")
        directory = Path(output).absolute()
        if not directory.is_dir():
            raise ConversionError(f"{directory}: no such directory")
        gated = open_checkpoint(directory)
        config = read_gated_config(gated)
        found_source = find_source(os.fspath(source), revision)
        with _opened(found_source, stored_dtype(gated), progress) as checkpoint:
            tokenizer = compare_tokenizers(checkpoint.directory, directory, found_source.repo_id)
            verification = _compare(checkpoint, gated, config, tokenizer, text, tokens, progress)
        try:
            return replace(verification, recorded=_record(verification, directory))
        except OSError:  # a directory or a filesystem that cannot be written to
            return verification


@contextmanager
def _opened(source: Source, dtype: torch.dtype, progress: bool) -> Iterator[Checkpoint]:
    if not source.is_gguf:
        yield open_checkpoint(source.path)
        return
    with tempfile.TemporaryDirectory() as directory:
        check_space(gguf_headers(source.path, dtype).shards[0].file_bytes, (), Path(directory), Path(directory), "copy")
        dequantize_gguf(source.path, directory, dtype, progress=progress)
        yield open_checkpoint(Path(directory))


def _compare(
    source: Checkpoint,
    gated: Checkpoint,
    config: GatedLlamaConfig,
    tokenizer: TokenizerComparison,
    text: str | os.PathLike | None,
    tokens: int,
    progress: bool,
) -> Verification:
    gate_options = {"gate_granularity": config.gate_granularity, "gate_init": config.gate_init}
    manifest = read_manifest(gated.directory)
    context = manifest.context if manifest is not None else []
    architecture = read_architecture(source, {} if is_fused(source.raw_config) else gate_options, context)
    # Some tensors alone, such as biases, may come and go: then they differ, which the comparison tells.
    shapes = [dict(base_tensor_shapes(both)) for both in (config, architecture.config)]
    if any(shapes[0].get(name, shape) != shape for name, shape in shapes[1].items()) or (
        config.num_hidden_layers != architecture.config.num_hidden_layers
    ):
        raise ConversionError(f"{gated.directory}: has other tensors or shapes than {source.directory}")
    names, differing = _differing_tensors(source, gated, architecture, progress)
    imported = architecture.fused is not None
    changed = () if imported else tuple(changed_gate_layers(gated, config))
    fields = tuple(name for name in _FIELDS if getattr(config, name) != getattr(architecture.config, name))
    code = tuple(_changed_code(gated.directory))
    is_same = not (differing or changed or fields or code)
    comparison = generation = None
    if (text_name := _why_no_logits(source, architecture)) is None:
        ids, text_name = token_ids(source, text, tokens, config.vocab_size)
        models = _models(source, gated, architecture, config)
        comparison = LogitsComparison(*models, ids)
        if is_same and _are_equal(comparison, comparison.max_difference, imported):
            generation = compare_generation(*models, ids)
    outdated = outdated_code(gated.directory)
    verdict = _verdict(comparison, generation, imported, outdated) if is_same and not tokenizer.differences else None
    return Verification(
        tensors=names,
        differing=differing,
        changed_gates=changed,
        differing_fields=fields,
        changed_code=code,
        context=describe_context(architecture.source_config) if context else None,
        is_imported=imported,
        text=text_name,
        tokens=len(ids) if comparison else 0,
        max_difference=comparison.max_difference if comparison else None,
        kl_divergence=comparison.kl_divergence if comparison else None,
        top1_agreement=comparison.top1_agreement if comparison else None,
        generation=generation,
        tokenizer=tokenizer,
        passed=verdict is not None,
        verdict=verdict or "different",
        outdated_code=outdated,
    )


def _verdict(
    comparison: LogitsComparison | None,
    generation: GenerationComparison | None,
    imported: bool,
    outdated: tuple[str, ...],
) -> str | None:
    """Return what to say of checkpoints whose tensors and configs are the same; None if their models differ."""
    if comparison is None:
        return "equal tensors and config"
    if generation is None or generation.error is not None:
        return None
    if not _are_equal(comparison, generation.max_difference, imported):
        return None
    by_package = ", by this package's code, not by the code in the checkpoint" if outdated else ""
    if comparison.max_difference == generation.max_difference == 0 and generation.is_same:
        return f"identical: the same function, bit for bit{by_package}"
    # Imported gates: two tokens may be nearly as likely, so the logits decide.
    return f"equal within the rounding of float32{by_package}" if imported else None


def _are_equal(comparison: LogitsComparison, difference: float, imported: bool) -> bool:
    """Return whether logits that differ so much count as equal: none may, but with imported gates by rounding."""
    limit = _TOLERANCE * comparison.max_logit if imported else 0.0
    return comparison.max_difference <= limit and difference <= limit


def _changed_code(directory: Path) -> Iterator[str]:
    """Yield the code that `trust_remote_code` would run, as far as it is not what conversion wrote."""
    manifest = read_manifest(directory)
    for name, known in manifest.files.items() if manifest is not None else ():
        if name in OWN_FILES and name.endswith(".py"):
            path = directory / name
            if not path.is_file() or sha256(resolve(directory, name)) != known.sha256:
                yield name


def _differing_tensors(
    source: Checkpoint, gated: Checkpoint, architecture: Architecture, progress: bool
) -> tuple[int, tuple[str, ...]]:
    """Return the number of the source's tensors, and those that the gated checkpoint does not hold byte for byte."""
    source_tensors, gated_tensors = source.tensors(), gated.tensors()
    may_lack = {name for name in source_tensors if UNREAD.fullmatch(name)}
    if (
        architecture.config.tie_word_embeddings and "lm_head.weight" in source_tensors
    ):  # a second copy, which saving again drops
        head, embeddings = ("lm_head.weight", "model.embed_tokens.weight")
        if sha256_of(source_tensors[head][0].chunks(head)) == sha256_of(
            source_tensors[embeddings][0].chunks(embeddings)
        ):
            may_lack.add(head)
    names = sorted(name for name in source_tensors if name in gated_tensors or name not in may_lack)
    gate_names = {name for name, _ in gate_tensor_shapes(architecture.config)}
    extra = [
        name
        for name in gated_tensors
        if name not in source_tensors and name not in gate_names and not UNREAD.fullmatch(name)
    ]
    total = sum(shard.data_bytes for shard in source.shards)
    bar = tqdm(total=total, desc="Hashing", unit="B", unit_scale=True, disable=None if progress else True)

    def differs(name: str) -> bool:
        try:
            source_digest, gated_digest = _digests(name, source_tensors, gated_tensors, architecture.fused)
        except KeyError:  # the gated checkpoint lacks the tensor
            return True
        bar.update(source_tensors[name][1].size)
        return source_digest != gated_digest

    with bar, ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        flags = list(pool.map(differs, names))
    return len(names), tuple(name for name, flag in zip(names, flags, strict=True) if flag) + tuple(extra)


def _digests(
    name: str,
    source_tensors: dict[str, tuple[Shard, Tensor]],
    gated_tensors: dict[str, tuple[Shard, Tensor]],
    fused: FusedGates | None,
) -> tuple[Any, Any]:
    """Return what must be equal for a tensor: dtype, shape and SHA-256, or the source rows of imported gates."""
    shard, tensor = source_tensors[name]
    if fused is not None and ".self_attn.q_proj." in name:
        gate = name.replace("q_proj", "g_proj")
        return sha256_of(shard.chunks(name)), sha256_of(
            fused.join((gated_tensors[name][0], name), (gated_tensors[gate][0], gate))
        )
    other_shard, other = gated_tensors[name]
    if fused is not None and fused.norms_from_zero and name.endswith("norm.weight"):
        expected = norm_from_one(shard, name).numpy().tobytes()
        return ("F32", tensor.shape, sha256_of([expected])), (
            other.dtype,
            other.shape,
            sha256_of(other_shard.chunks(name)),
        )
    if shard.path == other_shard.path or os.path.samefile(shard.path, other_shard.path):
        return tensor, other  # one file, hard-linked
    return (
        (tensor.dtype, tensor.shape, sha256_of(shard.chunks(name))),
        (other.dtype, other.shape, sha256_of(other_shard.chunks(name))),
    )


def _why_no_logits(source: Checkpoint, architecture: Architecture) -> str | None:
    if source.raw_config.get("quantization_config"):
        return "the checkpoints are quantized"
    if architecture.fused is not None and not is_qwen3_next(source.raw_config):
        return "Transformers has no model of the source's format"
    return None


def _models(
    source: Checkpoint, gated: Checkpoint, architecture: Architecture, config: GatedLlamaConfig
) -> tuple[StreamedModel, StreamedModel]:
    # Here, as converting needs no model.
    from transformers import AutoModelForCausalLM

    from modeling_gated.modeling_gated_llama import GatedLlamaForCausalLM

    dtype = architecture.dtype if architecture.fused is None else torch.float32
    with torch.device("meta"), naming(source.config_path):
        ungated = AutoModelForCausalLM.from_config(
            with_default_run_settings(architecture.source_config), dtype=dtype, trust_remote_code=False
        )
    with torch.device("meta"), naming(gated.config_path):
        model = GatedLlamaForCausalLM._from_config(with_default_run_settings(config), dtype=dtype)
    return StreamedModel(ungated, source, dtype), StreamedModel(model, gated, dtype)


def _record(verification: Verification, directory: Path) -> bool:
    """Write what was found, and the hashes that the manifest lacks, into manifest and card, if there are any."""
    manifest = read_manifest(directory)
    if manifest is None or find_source(os.fspath(directory)).repo_id is not None:  # the hub's cache is not ours
        return False
    files = dict(manifest.files)
    if not verification.differing:
        for name, known in manifest.files.items():
            if known.sha256 is None and (directory / name).is_file():
                files[name] = record(directory / name, known.source)
    card = directory / CARD_NAME
    if card.is_file() and not card.is_symlink():
        replace_file(card, as_bytes(with_verification(as_text(read_bytes(card)), verification.summary())))
        files[CARD_NAME] = record(card)
    replace(manifest, files=files, verification=verification.summary()).write(directory)
    return True
