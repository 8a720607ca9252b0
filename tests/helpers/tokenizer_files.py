"""Small tokenizers in the forms that checkpoints have: byte-level, of sentencepiece's kind, vocabulary and merges."""

import json
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from modeling_gated.default_text import default_text


# Digits in groups of three, as in Llama 3: no class of Transformers has this by itself.
_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPECIAL = ["<unk>", "<s>", "</s>"]
CUSTOM_CODE = Path(__file__).with_name("tokenization_custom.py")


@cache
def _byte_level() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[*_SPECIAL, "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([default_text()[:100_000]], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer.to_str()


@cache
def _metaspace() -> str:
    """As Mistral-7B-v0.1's file: a normalizer that makes spaces visible and none of the pre-tokenizers."""
    trained = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=_SPECIAL, show_progress=False)
    trained.train_from_iterator([line for line in default_text()[:50_000].splitlines() if line], trainer)
    raw = json.loads(trained.to_str())["model"]
    tokens = [token for token, _ in sorted(raw["vocab"].items(), key=lambda item: item[1])]
    tokens = [*tokens[:3], *(f"<0x{byte:02X}>" for byte in range(256)), *tokens[3:]]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    merges = [tuple(merge) for merge in raw["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, fuse_unk=True, byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    tokenizer.normalizer = trained.normalizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer.to_str()


def write_tokenizer(directory: Path, kind: str) -> None:
    """
    Write a tokenizer's files other than tokenizer_config.json, and their model's vocabulary into config.json.

    Args:
        directory: a checkpoint.
        kind: `"byte-level"`, `"metaspace"` or `"vocabulary and merges"`, of the byte-level one.
    """
    content = _metaspace() if kind == "metaspace" else _byte_level()
    if kind == "vocabulary and merges":
        model = json.loads(content)["model"]
        (directory / "vocab.json").write_text(json.dumps(model["vocab"]))
        merges = "\n".join(" ".join(merge) for merge in model["merges"])
        (directory / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    else:
        (directory / "tokenizer.json").write_text(content)
