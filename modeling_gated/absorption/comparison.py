"""Comparison of an edited model with its source model on held-out text."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn import functional
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_gated.evaluation.text import beginning
from modeling_gated.evaluation.windows import mean_loss, spread_windows
from modeling_gated.inspection import FirstTokenAttention, MassiveActivations, QuantizationError, SinkRate, inspecting
from modeling_gated.inspection.interventions.named import Intervention
from modeling_gated.inspection.numbers import mean_of, numbers
from modeling_gated.inspection.watching.inspecting import input_device

from .texts import Text, special_start


# Interventions that cost more in models with sinks and massive activations.
INTERVENTIONS = ("masked_first_token@64", "window=128", "window=128+4", "int8_weights", "int8_activations")
# Interventions that cost predictions only if gates replace the function of sinks.
GATE_INTERVENTIONS = ("shuffled_gates", "open_gates")
QUANTILES = (0.5, 0.9, 0.99)
PLAIN, SPECIAL = "plain", "special token"
# Number of tokens whose logits are in memory at once.
_LOGITS = 512


@dataclass(frozen=True)
class Windows:
    """
    Held-out windows of one kind of text.

    Attributes:
        kind: name of the kind of text.
        start: `PLAIN` for windows from the middle of the text, `SPECIAL` for windows after a special token.
        windows: token ids [tokens] of each window.
    """

    kind: str
    start: str
    windows: list[torch.Tensor]

    @property
    def length(self) -> int:
        """Return the length of a window in tokens."""
        return len(self.windows[0])


@dataclass(frozen=True)
class Measured:
    """
    Measurements of a model on one kind of windows.

    Attributes:
        loss: mean loss in nats per token.
        first_token_attention: attention to the first token (F-Attn), mean over layers and heads.
        sink_rate: sink rate of the first token, mean over layers and heads.
        sink_rate_other: sink rate of any other token, mean over layers and heads; None in windows that are too short.
        hidden_state_maximum: largest |hidden state|.
        massive_activation: largest |hidden state| of a layer, mean over layers (M-Act).
        int8_error_per_tensor: relative error of hidden states rounded to int8, with one scale per window.
        int8_error_per_token: relative error of hidden states rounded to int8, with one scale per token.
        interventions: change of the loss in nats per token by name of the intervention.
    """

    loss: float
    first_token_attention: float
    sink_rate: float
    sink_rate_other: float | None
    hidden_state_maximum: float
    massive_activation: float
    int8_error_per_tensor: float
    int8_error_per_token: float
    interventions: dict[str, float]

    @property
    def perplexity(self) -> float:
        """Return exp(loss)."""
        return math.exp(self.loss)


@dataclass(frozen=True)
class Comparison:
    """
    Comparison of an edited model with its source model on one kind of windows.

    Attributes:
        kind: name of the kind of text.
        start: beginning of the windows, as in `Windows`.
        windows: number of windows.
        window_tokens: length of a window in tokens.
        original: measurements of the source model.
        edited: measurements of the edited model.
        kl: mean of KL(source || edited) in nats per token.
        kl_quantiles: quantiles of the KL divergence over tokens, by name, such as "0.99".
        kl_by_position: mean KL divergence over each eighth of a window.
        loss_by_position: mean loss of the edited model minus the source model's over each eighth of a window.
    """

    kind: str
    start: str
    windows: int
    window_tokens: int
    original: Measured
    edited: Measured
    kl: float
    kl_quantiles: dict[str, float]
    kl_by_position: list[float]
    loss_by_position: list[float]

    @property
    def perplexity_ratio(self) -> float:
        """Return the edited model's perplexity divided by the source model's."""
        return math.exp(self.edited.loss - self.original.loss)

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON values."""
        return asdict(self) | {"perplexity_ratio": self.perplexity_ratio}


def compare(
    original: PreTrainedModel,
    edited: PreTrainedModel,
    windows: Windows,
    *,
    interventions: Sequence[str] = (),
    examined: int = 4,
    progress: bool = False,
) -> Comparison:
    """
    Measure two models on the same windows.

    Args:
        original: source model, in evaluation mode.
        edited: edited model with the same vocabulary, in evaluation mode.
        windows: windows to measure on.
        interventions: names of interventions, as in `gated-llama inspect`. Interventions on gates apply to the edited
            model only.
        examined: number of windows for meters and interventions, which are slow. Losses use all windows.
        progress: show a progress bar, on a terminal.

    Raises:
        InspectionError: if an intervention is unknown.
    """
    some = Windows(windows.kind, windows.start, windows.windows[:examined])
    unmetered = Windows(windows.kind, windows.start, windows.windows[examined:])
    bar = tqdm(
        total=2 * (len(windows.windows) + len(some.windows) * len(interventions)),
        desc=f"measuring {windows.kind}, {windows.length} tokens, {windows.start}",
        unit="pass",
        leave=False,
        disable=None if progress else True,
    )
    with bar:
        both, meters = (original, edited), (_Meters(), _Meters())
        hidden = [
            _hidden_states(model, some, bar, model_meters) + _hidden_states(model, unmetered, bar, None)
            for model, model_meters in zip(both, meters, strict=True)
        ]
        divergences, losses = _token_losses(original, edited, windows, *hidden)
        del hidden
        measurements = []
        for model, model_meters, loss in zip(both, meters, losses, strict=True):
            changes = {}
            for name in interventions:
                intervention = Intervention.parse(name)
                if not (intervention.needs_gates and model is original):
                    with intervention.apply(model):
                        changes[name] = _loss(model, some, bar) - loss[: len(some.windows)].mean().item()
            measurements.append(model_meters.result(loss.mean().item(), changes))
    quantiles = torch.quantile(divergences.flatten(), torch.tensor(QUANTILES, dtype=divergences.dtype))
    return Comparison(
        kind=windows.kind,
        start=windows.start,
        windows=len(windows.windows),
        window_tokens=windows.length,
        original=measurements[0],
        edited=measurements[1],
        kl=divergences.mean().item(),
        kl_quantiles={f"{quantile:g}": value for quantile, value in zip(QUANTILES, quantiles.tolist(), strict=True)},
        kl_by_position=_by_position(divergences),
        loss_by_position=_by_position(losses[1] - losses[0]),
    )


def prove(
    original: PreTrainedModel,
    edited: PreTrainedModel,
    texts: Sequence[Text],
    tokenizer: PreTrainedTokenizerBase,
    *,
    windows: int = 16,
    progress: bool = False,
) -> list[Comparison]:
    """
    Compare two models on the held-out part of every text, at several lengths.

    Windows of 512 tokens are measured with and without a special token first. Windows of 2,048 tokens, and of the
    source model's maximum length, begin like an input of the tokenizer. Lengths beyond a held-out text are skipped.

    Args:
        original: source model, in evaluation mode.
        edited: edited model with the same vocabulary, in evaluation mode.
        texts: texts, of which the held-out parts are used.
        tokenizer: tokenizer of both models.
        windows: number of windows of 512 tokens per text. There are a quarter as many of 2,048 tokens, at least one,
            and a sixteenth, rounded down, at the maximum length.
        progress: show progress bars, on a terminal.

    Returns:
        Comparisons by length, text and beginning.
    """
    limit = original.config.max_position_embeddings
    starts: dict[str, list[int]] = {PLAIN: []} | ({SPECIAL: start} if (start := special_start(tokenizer)) else {})
    usual = SPECIAL if beginning(tokenizer) else PLAIN
    comparisons = []
    short = min(512, limit)
    for length, count in ({limit: windows // 16, min(2048, limit): max(1, windows // 4)} | {short: windows}).items():
        for text in texts:
            for name, start in starts.items() if length == short else [(usual, starts[usual])]:
                cut = Windows(text.kind, name, spread_windows(text.held_out, length, count, start))
                changes = INTERVENTIONS + GATE_INTERVENTIONS if (length, name) == (short, usual) else ()
                if cut.windows:
                    comparisons.append(compare(original, edited, cut, interventions=changes, progress=progress))
    return comparisons


class _Meters:
    def __init__(self) -> None:
        self.first_token, self.sinks = FirstTokenAttention(), SinkRate()
        self.maxima, self.int8 = MassiveActivations(top=1), QuantizationError()

    def result(self, loss: float, interventions: dict[str, float]) -> Measured:
        sinks, maxima, int8 = self.sinks.result(), self.maxima.result(), self.int8.result()
        return Measured(
            loss=loss,
            first_token_attention=self.first_token.result().nanmean().item(),
            sink_rate=sinks.first.nanmean().item(),
            sink_rate_other=mean_of(numbers(sinks.other)),
            hidden_state_maximum=max(layer.maximum for layer in maxima.layers),
            massive_activation=maxima.mean_maximum,
            int8_error_per_tensor=int8.per_tensor.nanmean().item(),
            int8_error_per_token=int8.per_token.nanmean().item(),
            interventions=interventions,
        )


@torch.no_grad()
def _hidden_states(model: PreTrainedModel, windows: Windows, bar: tqdm, meters: _Meters | None) -> list[torch.Tensor]:
    """Return the last hidden states of each window, [tokens, hidden_size]."""
    shown = [] if meters is None else [meters.first_token, meters.sinks, meters.maxima, meters.int8]
    states = []
    with inspecting(model, *shown) if shown else nullcontext():
        for window in windows.windows:
            input_ids = window[None].to(input_device(model))
            states.append(model.base_model(input_ids, use_cache=False).last_hidden_state[0])
            bar.update()
    return states


@torch.no_grad()
def _token_losses(
    original: Any, edited: Any, windows: Windows, hidden: list[torch.Tensor], edited_hidden: list[torch.Tensor]
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Return KL divergences and both models' losses of each predicted token, float64 [windows, tokens - 1]."""
    rows: list[list[torch.Tensor]] = [[], [], []]
    for window, *states in zip(windows.windows, hidden, edited_hidden, strict=True):
        for labels, ours, theirs in zip(
            window[1:].split(_LOGITS), states[0][:-1].split(_LOGITS), states[1][:-1].split(_LOGITS), strict=True
        ):
            log_original, log_edited = (
                functional.log_softmax(model.get_output_embeddings()(window_states).float(), dim=-1).cpu()
                for model, window_states in ((original, ours), (edited, theirs))
            )
            rows[0].append(functional.kl_div(log_edited, log_original, reduction="none", log_target=True).sum(-1))
            for kept, predicted in zip(rows[1:], (log_original, log_edited), strict=True):
                kept.append(-predicted.gather(-1, labels[:, None]).squeeze(-1))
    divergences, *losses = (torch.cat(parts).double().view(len(windows.windows), -1) for parts in rows)
    return divergences, (losses[0], losses[1])


def _loss(model: PreTrainedModel, windows: Windows, bar: tqdm) -> float:
    return mean_loss(model, [window.to(input_device(model)) for window in windows.windows], advance=bar.update)


def _by_position(values: torch.Tensor) -> list[float]:
    return [segment.mean().item() for segment in values.tensor_split(8, dim=1)]
