"""A model's report: every meter on some windows of a text, and the loss before and after interventions."""

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_gated.checkpoints.tokenization import check_token_ids, text_token_ids
from modeling_gated.defaults import INSPECTED_WINDOW_TOKENS, INSPECTED_WINDOWS, INTERVENTIONS
from modeling_gated.errors import InspectionError, UnknownAttention
from modeling_gated.evaluation.text import beginning
from modeling_gated.evaluation.windows import mean_loss, spread_windows
from modeling_gated.inspection.interventions.named import Intervention
from modeling_gated.inspection.meters.activation_meters import LayerActivations, MassiveActivations, QuantizationError
from modeling_gated.inspection.meters.attention_meters import (
    AttentionEntropy,
    EffectiveRank,
    FirstTokenAttention,
    KeyValueNorms,
    SinkRate,
)
from modeling_gated.inspection.meters.gate_meters import GateScores, GateStatistics
from modeling_gated.inspection.watching.gate_hooks import gated_attentions
from modeling_gated.inspection.watching.inspecting import decoder_layers, evaluation_mode, input_device, inspecting
from modeling_gated.inspection.watching.meter import Meter


FORMAT = 1
EPSILON = 0.3
SHORT_WINDOW = 64  # the length at which Gu et al. take the sink rate

Numbers = list[float | None]


@dataclass(frozen=True)
class LossChange:
    """Mean loss, nats per token, under an intervention, and how much more that is than without; None if not finite."""

    name: str
    loss: float | None
    difference: float | None


@dataclass(frozen=True)
class ModelReport:
    """
    What `inspect_model` found. Lists of lists are [layers][heads], lists [layers]; None is what cannot be measured,
    such as the attention of a layer without one. `report.schema.json`, beside this file, explains every field.
    """

    name: str
    model_type: str
    dtype: str
    num_parameters: int
    attn_implementation: str
    num_hidden_layers: int
    max_position_embeddings: int | None
    text: str
    text_tokens: int
    beginning: list[str]
    windows: int
    window_tokens: int
    loss: float
    summary: dict[str, float | None]
    first_token_attention: list[Numbers]
    sink_rate: dict[str, Any]
    sink_rate_short: dict[str, Any]
    attention_entropy: list[Numbers]
    hidden_states: dict[str, Any]
    key_value_norms: dict[str, list[Numbers]]
    effective_rank: list[Numbers]
    int8_error: dict[str, Numbers]
    gates: dict[str, dict[str, Any]]
    interventions: list[LossChange]
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0


def inspect_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    name: str,
    text_name: str = "text",
    windows: int = INSPECTED_WINDOWS,
    window_tokens: int = INSPECTED_WINDOW_TOKENS,
    interventions: Sequence[str] = INTERVENTIONS,
    progress: bool = False,
) -> ModelReport:
    """
    Measure attention sinks, activations and gates of a causal language model on windows of a text.

    Args:
        model: on its device; in evaluation mode meanwhile.
        tokenizer: the model's; each window begins as it begins an input.
        text: of at least two tokens.
        name: what to call the model.
        text_name: what to call the text.
        windows: how many windows, spread evenly over the text; fewer if it has not as many.
        window_tokens: tokens of a window; fewer if the text has not as many.
        interventions: names as `Intervention.parse` takes them; those of gates are left out without gates.
        progress: show a progress bar, on a terminal.

    Raises:
        InspectionError: if the text has less than two tokens, a setting is out of range, activations are not finite,
            or the model's layers are not found.
        TokenizerError: if the tokenizer fails, or gives ids that the model has no embeddings for.
    """
    started = time.perf_counter()
    cut, text_tokens, notes = _cut(model, tokenizer, text, text_name, windows, window_tokens)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    try:
        chosen = _chosen(model, interventions, notes)
        if limit is not None and len(cut[0]) > limit:
            notes.append(f"windows of {len(cut[0])} tokens are longer than max_position_embeddings={limit}")
        with evaluation_mode(model):
            loss, meters, changes = _measured(model, cut, chosen, notes, name if progress else None)
    except InspectionError as error:
        raise type(error)(f"{name}: {error}") from None
    except (IndexError, RuntimeError) as error:
        if limit is None or len(cut[0]) < limit - 2:  # some can't take the last two
            raise
        raise InspectionError(
            f"{name}: does not take windows of {len(cut[0])} tokens, max_position_embeddings={limit}: {error}"
        ) from None
    parts = meters.results(tokenizer)
    return ModelReport(
        name=name,
        model_type=model.config.model_type,
        dtype=str(model.dtype).removeprefix("torch."),
        num_parameters=model.num_parameters(),
        attn_implementation=model.get_decoder().config._attn_implementation,
        num_hidden_layers=len(decoder_layers(model.get_decoder())),
        max_position_embeddings=limit,
        text=text_name,
        text_tokens=text_tokens,
        beginning=[str(tokenizer.convert_ids_to_tokens(token)) for token in beginning(tokenizer)],
        windows=len(cut),
        window_tokens=len(cut[0]),
        loss=loss,
        summary=_summary(parts, getattr(model.config, "gate_activation", "sigmoid")),
        **parts,
        interventions=changes,
        notes=notes,
        seconds=time.perf_counter() - started,
    )


def check_settings(windows: int, window_tokens: int, interventions: Sequence[str]) -> None:
    """
    Check what can be checked without a model.

    Raises:
        InspectionError: for counts that are too small, and interventions that there are none of, or that come twice.
    """
    if windows < 1:
        raise InspectionError(f"windows {windows}: at least 1 is needed")
    if window_tokens < 2:
        raise InspectionError(f"window_tokens {window_tokens}: at least 2 are needed")
    if len(set(interventions)) < len(interventions):
        raise InspectionError(f"interventions {list(interventions)}: needed are different ones")
    for intervention in interventions:
        Intervention.parse(intervention)


def _chosen(model: PreTrainedModel, names: Sequence[str], notes: list[str]) -> list[Intervention]:
    """The interventions that can be made; that their layers and heads exist is seen before anything takes long."""
    chosen = [Intervention.parse(name) for name in names]
    has_gates = any(gated_attentions(decoder_layers(model.get_decoder())))
    if not has_gates:
        notes.append("the model has no gates that are known here")
    elif getattr(model.config, "gate_form", None) == "additive" and any(one.name == "open_gates" for one in chosen):
        notes.append("open_gates was left out: additive gates are not opened by being 1")
        chosen = [one for one in chosen if one.name != "open_gates"]
    chosen = [one for one in chosen if has_gates or not one.needs_gates]
    for one in chosen if has_gates else ():
        if one.needs_gates:
            with one.apply(model):
                pass
    return chosen


def _measured(
    model: PreTrainedModel,
    windows: list[torch.Tensor],
    interventions: list[Intervention],
    notes: list[str],
    title: str | None,
) -> tuple[float, "_Meters", list[LossChange]]:
    total = len(windows) * (1 + len(interventions))
    with tqdm(total=total, desc=title, unit="pass", disable=True if title is None else None) as bar:
        meters = _Meters(with_attention=True)
        try:
            loss = _loss(model, windows, bar, meters.all)
        except UnknownAttention as error:
            notes.append(f"attention was not measured: {error}")
            bar.reset()
            meters = _Meters(with_attention=False)
            loss = _loss(model, windows, bar, meters.all)
        if not math.isfinite(loss):
            raise InspectionError(f"its loss is {loss}")
        changes = []
        for intervention in interventions:
            try:
                with intervention.apply(model):
                    changed = _loss(model, windows, bar, [])
            except UnknownAttention as error:
                notes.append(f"{intervention.name} was left out: {error}")
            else:
                changes.append(LossChange(intervention.name, _number(changed), _number(changed - loss)))
    if meters.with_attention and (without := int(meters.first_token.result().isnan().all(-1).sum())):
        notes.append(f"{without} layers have no attention that is known here; hiding the first token leaves them alone")
    return loss, meters, changes


def _cut(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    text_name: str,
    windows: int,
    window_tokens: int,
) -> tuple[list[torch.Tensor], int, list[str]]:
    """Windows [tokens], the text's own tokens, and notes on what it was too short for."""
    check_settings(windows, window_tokens, ())
    input_ids = text_token_ids(tokenizer, text, text_name, model)
    check_token_ids(tokenizer, beginning(tokenizer), "the beginning of an input", model)
    if len(input_ids) < 2:
        raise InspectionError(f"{text_name}: has {len(input_ids)} tokens; at least 2 are needed")
    begin = len(beginning(tokenizer))
    length = min(window_tokens, len(input_ids) + begin)
    count = min(windows, len(input_ids) // max(1, length - begin))
    notes = []
    if (length, count) != (window_tokens, windows):
        notes.append(
            f"{text_name} has {len(input_ids)} tokens, so that {count} of {windows} windows were taken, of {length} "
            f"of {window_tokens} tokens"
        )
    return spread_windows(input_ids, length, count, beginning(tokenizer)), len(input_ids), notes


@torch.no_grad()
def _loss(model: PreTrainedModel, windows: list[torch.Tensor], bar: tqdm, meters: list[Meter]) -> float:
    """Mean loss in nats per token of all windows, one at a time."""
    with inspecting(model, *meters) if meters else nullcontext():
        return mean_loss(model, [window.to(input_device(model)) for window in windows], advance=bar.update)


class _Meters:
    """Those of a report."""

    def __init__(self, with_attention: bool) -> None:
        self.with_attention = with_attention
        self.first_token, self.entropy = FirstTokenAttention(), AttentionEntropy()
        self.sinks, self.short_sinks = SinkRate(EPSILON), SinkRate(EPSILON, tokens=SHORT_WINDOW)
        self.norms, self.ranks = KeyValueNorms(), EffectiveRank()
        self.maxima, self.int8, self.gates = MassiveActivations(), QuantizationError(), GateScores()

    @property
    def all(self) -> list[Meter]:
        others: list[Meter] = [self.maxima, self.int8, self.gates]
        if not self.with_attention:
            return others
        return [self.first_token, self.entropy, self.sinks, self.short_sinks, self.norms, self.ranks, *others]

    def results(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """The fields of a `ModelReport` that are measured by meters."""
        maxima, int8 = self.maxima.result(), self.int8.result()
        found: dict[str, Any] = {
            "hidden_states": {
                "embeddings": _activations(maxima.embeddings, tokenizer),
                "layers": [_activations(layer, tokenizer) for layer in maxima.layers],
                "final": _activations(maxima.final, tokenizer),
            },
            "int8_error": {"per_tensor": numbers(int8.per_tensor), "per_token": numbers(int8.per_token)},
            "gates": {position: _gates(found) for position, found in self.gates.result().items()},
        }
        if not self.with_attention:
            empty: dict[str, Any] = {
                name: [] for name in ("first_token_attention", "attention_entropy", "effective_rank")
            }
            return found | empty | {"sink_rate": {}, "sink_rate_short": {}, "key_value_norms": {}}
        norms = self.norms.result()
        return found | {
            "first_token_attention": numbers(self.first_token.result()),
            "attention_entropy": numbers(self.entropy.result()),
            "effective_rank": numbers(self.ranks.result()),
            "sink_rate": _sink_rate(self.sinks),
            "sink_rate_short": _sink_rate(self.short_sinks),
            "key_value_norms": {name: numbers(getattr(norms, name)) for name in vars(norms)},
        }


def main_gates(gates: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Those of the attention output, or of the first position that has some; empty without any."""
    return gates.get("G1") or next(iter(gates.values()), {})


def _summary(parts: dict[str, Any], gate_activation: str) -> dict[str, float | None]:
    """One number each: means over layers and heads, but for what is called a maximum."""
    layers = parts["hidden_states"]["layers"]
    gates = main_gates(parts["gates"])
    shares = gates if "sigmoid" in gate_activation else {}  # of others they say nothing
    attention = parts["first_token_attention"]
    by_layer = [mean for layer in attention if (mean := mean_of(layer)) is not None]
    return {
        "first_token_attention": mean_of(attention),
        "first_token_attention_maximum": max(by_layer, default=None),
        "sink_rate": mean_of(parts["sink_rate"].get("first")),
        "sink_rate_other": mean_of(parts["sink_rate"].get("other")),
        "sink_rate_short": mean_of(parts["sink_rate_short"].get("first")),
        "attention_entropy": mean_of(parts["attention_entropy"]),
        "massive_activation": mean_of([layer["maximum"] for layer in layers]),
        "hidden_state_maximum": max(layer["maximum"] for layer in layers),
        "effective_rank": mean_of(parts["effective_rank"]),
        "int8_error_per_tensor": mean_of(parts["int8_error"]["per_tensor"]),
        "int8_error_per_token": mean_of(parts["int8_error"]["per_token"]),
        "gate_score": mean_of(gates.get("mean")),
        "gate_value": mean_of(gates.get("value")),
        "gate_below": mean_of(shares.get("below")),
        "gate_above": mean_of(shares.get("above")),
    }


def mean_of(nested: Any) -> float | None:
    """The mean of all numbers in lists of lists; None without any."""
    flat = torch.tensor([number for number in _flat(nested) if number is not None], dtype=torch.float64)
    return flat.mean().item() if len(flat) else None


def _flat(nested: Any) -> list[Any]:
    if isinstance(nested, list):
        return [number for part in nested for number in _flat(part)]
    return [nested]


def numbers(tensor: torch.Tensor) -> Any:
    """A tensor as lists, with None for NaN."""
    return _without_nan(tensor.tolist())


def _without_nan(nested: Any) -> Any:
    return [_without_nan(part) for part in nested] if isinstance(nested, list) else _number(nested)


def _number(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _activations(layer: LayerActivations, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    # Ids are there, as the windows are given by them.
    top = [asdict(found) | {"token": str(tokenizer.decode(found.token_id or 0))} for found in layer.top]
    return {"maximum": layer.maximum, "median": layer.median, "top": top}


def _sink_rate(meter: SinkRate) -> dict[str, Any]:
    rates = meter.result()
    settings = {"epsilon": meter.epsilon, "tokens": meter.tokens, "min_queries": meter.min_queries}
    return settings | {
        "sequences": rates.sequences,
        "first": numbers(rates.first),
        "other": numbers(rates.other),
    }


def _gates(found: GateStatistics) -> dict[str, Any]:
    return {name: numbers(tensor) for name, tensor in vars(found).items()}
