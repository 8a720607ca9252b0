"""Ways to spoil a checkpoint's tokenizer, chat template, generation config and weights, and what must come of each."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.helpers.byte_tokenizer import CHAT_TEMPLATE


Spoil = Callable[[Path], object]
# The commands that load the tokenizer and the model by Transformers.
LOADING = ("inspect", "evaluate-context", "absorb")
CHATTING = ("evaluate-context",)
TOKENIZING = (*LOADING, "verify")
ALL = (*TOKENIZING, "convert", "extend")
LINE = "It is a truth universally acknowledged, that a single man must be in want of a wife. "
# A letter that comes once at the beginning and once at the end.
TEXT = f"{LINE * 4}Quixote {LINE * 35}Q."
MODEL_CODE = {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}


class Case(NamedTuple):
    """
    A way to spoil a checkpoint, words of the one line that `fails` must end in, and a note of absorb otherwise.

    `converts` holds words of the line by which convert, extend, verify and absorb refuse the checkpoint, if they do.
    """

    spoil: Spoil
    words: tuple[str, ...] = ()
    fails: tuple[str, ...] = LOADING
    note: str = ""
    converts: tuple[str, ...] = ()


def edited(name: str, **fields: Any) -> Spoil:
    """Change fields of a JSON file; None removes one."""

    def spoil(folder: Path) -> None:
        path = folder / name
        content = (json.loads(path.read_text()) if path.exists() else {}) | fields
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return spoil


def written(name: str, content: str | bytes) -> Spoil:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def removed(*names: str) -> Spoil:
    return lambda folder: [(folder / name).unlink(missing_ok=True) for name in names]


def folder_instead(name: str) -> Spoil:
    return lambda folder: ((folder / name).unlink(missing_ok=True), (folder / name).mkdir())


def halved(name: str) -> Spoil:
    return lambda folder: (folder / name).write_text((folder / name).read_text()[: (folder / name).stat().st_size // 2])


def both(*spoils: Spoil) -> Spoil:
    return lambda folder: [spoil(folder) for spoil in spoils]


def in_tokenizer(change: Callable[[dict], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        change(content)
        (folder / "tokenizer.json").write_text(json.dumps(content))

    return spoil


def all_beyond(content: dict) -> None:
    content["model"]["vocab"] = {token: number + 1000 for token, number in content["model"]["vocab"].items()}


def one_beyond(content: dict) -> None:
    content["model"]["vocab"]["Q"] = 2000


def bos_beyond(content: dict) -> None:
    content["model"]["vocab"]["<s>"] = 3000
    content["added_tokens"][0]["id"] = 3000
    content["post_processor"]["special_tokens"]["<s>"]["ids"] = [3000]


def special_beyond(content: dict) -> None:
    for number, name in enumerate(("<|start|>", "<|end|>")):
        token = {"id": 3000 + number, "content": name, "single_word": False, "lstrip": False, "rstrip": False}
        content["added_tokens"].append(token | {"normalized": False, "special": True})


def drop_all(content: dict) -> None:
    content["normalizer"] = {"type": "Replace", "pattern": {"Regex": "[\\s\\S]"}, "content": ""}


def forget_special(content: dict) -> None:
    content["added_tokens"] = []


def no_post_processor(content: dict) -> None:
    content["post_processor"] = None


def template(content: str | bytes) -> Spoil:
    return written("chat_template.jinja", content)


def template_in_config(value: Any) -> Spoil:
    return both(removed("chat_template.jinja"), edited("tokenizer_config.json", chat_template=value))


def with_nan(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors[name][0, 0] = torch.nan
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


def without(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        del tensors[name]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


def weights_cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def words_only(text: str) -> Spoil:
    """A tokenizer without [UNK] that knows the words of a text, and raises for others."""

    def spoil(folder: Path) -> None:
        vocabulary = {word: number for number, word in enumerate(dict.fromkeys(text.split()))}
        words = Tokenizer(models.WordLevel(vocabulary))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        removed("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")(folder)
        PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)

    return spoil


def bad_normalizer(content: dict) -> None:
    """The tokenizers library panics, which is no Exception."""
    content["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}


def more_templates(content: bytes) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "rag.jinja").write_bytes(content)

    return spoil


def smaller(folder: Path) -> None:
    """A model with fewer embeddings than its tokenizer has tokens."""
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:200].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edited("config.json", vocab_size=200, bos_token_id=None, eos_token_id=None)(folder)


def failing_template(content: str, reason: str) -> Case:
    words = ("its chat template cannot write a chat of user: ", reason, "chat_template.jinja", "--no-chat")
    return Case(template(content), words, CHATTING, note=reason)


def wrong_field(name: str, value: Any, words: str) -> Case:
    """A field of tokenizer_config.json that Transformers cannot take."""
    return Case(
        edited("tokenizer_config.json", **{name: value}), (f"/tokenizer_config.json: {name} must {words}", "; copy ")
    )


def wrong_config(spoil: Spoil, *words: str) -> Case:
    """A config.json that no command can take."""
    return Case(spoil, (f"/config.json: {words[0]}", *words[1:]), ALL)


def attention(value: Any, reason: str, field: str = "attn_implementation") -> Case:
    """An implementation of attention that this machine does not have, which conversion does not run."""
    words = (f"/config.json: attn_implementation must be one that runs on this machine, got {value!r}; ", reason)
    return Case(edited("config.json", **{field: value}), words, ("inspect", "evaluate-context"))


CODE = {"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}, "tokenizer_class": "Tokenizer"}
SPECIAL_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
NEEDS_SYSTEM = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('A system message is needed') }}{% endif %}"
NO_ASSISTANT = "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ raise_exception('no turns') }}{% endif %}[{{ m['content'] }}]{% endfor %}"  # noqa: E501
NO_DIGITS = (
    "{% for m in messages %}{% for d in '0123456789' %}{% if d in m['content'] %}{{ raise_exception('no digits') }}"
    "{% endif %}{% endfor %}[{{ m['content'] }}]{% endfor %}"
)
TURNS = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns') }}"
    "{% endif %}[{{ m['content'] }}]{% endfor %}"
)
RAG = {"name": "rag", "template": "x"}
EMBEDDINGS = (
    "/checkpoint: token ids must be below ",
    "the number of the model's embeddings, got ",
    "use the tokenizer",
)

NO_SPECIAL = both(
    in_tokenizer(no_post_processor),
    edited("tokenizer_config.json", bos_token=None, eos_token=None),
    template(CHAT_TEMPLATE.replace("{{ bos_token }}", "")),
)

CASES: dict[str, Case] = {
    "nothing": Case(lambda folder: None, fails=()),
    # the tokenizer's files
    "no tokenizer": Case(
        removed("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        ("/checkpoint/tokenizer.json: no such file, so ", "cannot be tokenized"),
        TOKENIZING,
    ),
    "no tokenizer.json": Case(removed("tokenizer.json"), ("/checkpoint/tokenizer.json: no such file",), TOKENIZING),
    "tokenizer.json not JSON": Case(written("tokenizer.json", "{"), ("/checkpoint/tokenizer.json: ",), TOKENIZING),
    "tokenizer.json truncated": Case(halved("tokenizer.json"), ("/checkpoint/tokenizer.json: ",), TOKENIZING),
    "tokenizer.json not UTF-8": Case(written("tokenizer.json", b"\xff"), ("/checkpoint/tokenizer.json: ",), TOKENIZING),
    "tokenizer.json a list": Case(written("tokenizer.json", "[]"), ("/checkpoint/tokenizer.json: ",), TOKENIZING),
    "tokenizer.json a folder": Case(folder_instead("tokenizer.json"), ("/checkpoint/tokenizer.json: ",), TOKENIZING),
    "tokenizer.json of no model": Case(written("tokenizer.json", "{}"), ("/checkpoint", "tokenize"), TOKENIZING),
    "config not JSON": Case(written("tokenizer_config.json", "{"), ("tokenizer_config.json: must be a JSON file",)),
    "config a list": Case(written("tokenizer_config.json", "[]"), ("/tokenizer_config.json: must hold a JSON object",)),
    "map not JSON": Case(written("special_tokens_map.json", "{"), ("/special_tokens_map.json: must be a JSON file",)),
    "added not JSON": Case(written("added_tokens.json", "{"), ("/added_tokens.json: must be a JSON file",)),
    "unknown class": Case(edited("tokenizer_config.json", tokenizer_class="Unknown"), fails=()),
    "class a number": Case(
        edited("tokenizer_config.json", tokenizer_class=7),
        ("/tokenizer_config.json: tokenizer_class must be a name, got 7; copy",),
    ),
    "needs code": Case(
        both(edited("tokenizer_config.json", **CODE), written("code.py", "raise SystemExit('the code was run')")),
        ("/tokenizer_config.json: auto_map=", "'code.Tokenizer'", "which is never run"),
    ),
    "auto_map a number": Case(
        edited("tokenizer_config.json", auto_map={"AutoTokenizer": 5}),
        ("/tokenizer_config.json: auto_map must give AutoTokenizer a class", "got {'AutoTokenizer': 5}"),
    ),
    "bos_token a number": wrong_field("bos_token", 5, "be a token, got 5"),
    "padding to the middle": wrong_field("padding_side", "middle", "be 'left' or 'right', got 'middle'"),
    "extra tokens a number": wrong_field("extra_special_tokens", 5, "be a list or an object of tokens, got 5"),
    "added tokens a list": wrong_field("added_tokens_decoder", [1], "be an object of token ids and their tokens"),
    "added tokens without ids": wrong_field("added_tokens_decoder", {"x": {"content": "x"}}, "be an object of token"),
    "length a word": wrong_field("model_max_length", "x", "be a number of tokens, got 'x'"),
    "normalizer damaged": Case(
        in_tokenizer(bad_normalizer),
        ("/checkpoint/tokenizer.json: ", "Cannot parse precompiled_charsmap"),
        TOKENIZING,
    ),
    # token ids
    "all ids beyond": Case(in_tokenizer(all_beyond), (*EMBEDDINGS, "258", ")")),
    "words that only prompts have": Case(
        words_only(TEXT),
        ("/checkpoint: its tokenizer cannot tokenize ", "Missing [UNK]"),
        ("evaluate-context", "absorb"),
    ),
    "one id beyond": Case(in_tokenizer(one_beyond), (*EMBEDDINGS, "got 2000 ('Q') in ")),
    "the first id beyond": Case(in_tokenizer(bos_beyond), (*EMBEDDINGS, "3000 ('<s>') in the beginning of an input")),
    "the template's ids beyond": Case(
        both(in_tokenizer(special_beyond), template(SPECIAL_TEMPLATE)),
        (*EMBEDDINGS, "in the chat template"),
        ("evaluate-context", "absorb"),
    ),
    "ids beyond that nothing uses": Case(in_tokenizer(special_beyond), fails=()),
    "fewer embeddings": Case(smaller, (*EMBEDDINGS, "below 200, ")),
    "no bos, no eos": Case(NO_SPECIAL, fails=()),
    "no special id that the model has": Case(
        both(in_tokenizer(forget_special), in_tokenizer(special_beyond), NO_SPECIAL), fails=()
    ),
    "no tokens": Case(in_tokenizer(drop_all), ("its tokenizer must give tokens for ", ", got none; copy ")),
    # chat templates
    "template syntax": failing_template("{% for %}", "TemplateSyntaxError: Expected an expression"),
    "template raises": failing_template("{{ raise_exception('Only for tools') }}", "TemplateError: Only for tools"),
    "template TypeError": failing_template("{{ messages[0]['content'] + 1 }}", "TypeError: can only concatenate str"),
    "template undefined": failing_template("{{ nothing.at.all }}", "UndefinedError: 'nothing' is undefined"),
    "template of tools": failing_template("{{ tools[0]['name'] }}", "UndefinedError: None has no element 0"),
    "template of a system": failing_template(NEEDS_SYSTEM, "TemplateError: A system message is needed"),
    "template without end": failing_template("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "template too long": failing_template("{% for i in range(10 ** 9) %}x{% endfor %}", "OverflowError: Range too big"),
    "template of one turn": Case(template(NO_ASSISTANT), fails=(), note="TemplateError: no turns"),
    "template drops the chat": Case(
        template("hello"),
        ("/checkpoint: its chat template must keep the text of a prompt", "--no-chat"),
        CHATTING,
        note="got 'hello'",
    ),
    "template empty": Case(template(""), fails=()),
    "template not UTF-8": Case(template(b"\xff"), ("/chat_template.jinja: must be UTF-8, got invalid start byte",)),
    "template in the config": Case(template_in_config(CHAT_TEMPLATE), fails=()),
    "template a number": Case(template_in_config(5), ("its chat template cannot write",), CHATTING, note="TypeError"),
    "template divides": failing_template("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
    "template includes": failing_template("{% include 'x' %}", "TypeError: no loader for this environment"),
    "template unsafe": failing_template("{{ messages.__class__.__mro__ }}", "SecurityError: access to attribute"),
    "template of lines": failing_template("{{ raise_exception('one\ntwo') }}", "TemplateError: one two"),
    "template without digits": Case(
        template(NO_DIGITS), ("its chat template cannot write a chat of user: TemplateError: no digits",), CHATTING
    ),
    "template of turns": Case(template(TURNS), fails=()),
    "templates as an object": Case(template_in_config({"default": CHAT_TEMPLATE, "rag": "x"}), fails=()),
    "more templates": Case(more_templates(b"x"), fails=()),
    "more templates not UTF-8": Case(
        more_templates(b"\xff"), ("/additional_chat_templates/rag.jinja: must be UTF-8, got invalid start byte",)
    ),
    "templates": Case(template_in_config([{"name": "default", "template": CHAT_TEMPLATE}, RAG]), fails=()),
    "templates without a default": Case(
        template_in_config([RAG, {"name": "tool", "template": "x"}]),
        ("its chat template cannot write", "no default specified", "['rag', 'tool']"),
        CHATTING,
        note="no default specified",
    ),
    "templates of numbers": Case(
        template_in_config([1, 2]), ("/tokenizer_config.json: chat_template must be", "got [1, 2]")
    ),
    # how it generates
    "generation not JSON": Case(written("generation_config.json", "{"), ("/generation_config.json: not valid JSON",)),
    "generation a list": Case(written("generation_config.json", "[]"), ("/generation_config.json: not a JSON object",)),
    "generation a folder": Case(folder_instead("generation_config.json"), ("generation_config.json: not a regular",)),
    "eos a word": Case(
        edited("generation_config.json", eos_token_id="x"),
        ("/generation_config.json: eos_token_id must be a token id or a list of token ids, got 'x'; correct it",),
    ),
    "eos beyond": Case(edited("generation_config.json", eos_token_id=[10**6, -1]), fails=()),
    "generation that none uses": Case(
        edited("generation_config.json", temperature="hot", cache_implementation="no", early_stopping="no"), fails=()
    ),
    "processors": Case(both(written("preprocessor_config.json", "{"), written("processor_config.json", "{")), fails=()),
    # config.json
    "run settings": Case(
        edited("config.json", output_attentions=True, output_hidden_states=True, use_cache=False), fails=()
    ),
    "return_dict false": Case(edited("config.json", return_dict=False), fails=(), converts=("return_dict=False",)),
    "eager attention": Case(edited("config.json", attn_implementation="eager"), fails=()),
    "flash attention": attention("flash_attention_2", "FlashAttention2"),
    "flash attention by its old name": attention("flash_attention_2", "FlashAttention2", "_attn_implementation"),
    "flash attention 3": attention("flash_attention_3", "FlashAttention3"),
    "attention unknown": attention("nonsense", "not supported"),
    "attention a number": attention(5, "int"),
    "no config.json": wrong_config(removed("config.json"), "no such file"),
    "config.json not JSON": wrong_config(written("config.json", "{"), "not valid JSON"),
    "config.json not UTF-8": wrong_config(written("config.json", b"\xff"), "not valid JSON"),
    "config.json a list": wrong_config(written("config.json", "[]"), "not a JSON object"),
    "dtype unknown": wrong_config(edited("config.json", dtype="float99"), "", "float99"),
    "eos of config.json a word": wrong_config(edited("config.json", eos_token_id="x"), "", "eos_token_id", "'x'"),
    "model unknown": wrong_config(edited("config.json", model_type="nothing"), "", "nothing"),
    "model needs code": Case(
        both(edited("config.json", **MODEL_CODE), written("code.py", "raise SystemExit('the code was run')")),
        ("/config.json: model_type='mine' needs code of the checkpoint's, which is never run",),
        ("inspect", "evaluate-context"),
        converts=("/config.json: model_type='mine' is not supported",),
    ),
    "adapter damaged": Case(
        written("adapter_config.json", "{"),
        ("/adapter_config.json: not valid JSON",),
        ("inspect", "evaluate-context"),
        converts=("has an adapter (adapter_config.json)",),
    ),
    # weights
    "no weights": Case(removed("model.safetensors"), ("/checkpoint: has neither model.safetensors nor",), ALL),
    "weights cut": Case(weights_cut, ("/checkpoint/model.safetensors: not a complete safetensors file",), ALL),
    "a weight missing": Case(
        without("model.layers.2.mlp.up_proj.weight"),
        ("/checkpoint: ", "model.layers.2.mlp.up_proj.weight", "the checkpoint "),
        (*TOKENIZING, "convert"),
    ),
    "shapes of another config": Case(
        edited("config.json", vocab_size=300),
        ("[258, 32]", "config.json asks for", "[300, 32]"),
        (*TOKENIZING, "convert"),
    ),
    "NaN": Case(
        with_nan("model.layers.1.mlp.down_proj.weight"),
        ("/checkpoint: model.layers.1.mlp.down_proj.weight must have finite numbers only",),
    ),
    "NaN in the head": Case(with_nan("lm_head.weight"), ("/checkpoint: lm_head.weight must have finite numbers only",)),
}
