"""Whatever a source's files say: a conversion, or one clear error that names the file. No traceback, hang or escape."""

import json
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig

from modeling_gated.conversion import (
    ConversionError,
    convert_checkpoint,
    plan_conversion,
    ungate_checkpoint,
    verify_checkpoint,
)
from tests.helpers.processes import run_program
from tests.helpers.source_models import randomize


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As few bytes as a Llama can be, with an index."""
    directory = tmp_path_factory.mktemp("small") / "source"
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    model = AutoModelForCausalLM.from_config(config)
    randomize(model)
    model.save_pretrained(directory, max_shard_size="1KB")
    assert len(list(directory.glob("*.safetensors"))) > 1
    (directory / "README.md").write_text("---\nlicense: mit\n---\n")
    return directory


@pytest.fixture(scope="module")
def small_gated(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    convert_checkpoint(small, tmp_path_factory.mktemp("small gated") / "gated")
    return next(tmp_path_factory.getbasetemp().glob("small gated*/gated"))


def check(source: Path, spoil: Callable[[Path], object], act: Callable[[Path, Path], object]) -> None:
    """Spoil a copy of a checkpoint and act on it: that works, or there is one error and nothing is written."""
    with tempfile.TemporaryDirectory() as name:
        home = Path(name).resolve()
        copy, output = home / "source", home / "output"
        shutil.copytree(source, copy)
        spoil(copy)
        before = {path for path in home.rglob("*") if output not in path.parents}
        try:
            act(copy, output)
        except ConversionError as error:
            line = str(error)
            assert line.startswith(str(copy)), line  # and goes on with the file
            assert line.isprintable(), line
            assert not output.exists()
        written = {path for path in home.rglob("*") if output not in path.parents and path != output}
        assert written == before


def convert(source: Path, output: Path) -> None:
    convert_checkpoint(source, output)


CHECKED = settings(
    deadline=20_000, max_examples=150, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
NUMBERS = st.one_of(
    st.integers(),
    st.sampled_from([-1, 0, 1, 2, 3, 2**31 - 1, 2**31, 2**53, 2**63 - 1, 2**64, 10**30, 10**400]),
    st.floats(),
    st.booleans(),
)
NAMES = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        [
            "../x.safetensors",
            "/etc/passwd",
            "/dev/zero",
            "a\0b.safetensors",
            "\ud800.safetensors",
            "x" * 5000 + ".safetensors",
            "a/../../b.safetensors",
            "config.json",
            ".safetensors",
            "\x1b[2J.safetensors",
            "model.layers.99999999999999999999.x",
            "lm_head.weight",
        ]
    ),
)
VALUES = st.recursive(
    st.one_of(st.none(), NUMBERS, NAMES),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(NAMES, inner, max_size=3)),
    max_leaves=6,
)
MORE_FIELDS = """
    layer_types sliding_window use_sliding_window quantization_config per_layer_config torch_dtype rope_scaling
    rope_theta head_dim num_labels id2label auto_map attn_output_gate headwise_attn_output_gate qkv_bias
    gate_init gate_scale configuration_files _name_or_path is_encoder_decoder problem_type
"""
FIELDS = [*json.loads(LlamaConfig().to_json_string(use_diff=False)), *MORE_FIELDS.split()]


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@CHECKED
@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=3))
@example({"num_hidden_layers": 10**9})
@example({"num_hidden_layers": True})
@example({"num_attention_heads": 0})
@example({"num_key_value_heads": 0})
@example({"num_labels": 10**9})
@example({"rope_parameters": {"rope_type": "yarn", "factor": "8"}})
@example({"model_type": "qwen3_next", "layer_types": ["full_attention"], "num_experts": 0})
@example({"model_type": "qwen3", "headwise_attn_output_gate": True, "num_key_value_heads": 0})
@example({"dtype": "float8_e4m3fn"})
@example({"model_type": "cwm", "sliding_window": 0})
def test_any_value_in_the_config(small: Path, fields: dict[str, Any]) -> None:
    check(small, lambda path: edit_json(path / "config.json", lambda config: config.update(fields)), convert)


@CHECKED
@given(st.sampled_from(["llama", "mistral", "ministral", "qwen2", "qwen3", "cwm", "seed_oss"]), st.data())
def test_any_value_in_any_family_s_config(small: Path, family: str, data: st.DataObject) -> None:
    fields = data.draw(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=2)) | {"model_type": family}
    check(small, lambda path: edit_json(path / "config.json", lambda config: config.update(fields)), convert)


def edit_header(path: Path, change: Callable[[dict], object]) -> None:
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    change(header)
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + length :])


def largest(path: Path) -> Path:
    return max(path.glob("*.safetensors"), key=lambda file: file.stat().st_size)


@CHECKED
@given(st.integers(0, 20), st.sampled_from(["dtype", "shape", "data_offsets", None]), VALUES)
@example(0, "dtype", "I64")
@example(0, "dtype", "F8_E4M3")
@example(0, "shape", [2**40, 2**40])
@example(0, "data_offsets", [0, 4])
def test_any_value_in_a_header(small: Path, which: int, part: str | None, value: Any) -> None:
    def change(header: dict) -> None:
        name = sorted(header)[which % len(header)]
        if part is None or not isinstance(header[name], dict):
            header[name] = value
        else:
            header[name][part] = value

    check(small, lambda path: edit_header(largest(path), change), convert)


@CHECKED
@given(st.integers(0, 20), NAMES)
@example(3, "model.layers.0.self_attn.g_proj.weight")
@example(3, "model.layers.1.self_attn.q_proj.weight")
def test_any_name_of_a_tensor(small: Path, which: int, new: str) -> None:
    def rename(contents: dict) -> None:
        names = sorted(name for name in contents if name != "__metadata__")
        contents[new] = contents.pop(names[which % len(names)])

    def spoil(path: Path) -> None:
        edit_header(largest(path), rename)
        if which % 2:  # in the index too
            edit_json(path / "model.safetensors.index.json", lambda index: rename(index["weight_map"]))

    check(small, spoil, convert)


@CHECKED
@given(st.integers(0, 20), VALUES)
def test_any_value_in_the_index(small: Path, which: int, value: Any) -> None:
    def change(index: dict) -> None:
        if which == 20:
            index["weight_map"] = value
        elif which == 19:
            index["metadata"] = value
        else:
            index["weight_map"][sorted(index["weight_map"])[which % len(index["weight_map"])]] = value

    check(small, lambda path: edit_json(path / "model.safetensors.index.json", change), convert)


@CHECKED
@given(
    st.sampled_from(["config.json", "model.safetensors.index.json", "weights", "README.md"]),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4),
    st.one_of(st.none(), st.integers(0, 1000)),
)
def test_any_bytes(small: Path, name: str, flips: list[tuple[int, int]], length: int | None) -> None:
    def spoil(path: Path) -> None:
        file = largest(path) if name == "weights" else path / name
        content = bytearray(file.read_bytes())
        for position, value in flips:
            content[position % len(content)] = value
        file.write_bytes(content[:length])

    check(small, spoil, convert)


@CHECKED
@given(st.sampled_from(["config.json", "gated_llama_manifest.json"]), st.integers(0, 30), VALUES)
@example("config.json", 0, 10**9)
def test_any_value_in_a_gated_checkpoint(small_gated: Path, name: str, which: int, value: Any) -> None:
    """For the way back, and for verification of itself against itself, which ends at the source."""

    def change(content: dict) -> None:
        keys = sorted(content)
        content[keys[which % len(keys)]] = value

    def spoil(path: Path) -> None:
        edit_json(path / name, change)

    check(small_gated, spoil, lambda path, output: ungate_checkpoint(path, output))


@CHECKED
@given(st.integers(0, 60), VALUES)
def test_any_value_in_what_is_verified(small: Path, small_gated: Path, which: int, value: Any) -> None:
    def change(content: dict) -> None:
        keys = sorted(content)
        content[keys[which % len(keys)]] = value

    def spoil(path: Path) -> None:
        edit_json(path / "config.json", change)

    check(small_gated, spoil, lambda path, _: verify_checkpoint(small, path, tokens=4))


def duplicate_in_header(path: Path) -> None:
    file = largest(path)
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = content[8 : 8 + length].rstrip()
    name, entry = next((n, e) for n, e in json.loads(header).items() if n != "__metadata__")
    header = header[:-1] + f",{json.dumps(name)}:{json.dumps(entry)}}}".encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])


def overlap(header: dict) -> None:
    one, other = [name for name in sorted(header) if name != "__metadata__"][:2]
    header[other]["data_offsets"] = header[one]["data_offsets"]


def integers(header: dict) -> None:
    for entry in header.values():
        if "dtype" in entry:
            entry["dtype"] = "I32"


def index_text(path: Path, text: str) -> None:
    (path / "model.safetensors.index.json").write_text(text)


CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "tensor twice in a header": (duplicate_in_header, r"\.safetensors: not valid JSON: '.*' is there twice"),
    "overlapping offsets": (lambda path: edit_header(largest(path), overlap), r"invalid (offset|shape)"),
    "tensor twice in the index": (
        lambda path: index_text(path, '{"weight_map": {"a": "b.safetensors", "a": "c.safetensors"}}'),
        r"index\.json: not valid JSON: 'a' is there twice",
    ),
    "deep index": (lambda path: index_text(path, '{"a":' * 10**5), r"index\.json: not valid JSON"),
    "deep header": (
        lambda path: largest(path).write_bytes(struct.pack("<Q", 10**5) + b"[" * 10**5),
        "not a complete safetensors file",
    ),
    "integer tensors": (
        lambda path: edit_header(
            largest(path), lambda header: [e.update(dtype="I32") for e in header.values() if "dtype" in e]
        ),
        r"is I32, not among F64, F32, F16, BF16",
    ),
    "a null character": (
        lambda path: edit_json(
            path / "model.safetensors.index.json",
            lambda index: index["weight_map"].update({"model.norm.weight": "a\0.safetensors"}),
        ),
        r"a\\x00\.safetensors: cannot be read: embedded null",
    ),
    "steering the terminal": (
        lambda path: edit_json(path / "config.json", lambda config: config.update(model_type="\x1b[31mllama")),
        r"model_type='\\x1b\[31mllama' is not supported",
    ),
}


@pytest.mark.parametrize("case", list(CASES))
def test_known_tricks_by_name(small: Path, tmp_path: Path, case: str) -> None:
    spoil, message = CASES[case]
    shutil.copytree(small, tmp_path / "source")
    spoil(tmp_path / "source")
    with pytest.raises(ConversionError, match=message) as raised:
        convert_checkpoint(tmp_path / "source", tmp_path / "gated")
    assert str(raised.value).startswith(str(tmp_path / "source"))
    assert not (tmp_path / "gated").exists()


ABSURD = [
    {"num_hidden_layers": 10**9},
    {"num_hidden_layers": 10**9, "model_type": "qwen2"},
    {"num_hidden_layers": 10**9, "model_type": "gated_llama"},
    {"num_labels": 10**9},
    {"vocab_size": 2**31 - 1},
    {"head_dim": 2**30, "num_attention_heads": 2**20},
    {"num_attention_heads": 2**31 - 1, "num_key_value_heads": 1, "hidden_size": 2**31 - 1},
    {"max_position_embeddings": 10**18},
    {"model_type": "qwen3_next", "num_hidden_layers": 10**9, "num_experts": 10**9},
]


def test_absurd_sizes_take_neither_time_nor_memory(small: Path, tmp_path: Path) -> None:
    sources = []
    for number, fields in enumerate(ABSURD):
        sources.append(tmp_path / str(number))
        shutil.copytree(small, sources[-1])
        edit_json(sources[-1] / "config.json", lambda config, fields=fields: config.update(fields))
    for name, content in {
        "header": struct.pack("<Q", 2**62) + b"{}",
        "large header": struct.pack("<Q", 99_000_000) + b"{" + b" " * 99_000_000,
    }.items():
        sources.append(tmp_path / name)
        shutil.copytree(small, sources[-1])
        largest(sources[-1]).write_bytes(content)
    for name in ("config.json", "model.safetensors.index.json", "README.md"):
        sources.append(tmp_path / f"huge {name}")
        shutil.copytree(small, sources[-1])
        with open(sources[-1] / name, "r+b") as file:
            file.truncate(10**12)  # a hole
    result = run_program("convert_absurd.py", tmp_path / "output", *sources, timeout=120)
    assert result.returncode == 0, result.stderr
    errors, kilobytes, seconds = result.stdout.split()
    assert int(errors) >= 2 * len(sources) - 1  # only an absurd max_position_embeddings can be converted
    assert int(kilobytes) < 500_000
    assert float(seconds) < 30


def test_a_plan_of_the_hostile_is_refused_as_well(small: Path, tmp_path: Path) -> None:
    shutil.copytree(small, tmp_path / "source")
    edit_json(tmp_path / "source" / "config.json", lambda config: config.update(num_hidden_layers=10**9))
    with pytest.raises(ConversionError, match=r"config\.json: num_hidden_layers=1000000000, but the shards hold 1"):
        plan_conversion(tmp_path / "source", tmp_path / "gated")
