"""Verification: what passes, what does not, what it prints, records and needs."""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache, MistralConfig, PreTrainedModel

from modeling_gated import GatedLlamaForCausalLM
from modeling_gated.checkpoints.checkpoint import open_checkpoint
from modeling_gated.conversion import ConversionError, convert_checkpoint, generation, verify, verify_checkpoint
from modeling_gated.conversion.generation import NEW_TOKENS, compare_generation
from modeling_gated.conversion.streaming import LogitsComparison, StreamedModel
from modeling_gated.modeling_gated_llama import GatedLlamaAttention
from tests.helpers.cache_by_version import NAME
from tests.helpers.checkpoints import forget_gates
from tests.helpers.source_models import SIZES
from tests.helpers.word_tokenizer import save_word_tokenizer


@pytest.mark.fast(only="float32")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_conversion_passes(source_model: PreTrainedModel, tmp_path: Path, dtype: torch.dtype) -> None:
    source_model.to(dtype).save_pretrained(tmp_path / "source", max_shard_size="60KB")
    convert_checkpoint(tmp_path / "source", tmp_path / "gated")
    verification = verify_checkpoint(tmp_path / "source", tmp_path / "gated", tokens=50)
    assert verification.passed and verification.verdict.startswith("identical")
    assert (
        verification.max_difference,
        verification.kl_divergence,
        verification.top1_agreement,
        verification.tokens,
    ) == (0, 0, 1, 50)
    assert verification.tensors == len(open_checkpoint(tmp_path / "source").tensors())
    assert verification.generation is not None and verification.generation.is_same
    assert (verification.generation.tokens, verification.generation.max_difference) == (3 * NEW_TOKENS, 0)
    assert (
        verification.summary()["cached_generation"]
        == "24 tokens, from a prompt and a left-padded batch of two: equal to the source's"
    )


def streamed(path: Path, model: PreTrainedModel) -> StreamedModel:
    with torch.device("meta"):
        empty = type(model)(model.config)
    return StreamedModel(empty, open_checkpoint(path), torch.float32)


def test_generation_is_what_transformers_generates(source_model: PreTrainedModel, tmp_path: Path) -> None:
    """Token for token, for the class of the source; and padding is not attended to."""
    source_model.save_pretrained(tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    ids = torch.randint(1, 96, (24,), generator=torch.Generator().manual_seed(3))
    tokens, logits = generation._generated(streamed(tmp_path / "source", model), ids)
    rows = [ids, ids, ids.roll(1)[8:]]
    for row, prompt in enumerate(rows):
        output = model.generate(
            prompt[None], attention_mask=torch.ones_like(prompt[None]), max_new_tokens=NEW_TOKENS, do_sample=False,
            eos_token_id=None, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        assert output.sequences[0, -NEW_TOKENS:].tolist() == tokens[:, row].tolist()
        torch.testing.assert_close(logits[:, row], torch.cat(output.logits), rtol=0, atol=1e-4)


def drop_the_cache(self: GatedLlamaAttention, keywords: dict) -> None:
    """Generate from an empty cache without a word, as on Transformers 5.24 before this was tested."""
    if (receipt := keywords.get("cache_receipt")) is not None:
        receipt.is_signed = True
    keywords.pop(NAME, None)


def lose_the_cache(self: GatedLlamaAttention, keywords: dict) -> None:
    """Leave the receipt unsigned, so that the model raises."""
    keywords.pop(NAME, None)


class WriteOnly:
    """A cache that is filled, and gives back this pass's keys and values alone."""

    def __init__(self, cache: DynamicCache) -> None:
        self.cache = cache

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, **_: object) -> tuple[torch.Tensor, ...]:
        return tuple(states[:, :, -keys.shape[2] :] for states in self.cache.update(keys, values, layer))


def read_nothing_from_the_cache(self: GatedLlamaAttention, keywords: dict) -> None:
    if (cache := keywords.get(NAME)) is not None:
        keywords |= {NAME: WriteOnly(cache), "attention_mask": None}


def forget_the_padding(self: GatedLlamaAttention, keywords: dict) -> None:
    if keywords.get(NAME) is not None:
        keywords["attention_mask"] = None


@pytest.mark.fast
@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (drop_the_cache, "fails: RuntimeError: the KV cache must hold 24 tokens, holds 0"),
        (read_nothing_from_the_cache, "differ from the source's"),
        (lose_the_cache, "fails: RuntimeError: the KV cache given to GatedLlamaDecoderLayer did not reach"),
        (forget_the_padding, "differ from the source's"),
    ],
)
def test_a_broken_cache_fails_though_logits_are_equal(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[..., None], line: str
) -> None:
    convert_checkpoint(llama, tmp_path / "gated")
    forward = GatedLlamaAttention.forward

    def spoiled(self: GatedLlamaAttention, hidden_states: torch.Tensor, **keywords: object) -> object:
        spoil(self, keywords)
        return forward(self, hidden_states, **keywords)

    monkeypatch.setattr(GatedLlamaAttention, "forward", spoiled)
    verification = verify_checkpoint(llama, tmp_path / "gated")
    assert verification.max_difference == 0 and not verification.differing
    assert not verification.passed and verification.verdict == "different"
    assert line in verification.summary()["cached_generation"]
    assert line in (tmp_path / "gated" / "README.md").read_text()


def test_a_generation_of_other_weights_differs(llama: Path, tmp_path: Path) -> None:
    """Also where it begins with the same tokens: each step is compared on the source's tokens so far."""
    convert_checkpoint(llama, tmp_path / "gated", place="copy")
    change(tmp_path / "gated", "model.layers.1.mlp.up_proj.weight")
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (llama, tmp_path / "gated")]
    pair = [streamed(path, model) for path, model in zip((llama, tmp_path / "gated"), models, strict=True)]
    comparison = compare_generation(*pair, torch.arange(1, 25))
    assert not comparison.is_same and comparison.error is None and comparison.max_difference > 0
    generation = compare_generation(*pair, torch.tensor([5]))  # repeated, so that the shorter prompt has padding
    assert generation.tokens == 3 * NEW_TOKENS


def test_two_models_without_a_cache_do_not_pass(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would agree."""
    convert_checkpoint(llama, tmp_path / "gated")
    monkeypatch.setattr(generation, "cache_argument", lambda _: "kv_cache")
    with pytest.raises(ConversionError, match="llama: cannot generate: RuntimeError: the KV cache must hold 24 tokens"):
        verify_checkpoint(llama, tmp_path / "gated")


@pytest.mark.parametrize("fails_at", [0, 10])
def test_a_disk_that_fails_is_no_verdict(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    """While either model generates."""
    convert_checkpoint(llama, tmp_path / "gated")
    run, calls = StreamedModel.run, 0

    def failing(self: StreamedModel, *arguments: dict) -> list[torch.Tensor]:
        nonlocal calls
        if len(arguments) > 1:  # not the pass over the text
            calls += 1
            if calls > fails_at:
                raise OSError(5, "Input/output error", "shard")
        return run(self, *arguments)

    monkeypatch.setattr(StreamedModel, "run", failing)
    with pytest.raises(ConversionError, match="shard: Input/output error"):
        verify_checkpoint(llama, tmp_path / "gated")


def test_a_checkpoint_that_lost_one_code_file_is_told(llama: Path, tmp_path: Path) -> None:
    """Without a manifest, too."""
    convert_checkpoint(llama, tmp_path / "gated")
    (tmp_path / "gated" / "gated_llama_manifest.json").unlink()
    assert verify_checkpoint(llama, tmp_path / "gated").outdated_code == ()
    (tmp_path / "gated" / "modeling_gated_llama.py").unlink()
    verification = verify_checkpoint(llama, tmp_path / "gated")
    assert verification.passed and verification.outdated_code == ("modeling_gated_llama.py",)


def test_the_streamed_models_give_the_models_logits(
    source_model: PreTrainedModel, tokens: torch.Tensor, tmp_path: Path
) -> None:
    """Against Transformers' own loading and forward, for the source's class and ours."""
    source_model.save_pretrained(tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "gated")
    change(tmp_path / "gated", "model.layers.1.self_attn.g_proj.weight")
    for path in (tmp_path / "source", tmp_path / "gated"):
        model = AutoModelForCausalLM.from_pretrained(path)
        stream = streamed(path, model)
        with torch.no_grad():
            expected = model(tokens[:1]).logits[0]
        actual = torch.cat(list(stream.logits(stream.hidden_states(tokens[0]))), -1)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
        assert all(parameter.is_meta for parameter in stream.decoder.layers.parameters())


def test_the_figures_are_those_of_the_definitions(llama: Path, tokens: torch.Tensor, tmp_path: Path) -> None:
    convert_checkpoint(llama, tmp_path / "gated")
    change(tmp_path / "gated", "model.layers.1.self_attn.g_proj.weight")
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (llama, tmp_path / "gated")]
    pair = [streamed(path, model) for path, model in zip((llama, tmp_path / "gated"), models, strict=True)]
    with torch.no_grad():
        one, other = (model(tokens[:1]).logits[0].double() for model in models)
    comparison = LogitsComparison(*pair, tokens[0])
    assert comparison.max_difference == pytest.approx((one - other).abs().max().item(), rel=1e-4)
    assert comparison.max_difference > 0.01
    p, q = one.log_softmax(-1), other.log_softmax(-1)
    assert comparison.kl_divergence == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-3)
    agreement = (one.argmax(-1) == other.argmax(-1)).double().mean().item()
    assert comparison.top1_agreement == pytest.approx(agreement)
    assert agreement < 1


def change(directory: Path, name: str) -> None:
    """Add noise to a tensor of a checkpoint."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    shard = directory / index["weight_map"][name]
    tensors = load_file(shard)
    tensors[name] += torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(0)).to(tensors[name])
    save_file(tensors, shard, metadata={"format": "pt"})


@pytest.mark.fast
@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("model.layers.1.self_attn.g_proj.bias", ("gates", "changed since conversion in layers 1")),
        ("model.layers.2.mlp.up_proj.weight", ("differing", "model.layers.2.mlp.up_proj.weight")),
    ],
)
def test_a_change_fails_and_is_named(llama: Path, tmp_path: Path, name: str, line: tuple[str, str]) -> None:
    convert_checkpoint(llama, tmp_path / "gated", place="copy")
    change(tmp_path / "gated", name)
    verification = verify_checkpoint(llama, tmp_path / "gated")
    assert not verification.passed and verification.verdict == "different"
    assert verification.max_difference is not None and verification.max_difference > 0
    assert verification.summary()[line[0]] == line[1]


def test_a_change_that_logits_do_not_show_fails_too(llama: Path, tmp_path: Path) -> None:
    """An embedding that no token of the text uses."""
    save_word_tokenizer(llama)
    convert_checkpoint(llama, tmp_path / "gated", place="copy")
    shard = tmp_path / "gated" / "model-00001-of-00002.safetensors"
    tensors = load_file(shard)
    tensors["model.layers.0.input_layernorm.weight"].view(torch.int32)[0] ^= 1
    save_file(tensors, shard, metadata={"format": "pt"})
    verification = verify_checkpoint(llama, tmp_path / "gated", tokens=3)
    assert not verification.passed and verification.differing == ("model.layers.0.input_layernorm.weight",)


def test_another_layout_of_the_same_tensors_passes(sharded: Path, tmp_path: Path) -> None:
    """Saved again, in other shards."""
    convert_checkpoint(sharded, tmp_path / "gated")
    AutoModelForCausalLM.from_pretrained(tmp_path / "gated").save_pretrained(tmp_path / "again")
    verification = verify_checkpoint(sharded, tmp_path / "again")
    assert verification.passed and not verification.recorded


def test_another_model_is_not_taken_for_the_source(llama: Path, sharded: Path, tmp_path: Path) -> None:
    convert_checkpoint(sharded, tmp_path / "gated")
    verification = verify_checkpoint(llama, tmp_path / "gated")
    assert not verification.passed
    assert "model.layers.2.mlp.down_proj.weight" in verification.differing
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(ConversionError, match=r"gated: has other tensors or shapes than .*llama"):
        verify_checkpoint(llama, tmp_path / "gated")


def test_tensors_that_only_the_gated_checkpoint_has_are_seen(sharded: Path, llama: Path, tmp_path: Path) -> None:
    convert_checkpoint(llama, tmp_path / "gated", place="copy")
    shard = tmp_path / "gated" / "model-00001-of-00002.safetensors"
    tensors = load_file(shard) | {"model.layers.0.self_attn.q_proj.bias": torch.ones(72)}
    save_file(tensors, shard, metadata={"format": "pt"})
    index = tmp_path / "gated" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.layers.0.self_attn.q_proj.bias"] = shard.name
    index.write_text(json.dumps(content))
    verification = verify_checkpoint(llama, tmp_path / "gated")
    assert not verification.passed and verification.differing == ("model.layers.0.self_attn.q_proj.bias",)


def test_the_card_and_the_manifest_record_the_last_result(llama: Path, tmp_path: Path) -> None:
    gated = tmp_path / "gated"
    convert_checkpoint(llama, gated, place="link")
    assert "Not run yet" in (gated / "README.md").read_text()
    for expected in ("identical: the same function, bit for bit", "different"):
        verification = verify_checkpoint(llama, gated)
        assert verification.recorded and verification.verdict == expected
        card = (gated / "README.md").read_text()
        assert f"| verdict | {expected} |" in card and "Not run yet" not in card
        assert card.count("| verdict |") == 1
        manifest = json.loads((gated / "gated_llama_manifest.json").read_text())
        assert manifest["verification"]["verdict"] == expected
        for name, record in manifest["files"].items():  # the linked shard's too, and the new card's
            if expected.startswith("identical") or name != "model-00002-of-00002.safetensors":
                assert record["sha256"] == hashlib.sha256((gated / name).read_bytes()).hexdigest(), name
        change(gated, "model.layers.0.self_attn.g_proj.weight")


def test_real_text_by_default_or_a_file(llama: Path, tmp_path: Path) -> None:
    save_word_tokenizer(llama)
    convert_checkpoint(llama, tmp_path / "gated")
    verification = verify_checkpoint(llama, tmp_path / "gated", tokens=40)
    assert verification.passed and (verification.tokens, verification.text) == (40, "Python's language reference")
    (tmp_path / "words.txt").write_text("a b b a")
    verification = verify_checkpoint(llama, tmp_path / "gated", text=tmp_path / "words.txt")
    assert verification.passed and (verification.tokens, verification.text) == (4, "words.txt")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("no tokenizer", r"tokenizer\.json: no such file, so .*words\.txt cannot be tokenized"),
        ("bad tokenizer", r"tokenizer\.json: "),
        ("no text", r"words\.txt: No such file"),
        ("empty text", r"words\.txt gives no tokens"),
        ("large tokens", r"gives no tokens within the vocabulary of 96"),
        ("no such output", r"nowhere: no such directory"),
        ("not gated", r"config\.json: model_type must be gated_llama, got 'llama'"),
        ("source is gated", r"config\.json: model_type='gated_llama' is already gated"),
    ],
)
def test_what_cannot_be_verified_is_one_error(llama: Path, tmp_path: Path, spoil: str, message: str) -> None:
    save_word_tokenizer(llama, first=95 if spoil == "large tokens" else 0)
    (tmp_path / "words.txt").write_text("" if spoil == "empty text" else "a b b a")
    convert_checkpoint(llama, tmp_path / "gated")
    source, gated = llama, tmp_path / "gated"
    if spoil == "no tokenizer":
        (llama / "tokenizer.json").unlink()
    elif spoil == "bad tokenizer":
        (llama / "tokenizer.json").write_text("{")
    elif spoil == "no text":
        (tmp_path / "words.txt").unlink()
    elif spoil == "not gated":
        gated = llama
    elif spoil == "no such output":
        gated = tmp_path / "nowhere"
    elif spoil == "source is gated":
        source = gated
    with pytest.raises(ConversionError, match=message):
        verify_checkpoint(source, gated, text=tmp_path / "words.txt")


def test_nan_does_not_pass(llama: Path, tmp_path: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    tensors["model.norm.weight"][0] = math.nan
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    convert_checkpoint(llama, tmp_path / "gated")
    verification = verify_checkpoint(llama, tmp_path / "gated")
    assert not verification.passed and not verification.differing


def test_at_most_one_layer_is_in_memory(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert_checkpoint(sharded, tmp_path / "gated")
    most = 0
    load = StreamedModel._load

    def spy(model: StreamedModel, module: torch.nn.Module, prefix: str) -> None:
        nonlocal most
        load(model, module, prefix)
        if prefix.startswith("model.layers"):
            present = [layer for layer in model.decoder.layers if not next(layer.parameters()).is_meta]
            most = max(most, len(present))

    monkeypatch.setattr(StreamedModel, "_load", spy)
    assert verify_checkpoint(sharded, tmp_path / "gated").passed
    assert most == 1


def test_what_it_compares_is_the_package_s_model(llama: Path, tmp_path: Path) -> None:
    """The code that a checkpoint carries is not run, but compared with what conversion wrote."""
    convert_checkpoint(llama, tmp_path / "gated")
    (tmp_path / "gated" / "modeling_gated_llama.py").write_text("raise SystemExit('ran')")
    verification = verify_checkpoint(llama, tmp_path / "gated")
    assert verification.max_difference == 0
    assert not verification.passed and verification.changed_code == ("modeling_gated_llama.py",)
    assert GatedLlamaForCausalLM.__module__ == "modeling_gated.modeling_gated_llama"


def test_a_read_only_result_is_verified_but_not_recorded(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    convert_checkpoint(llama, tmp_path / "gated")
    monkeypatch.setattr(verify, "replace_file", refuse)
    verification = verify_checkpoint(llama, tmp_path / "gated")
    assert verification.passed and not verification.recorded


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sliding_window", 4096),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 20000.0}),
        ("gate_scale", 1.5),
        ("rms_norm_eps", 0.5),
        ("dtype", "bfloat16"),
    ],
)
def test_another_config_fails_even_where_these_logits_do_not_show_it(tmp_path: Path, field: str, value: object) -> None:
    """A window, for one, that is longer than the text."""
    model = AutoModelForCausalLM.from_config(MistralConfig(**SIZES, sliding_window=1024))
    model.save_pretrained(tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "gated")
    path = tmp_path / "gated" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    verification = verify_checkpoint(tmp_path / "source", tmp_path / "gated", tokens=20)
    assert not verification.passed and verification.differing_fields == (field,)
    assert verification.summary()["config"] == f"{field} not as in the source"


def test_a_head_that_is_stored_beside_tied_embeddings(llama: Path, tmp_path: Path, tokens: torch.Tensor) -> None:
    """Transformers reads it where it differs, so it has to be there; a copy of the embeddings does not."""
    tensors = load_file(llama / "model.safetensors")
    embeddings = tensors["model.embed_tokens.weight"]
    for number, head in enumerate((embeddings.flip(0).contiguous(), embeddings.clone())):
        save_file(tensors | {"lm_head.weight": head}, llama / "model.safetensors", metadata={"format": "pt"})
        gated = tmp_path / str(number)
        convert_checkpoint(llama, gated)
        with torch.no_grad():
            logits = [AutoModelForCausalLM.from_pretrained(path)(tokens).logits for path in (llama, gated)]
        assert torch.equal(*logits)
        assert verify_checkpoint(llama, gated).passed
        shard = gated / "model-00001-of-00002.safetensors"
        save_file(tensors, shard, metadata={"format": "pt"})
        index = json.loads((gated / "model.safetensors.index.json").read_text())
        del index["weight_map"]["lm_head.weight"]
        (gated / "model.safetensors.index.json").write_text(json.dumps(index))
        assert verify_checkpoint(llama, gated).passed == bool(number)


def test_gates_that_are_missing_are_open_here_too(llama: Path, tmp_path: Path) -> None:
    convert_checkpoint(llama, tmp_path / "gated")
    forget_gates(tmp_path / "gated")
    assert verify_checkpoint(llama, tmp_path / "gated").passed


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"truncation": {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}}, None),
        ({"model": {"type": "WordLevel", "vocab": {"x": 0}, "unk_token": "[UNK]"}}, "cannot tokenize"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "cannot tokenize"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "BAAAAP////8="}}, "cannot tokenize"),
    ],
)
def test_a_tokenizer_that_fails_is_one_error(llama: Path, tmp_path: Path, fields: dict, message: str | None) -> None:
    save_word_tokenizer(llama)
    path = llama / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    convert_checkpoint(llama, tmp_path / "gated")
    if message is None:
        assert verify_checkpoint(llama, tmp_path / "gated", tokens=30).tokens == 30
    else:
        with pytest.raises(ConversionError, match=rf"tokenizer\.json: {message}"):
            verify_checkpoint(llama, tmp_path / "gated")


def test_a_linked_card_is_not_followed(llama: Path, tmp_path: Path) -> None:
    convert_checkpoint(llama, tmp_path / "gated")
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "gated" / "README.md").unlink()
    (tmp_path / "gated" / "README.md").symlink_to(tmp_path / "secret")
    assert verify_checkpoint(llama, tmp_path / "gated").passed
    assert (tmp_path / "gated" / "README.md").is_symlink()
    assert (tmp_path / "secret").read_text() == "secret"
