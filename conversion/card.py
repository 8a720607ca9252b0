"""The model card of a converted checkpoint: base model, revision, command, gates, and what verification found."""

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
    """The text of README.md, with the metadata that the hub reads."""
    config, source = plan.architecture.config, plan.source
    imported = plan.architecture.fused is not None
    rows: dict[str, object] = {
        "base model": source.name,
        "revision": source.revision or "not known (a local path)",
        "command": f"`{command}`",
        "gates": f"{config.gate_granularity}, {config.num_hidden_layers} layers, {plan.gate_parameters:,} parameters",
    }
    if not imported:
        rows |= {"gate_init": config.gate_init, "gate_scale": config.gate_scale}
    if plan.context:
        rows["context"] = f"extended to {describe_context(config)}"
    link = f"[{source.name}](https://huggingface.co/{source.repo_id})" if source.repo_id else f"`{source.name}`"
    table = "\n".join(f"| {name} | {cell(value)} |" for name, value in rows.items())
    alike = " with its context extended alike" if plan.context else ""
    if imported:
        promise = "The gates are the base model's own, taken out of its `q_proj`; no number was changed."
    else:
        promise = (
            "Gates were added to the base model, open and scaled so that each is exactly 1: until they are trained, "
            f"the model has the logits of the base model{alike}, and generates the same text. The base model's tensors "
            "are unchanged."
        )
    return f"""---
{card_metadata(source, plan.checkpoint.directory)}
---

# {cell(output.name)}

{cell(link)} with attention output gates ([arXiv 2505.06708](https://arxiv.org/abs/2505.06708)). {promise}

| | |
| --- | --- |
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "..."  # this directory, or its name on the hub
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)  # or import modeling_gated before
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
```

## Verification

{_BEGIN}
Not run yet: `gated-llama verify SOURCE OUTPUT`.
{_END}

SHA-256 of every file: `gated_llama_manifest.json`.{"" if imported else " Back to the source: `gated-llama ungate`."}
"""


def card_metadata(source: Source, directory: Path) -> str:
    """
    Return what the hub reads of a card, as YAML.

    License, language and base model are those of the card in `directory`. Without a base model there, it is the
    source's id on the hub. A local folder's name is none, so `base_model` is then left out.
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
    """A model card with the result of a verification in place of the last one's; unchanged without such a place."""
    rows = "\n".join(f"| {cell(name.replace('_', ' '))} | {cell(value)} |" for name, value in findings.items())
    section = f"{_BEGIN}\n| | |\n| --- | --- |\n{rows}\n{_END}"
    return re.sub(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", lambda _: section, card, count=1, flags=re.DOTALL)


def with_context(card: str, described: str) -> str:
    """
    A model card that tells of the last extension of the context, and of no verification from before it; unchanged if
    conversion didn't write it.
    """
    if _BEGIN not in card:
        return card
    row = f"| context | extended to {cell(described)} |\n"
    card = re.sub(r"^\| context \| extended to .*\n", "", card, count=1, flags=re.MULTILINE)
    card = re.sub(r"^\| gates \| .*\n", lambda match: match[0] + row, card, count=1, flags=re.MULTILINE)
    return with_verification(card, {"verdict": "not verified since the context was extended"})


def _metadata(path: Path) -> dict[str, Any]:
    """Return what is kept of the source's card, as far as the values are plain words, and ids of base models."""
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
    """A value that stays within a cell of a Markdown table."""
    return " ".join(str(value).split()).replace("|", "\\|")
