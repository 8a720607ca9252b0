"""Model card of a converted checkpoint: base model, revision, command, gates and the result of verification."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from modeling_gated.checkpoints.files import opened
from modeling_gated.checkpoints.sources import Source
from modeling_gated.configuration import describe_context

from .plan import Plan


_BEGIN, _END = "<!-- gated-llama verify: begin -->", "<!-- gated-llama verify: end -->"
_KEPT_METADATA = ("license", "license_name", "license_link", "language")
_FRONT_MATTER_BYTES = 2**16


def model_card(plan: Plan, output: Path, command: str) -> str:
    """Return the text of README.md, with the metadata that the hub reads."""
    config, source = plan.architecture.config, plan.source
    imported = plan.architecture.fused is not None
    rows: dict[str, object] = {
        "base model": source.name,
        "revision": source.revision or "unknown (a local path)",
        "command": f"`{command}`",
        "gates": f"{config.gate_granularity}, {config.num_hidden_layers} layers, {plan.gate_parameters:,} parameters",
    }
    if not imported:
        rows |= {"gate_init": config.gate_init, "gate_scale": config.gate_scale}
    if plan.context:
        rows["context"] = f"extended to {describe_context(config)}"
    link = f"[{source.name}](https://huggingface.co/{source.repo_id})" if source.repo_id else f"`{source.name}`"
    table = "\n".join(f"| {name} | {cell(value)} |" for name, value in rows.items())
    extended = " with its context extended in the same way" if plan.context else ""
    if imported:
        promise = "The gates are the base model's own rows of `q_proj`. No number was changed."
    else:
        promise = (
            f"Every added gate is exactly 1. Until the gates are trained, the logits are those of the base model"
            f"{extended}, and so is the generated text. The base model's tensors are unchanged."
        )
    way_back = "" if imported else " `gated-llama ungate` restores the base model's files."
    return f"""---
{card_metadata(source, plan.checkpoint.directory)}
---

# {cell(output.name)}

{cell(link)} with attention output gates ([arXiv 2505.06708](https://arxiv.org/abs/2505.06708)). A gate is a learned
factor on the output of each attention head. {promise}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "..."  # this directory, or the model's id on the hub
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)  # not needed after import modeling_gated
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
```

| | |
| --- | --- |
{table}

## Verification

{_BEGIN}
Not run yet: `gated-llama verify SOURCE OUTPUT`.
{_END}

`gated_llama_manifest.json` has the SHA-256 of every file.{way_back}
"""


def card_metadata(source: Source, directory: Path) -> str:
    """
    Return the metadata that the hub reads of a card, as YAML.

    License, language and base model are those of the card in `directory`. If that card has no base model, it is the
    source's id on the hub. For a local folder `base_model` is left out.
    """
    metadata = _metadata(directory / "README.md")
    data = ModelCardData(
        base_model=metadata.pop("base_model", source.repo_id if _is_hub_id(source.repo_id or "") else None),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gated-attention", "gated_llama"],
        **metadata,
    )
    return data.to_yaml()


def with_verification(card: str, findings: dict[str, Any]) -> str:
    """Return a model card with the result of a verification; unchanged if it has no place for one."""
    rows = "\n".join(f"| {cell(name.replace('_', ' '))} | {cell(value)} |" for name, value in findings.items())
    section = f"{_BEGIN}\n| | |\n| --- | --- |\n{rows}\n{_END}"
    return re.sub(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", lambda _: section, card, count=1, flags=re.DOTALL)


def with_context(card: str, described: str) -> str:
    """
    Return a model card with the last extension of the context, and without an earlier verification.

    The card is unchanged if conversion did not write it.
    """
    if _BEGIN not in card:
        return card
    row = f"| context | extended to {cell(described)} |\n"
    card = re.sub(r"^\| context \| extended to .*\n", "", card, count=1, flags=re.MULTILINE)
    card = re.sub(r"^\| gates \| .*\n", lambda match: match[0] + row, card, count=1, flags=re.MULTILINE)
    return with_verification(card, {"verdict": "not verified since the context was extended"})


def _metadata(path: Path) -> dict[str, Any]:
    """Return the kept fields of the source's card: plain words, and ids of base models."""
    try:
        with opened(path) as file:
            start = file.read(_FRONT_MATTER_BYTES).decode("utf-8", "replace").replace("\r\n", "\n")
        front = re.match(r"---\n.*?\n---\n", start, re.DOTALL)
        data = ModelCard(front[0], ignore_metadata_errors=True).data.to_dict() if front else {}
    except Exception:  # no card, or one that YAML cannot read: then there is nothing to keep
        return {}
    kept = {name: data[name] for name in _KEPT_METADATA if _words(data.get(name))}
    if (models := _words(data.get("base_model"))) and all(map(_is_hub_id, models)):
        kept["base_model"] = data["base_model"]
    return kept


def _words(value: object) -> list[str]:
    """Return a word, or the words of a list, if they are that and short; otherwise none."""
    words = value if isinstance(value, list) else [value]
    short = [word for word in words if isinstance(word, str) and len(word) < 200]
    return short if len(short) == len(words) else []


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def cell(value: object) -> str:
    """Return a value as text that stays within a cell of a Markdown table."""
    return " ".join(str(value).split()).replace("|", "\\|")
