"""Indexes that disagree with their shards: converted where Transformers loads the same model, otherwise one error."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from modeling_gated.conversion import (
    ConversionError,
    convert_checkpoint,
    extend_checkpoint,
    plan_conversion,
    ungate_checkpoint,
    verify_checkpoint,
)
from tests.helpers.checkpoints import contents
from tests.helpers.extended_checkpoints import LONGER
from tests.helpers.source_models import SOURCES, randomize


Q_PROJ, INV_FREQ = "model.layers.1.self_attn.q_proj.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"
INDEX = "model.safetensors.index.json"
EXTENSION = LONGER | {"replace_scaling": True}


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    model = AutoModelForCausalLM.from_config(SOURCES["llama, tied"]())
    randomize(model)
    model.save_pretrained(tmp_path / "tied", max_shard_size="100KB")
    return tmp_path / "tied"


def listed(path: Path, change: Callable[[dict[str, str]], object]) -> None:
    content = json.loads((path / INDEX).read_text())
    change(content["weight_map"])
    (path / INDEX).write_text(json.dumps(content))


def shards(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors"))


def holder(path: Path, name: str) -> Path:
    return next(shard for shard in shards(path) if name in load_file(shard))


def put(shard: Path, name: str, tensor: torch.Tensor) -> None:
    save_file(load_file(shard) | {name: tensor}, shard, metadata={"format": "pt"})


def drop(path: Path, name: str) -> None:
    shard = holder(path, name)
    save_file(
        {key: tensor for key, tensor in load_file(shard).items() if key != name}, shard, metadata={"format": "pt"}
    )


def lists(name: str) -> Callable[[Path], object]:
    return lambda path: listed(path, lambda listing: listing.update({name: shards(path)[-1].name}))


def holds(name: str) -> Callable[[Path], object]:
    return lambda path: put(shards(path)[0], name, torch.ones(4))


def misplaced(path: Path) -> None:
    names = [shard.name for shard in shards(path) if shard != holder(path, Q_PROJ)]
    listed(path, lambda listing: listing.update({Q_PROJ: names[0]}))


def repeated(path: Path, first: bool = True, change: float = 0.0, name: str = Q_PROJ) -> None:
    other = shards(path)[0 if first else -1]
    tensor = load_file(holder(path, name))[name]
    assert other != holder(path, name)
    put(other, name, tensor + change)


def repeated_inv_freq(path: Path) -> None:
    for number, shard in enumerate(shards(path)[:2]):
        put(shard, INV_FREQ, torch.full((4,), 1.0 + number))


# fixture, disagreement, and a part of the note, or None where Transformers is silent as well
HARMLESS: dict[str, tuple[str, Callable[[Path], object], str | None]] = {
    "tied head listed": ("tied", lists("lm_head.weight"), "no shard holds.*: lm_head.weight$"),
    "inv_freq listed": ("sharded", lists(INV_FREQ), f"no shard holds.*: {INV_FREQ}$"),
    "another model's tensor listed": ("sharded", lists("vision.x"), "no shard holds.*: vision.x$"),
    "inv_freq in a shard": ("sharded", holds(INV_FREQ), None),
    "another model's tensor in a shard": ("sharded", holds("vision.x"), None),
    "a layer beyond the last": ("sharded", holds("model.layers.7.self_attn.q_proj.weight"), None),
    "unlisted": ("sharded", lambda path: listed(path, lambda found: found.pop(Q_PROJ)), f"misses.*: {Q_PROJ}$"),
    "in another shard": ("sharded", misplaced, f"names a shard that does not hold.*: {Q_PROJ}$"),
    "twice": ("sharded", repeated, f"repeat tensors.*: {Q_PROJ}$"),
    "twice, the copy last": ("sharded", lambda path: repeated(path, False), f"repeat tensors.*: {Q_PROJ}$"),
    "inv_freq twice, differing": ("sharded", repeated_inv_freq, None),
}


@pytest.mark.fast(only="unlisted")
@pytest.mark.parametrize("case", list(HARMLESS))
def test_what_transformers_loads_the_same_is_converted_and_noted(
    case: str, request: pytest.FixtureRequest, tmp_path: Path, tokens: torch.Tensor
) -> None:
    fixture, spoil, note = HARMLESS[case]
    source: Path = request.getfixturevalue(fixture)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(source)(tokens).logits
    spoil(source)
    before = contents(source)
    done = convert_checkpoint(source, tmp_path / "gated", place="copy")
    assert plan_conversion(source, tmp_path / "planned").architecture.index_notes == done.index_notes
    assert len(done.index_notes) == (note is not None)
    if note is not None:
        assert re.search(note, done.index_notes[0])
    infos = []
    for path in (source, tmp_path / "gated"):
        model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
        infos.append(info)
        with torch.no_grad():
            assert torch.equal(model(tokens).logits, expected)
    assert not infos[0]["missing_keys"] and infos[0] == infos[1]
    result = json.loads((tmp_path / "gated" / INDEX).read_text())["weight_map"]
    assert all(name in load_file(tmp_path / "gated" / shard) for name, shard in result.items())
    assert verify_checkpoint(source, tmp_path / "gated", tokens=16).passed
    ungate_checkpoint(tmp_path / "gated", tmp_path / "back")
    assert contents(tmp_path / "back") == before
    extended = extend_checkpoint(source, tmp_path / "longer", context=EXTENSION)
    assert (tmp_path / "longer" / INDEX).read_bytes() == (source / INDEX).read_bytes()
    assert extended.index_notes == done.index_notes
    both = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("longer", "gated")]
    assert both[0].config.model_type != both[1].config.model_type == "gated_llama"


def differing(first: bool) -> Callable[[Path], None]:
    return lambda path: repeated(path, first, 1.0)


# disagreement, and what the one line says
WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "twice, differing, the other first": (
        differing(True),
        rf"{INDEX}: {Q_PROJ} must be the same in all shards, got different values in model-00001-of-\d+\.safetensors "
        r"and (model-.*\.safetensors); to keep that of \1, which Transformers loads, rewrite .*save_pretrained",
    ),
    "twice, differing, the other last": (differing(False), rf"{INDEX}: {Q_PROJ} must be the same.*rewrite"),
    "twice, of another dtype": (
        lambda path: put(shards(path)[0], Q_PROJ, load_file(holder(path, Q_PROJ))[Q_PROJ].double()),
        rf"{INDEX}: {Q_PROJ} must be the same.*rewrite",
    ),
    "listed and absent": (lambda path: drop(path, Q_PROJ), rf"{Q_PROJ}.*no shard.*save.*again"),
    "an untied head, listed and absent": (
        lambda path: drop(path, "lm_head.weight"),
        r"lm_head\.weight.*no shard.*again",
    ),
    "no such shard": (
        lambda path: holder(path, Q_PROJ).unlink(),
        rf"model-00002-of-\d+\.safetensors: no such file, but {INDEX} names it; download",
    ),
    "no such shard, of a tensor that is not read": (
        lambda path: listed(path, lambda found: found.update({"vision.x": "model-00099.safetensors"})),
        rf"model-00099\.safetensors: no such file, but {INDEX} names it; download",
    ),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_what_the_model_would_read_differently_is_one_line_with_a_way_on(
    case: str, sharded: Path, tmp_path: Path
) -> None:
    spoil, message = WRONG[case]
    spoil(sharded)
    for act in (convert_checkpoint, lambda *paths: extend_checkpoint(*paths, context=EXTENSION)):
        with pytest.raises(ConversionError, match=message):
            act(sharded, tmp_path / "result")
        assert not (tmp_path / "result").exists()


def test_a_gate_that_is_listed_and_absent_is_refused(sharded: Path, tmp_path: Path) -> None:
    """Transformers would load the model with a new gate in its place."""
    convert_checkpoint(sharded, tmp_path / "gated")
    gate = "model.layers.1.self_attn.g_proj.bias"
    drop(tmp_path / "gated", gate)
    for act in (ungate_checkpoint, lambda *paths: extend_checkpoint(*paths, context=EXTENSION)):
        with pytest.raises(ConversionError, match=rf"{gate} must be in model-.*, got no shard that holds it; download"):
            act(tmp_path / "gated", tmp_path / "back")
    with pytest.raises(ConversionError, match=gate):
        verify_checkpoint(sharded, tmp_path / "gated", tokens=16)
