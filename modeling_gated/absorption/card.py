"""Model card of a checkpoint without attention sinks, with measured differences from the base model."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from modeling_gated.conversion.card import card_metadata, cell

from .comparison import Comparison, Measured
from .result import Absorption


_SUMMARY = (
    " without attention sinks and massive activations. Attention output gates "
    "([arXiv 2505.06708](https://arxiv.org/abs/2505.06708)) replace the function of the sinks. The gates were fitted "
    "to the base model, and the result was distilled from the base model. Predictions are close to the base model's, "
    "but not the same."
)
_ABLATION = (
    ", edited as an ablation: steps were left out that remove attention sinks and massive activations. The model "
    "serves as a baseline for comparisons."
)
_DEFINITIONS = (
    "An attention sink is a token, usually the first, that receives a large share of the attention. A massive "
    "activation is a hidden state above 100 and about 1,000 times the median."
)

# Settings that ablations turn off.
_STEPS = ("removes_writers", "edits_keys", "edits_gates", "trains_gates")


def absorption_card(done: Absorption, directory: Path, origin: Mapping[str, str]) -> str:
    """
    Return the model card, the content of README.md with metadata for the hub.

    Args:
        done: record of the run.
        directory: directory of the source checkpoint. Its card supplies license, language and base model.
        origin: rows on the origin of the checkpoint, such as the command that wrote it.
    """
    layers, gated = done.layers, sum(any(layer.gated) for layer in done.layers)
    source, settings = done.identity.source, done.identity.settings
    is_whole = all(getattr(settings, step) for step in _STEPS)
    rows = {
        "base model": source.name,
        "revision": source.revision or "not known (a local path)",
        **origin,
        "gates fitted": f"in {gated} of {len(layers)} layers",
        "removed neurons that wrote massive activations": ", ".join(
            f"{writer.neuron} of layer {writer.layer}" for writer in done.writers
        )
        or "none",
        "distilled on": f"{done.distilled_tokens:,} tokens",
        "computed in": f"{str(done.identity.dtype).removeprefix('torch.')}, matmuls in {done.identity.matmul_dtype}",
        "seed": settings.seed,
    }
    longest = max((comparison.window_tokens for comparison in done.comparisons), default=0)
    return f"""---
{card_metadata(source, directory)}
---

# {cell(done.output.name)}

{cell(source.name)}{_SUMMARY if is_whole else _ABLATION}

{_DEFINITIONS}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "..."  # this directory, or its name on the hub
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
```

`trust_remote_code=True` is not needed after `import modeling_gated`. The model loads, serves and fine-tunes like any
other gated model.

## Changes

{markdown_table([("", ""), *rows.items()])}

## Measured differences

Both models were measured on held-out text.

{markdown_table(quality_rows(done.comparisons))}

- windows: number of windows x tokens per window.
- start: windows begin in the middle of the text (plain) or after a special token.
- perplexity: perplexity of the base model.
- after: perplexity of this model.
- ratio: perplexity of this model / perplexity of the base model.
- KL: mean of KL(base model || this model) over tokens, in nats.
- KL 99 %: 99th percentile of this divergence over tokens.

The second table has a column per text. Each cell is base model → this model.

{markdown_table(sink_rows(done.comparisons))}

- first-token attention: mean over queries, layers and heads (F-Attn).
- sink rate: share of windows and heads in which a token receives more than 30 % of the attention.
- largest |hidden state|: maximum over layers. M-Act is the mean of the layers' maxima.
- int8 error: relative error of hidden states rounded to int8, mean over tokens.
- loss, NAME: change of the loss under an intervention, in nats per token.

| intervention | change to the model |
| --- | --- |
| masked_first_token@64 | the first token is hidden from tokens more than 64 tokens later |
| window=128 | each token sees the last 128 tokens |
| window=128+4 | each token sees the last 128 tokens and the first 4 |
| int8_weights, int8_activations | weights or activations are rounded to int8 |
| shuffled_gates | the gates of each layer are permuted over tokens |
| open_gates | all gates are 1 |

## Limits

- The tables show how far predictions differ from the base model's. Other kinds of text were not measured.
- The longest measured windows have {longest:,} tokens.
- Some attention to sinks can remain, as the second table shows.

`absorption.json` has all measurements, settings and versions.
"""


def quality_rows(comparisons: Sequence[Comparison]) -> list[Sequence[object]]:
    """Return the table of perplexities and KL divergences, headings first."""
    head = ("text", "windows", "start", "perplexity", "after", "ratio", "KL", "KL 99 %")
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


# Label and format of each row in the table of sinks.
_SINKS: dict[str, Callable[[Measured], str]] = {
    "first-token attention": lambda model: f"{model.first_token_attention:.4f}",
    "sink rate of the first token": lambda model: f"{model.sink_rate:.4f}",
    "sink rate of any other token": (
        lambda model: "-" if model.sink_rate_other is None else f"{model.sink_rate_other:.4f}"
    ),
    "largest |hidden state|": lambda model: f"{model.hidden_state_maximum:,.0f}",
    "M-Act, mean over layers": lambda model: f"{model.massive_activation:,.0f}",
    "int8 error, one scale per window": lambda model: f"{model.int8_error_per_tensor:.3f}",
}


def sink_rows(comparisons: Sequence[Comparison]) -> list[Sequence[object]]:
    """
    Return the table of sinks, activations and interventions, headings first.

    Each kind of text has a column. Each cell is the base model's value → the edited model's value.
    """
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
    """Return a Markdown table of rows, headings first."""
    lines = [[cell(value) for value in row] for row in rows]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
