"""The model card of a checkpoint whose sinks were absorbed, with what was measured of it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from modeling_gated.conversion.card import card_metadata, cell

from .comparison import Comparison, Measured
from .result import Absorption


_PROMISE = (
    " without its attention sinks: what they did is done by attention output gates "
    "([arXiv 2505.06708](https://arxiv.org/abs/2505.06708)), fitted to it and distilled from the base model. It loads, "
    "serves and fine-tunes like any other gated model; its predictions are near the base model's, not the same."
)
_COMPARISON = ", made to be compared with a model whose attention sinks were absorbed: of that, steps were left out."


# What the settings leave out where models are made for comparison.
_STEPS = ("removes_writers", "edits_keys", "edits_gates", "trains_gates")


def absorption_card(done: Absorption, directory: Path, origin: Mapping[str, str]) -> str:
    """
    The text of README.md, with the metadata that the hub reads, some of it from the card in `directory`, and what says
    the `origin` of the checkpoint: the command that made it.
    """
    layers, gated = done.layers, sum(any(layer.gated) for layer in done.layers)
    source, settings = done.identity.source, done.identity.settings
    is_whole = all(getattr(settings, step) for step in _STEPS)
    rows = {
        "base model": source.name,
        "revision": source.revision or "not known (a local path)",
        **origin,
        "gates fitted": f"in {gated} of {len(layers)} layers",
        "neurons that wrote massive activations, removed": ", ".join(
            f"{writer.neuron} of layer {writer.layer}" for writer in done.writers
        )
        or "none",
        "distilled on": f"{done.distilled_tokens:,} tokens",
        "computed in": f"{str(done.identity.dtype).removeprefix('torch.')}, matmuls in {done.identity.matmul_dtype}",
        "seed": settings.seed,
    }
    return f"""---
{card_metadata(source, directory)}
---

# {cell(done.output.name)}

{cell(source.name)}{_PROMISE if is_whole else _COMPARISON}

{markdown_table([("", ""), *rows.items()])}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "..."  # this directory, or its name on the hub
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)  # or import modeling_gated before
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
```

## What was measured

On held-out text, before and after. All of it is in `absorption.json`.

{markdown_table(quality_rows(done.comparisons))}

{markdown_table(sink_rows(done.comparisons))}
"""


def quality_rows(comparisons: Sequence[Comparison]) -> list[Sequence[object]]:
    """Perplexities and KL divergences, the head first."""
    head = ("text", "tokens", "begins", "perplexity", "after", "ratio", "KL", "KL, 99 %")
    return [
        head,
        *(
            (
                comparison.kind,
                f"{comparison.windows} x {comparison.window_tokens:,}",
                comparison.start,
                f"{comparison.original.perplexity:.2f}",
                f"{comparison.edited.perplexity:.2f}",
                f"{comparison.perplexity_ratio:.4f}",
                f"{comparison.kl:.4f}",
                f"{comparison.kl_quantiles['0.99']:.3f}",
            )
            for comparison in comparisons
        ),
    ]


# What a row of the second table says, and how it is written.
_SINKS: dict[str, Callable[[Measured], str]] = {
    "first-token attention": lambda one: f"{one.first_token_attention:.4f}",
    "sink rate of the first token": lambda one: f"{one.sink_rate:.4f}",
    "sink rate of any other token": lambda one: "-" if one.sink_rate_other is None else f"{one.sink_rate_other:.4f}",
    "largest |hidden state|": lambda one: f"{one.hidden_state_maximum:,.0f}",
    "M-Act, mean over layers": lambda one: f"{one.massive_activation:,.0f}",
    "int8 error, one scale a window": lambda one: f"{one.int8_error_per_tensor:.3f}",
}


def sink_rows(comparisons: Sequence[Comparison]) -> list[Sequence[object]]:
    """Sinks, activations and what interventions cost, before → after, a column for each kind; the head first."""
    chosen = [comparison for comparison in comparisons if comparison.edited.interventions]
    rows = [(label, *_changes(chosen, write)) for label, write in _SINKS.items()]
    names = dict.fromkeys(name for comparison in chosen for name in comparison.edited.interventions)
    rows += [(f"loss, {name}", *_changes(chosen, partial(_change, name=name))) for name in names]
    return [("before → after", *(comparison.kind for comparison in chosen)), *rows]


def _changes(chosen: Iterable[Comparison], write: Callable[[Measured], str]) -> list[str]:
    return [f"{write(comparison.original)} → {write(comparison.edited)}" for comparison in chosen]


def _change(measured: Measured, name: str) -> str:
    return f"{measured.interventions[name]:+.4f}" if name in measured.interventions else "-"


def markdown_table(rows: Sequence[Sequence[object]]) -> str:
    """A table of rows, of which the first is the head."""
    lines = [[cell(value) for value in row] for row in rows]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
