"""A model's report: every meter on some windows of a text, and the loss before and after interventions."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
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
from modeling_gated.inspection.meters import REPORT_METERS, FirstTokenAttention
from modeling_gated.inspection.numbers import finite_or_none
from modeling_gated.inspection.watching.gate_hooks import gated_attentions
from modeling_gated.inspection.watching.inspecting import decoder_layers, evaluation_mode, input_device, inspecting
from modeling_gated.inspection.watching.meter import ATTENTION, Meter, SummaryRow


FORMAT = 1


@dataclass(frozen=True)
class LossChange:
    """Mean loss, nats per token, under an intervention, and how much more that is than without; None if not finite."""

    name: str
    loss: float | None
    difference: float | None


@dataclass(frozen=True)
class ModelReport:
    """
    The result of `inspect_model`. A meter's entry is an attribute by its name: `report.first_token_attention`. In it
    lists of lists are [layers][heads], lists [layers]; None is what cannot be measured, such as the attention of a
    layer without one. `report.schema.json`, in `modeling_gated/inspection`, explains every field.
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
    entries: dict[str, Any]
    interventions: list[LossChange]
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    meters: tuple[type[Meter], ...] = REPORT_METERS

    def __getattr__(self, name: str) -> Any:
        entries = self.__dict__.get("entries", {})
        if name not in entries:
            raise AttributeError(f"{name}: is no field of the report, and no entry of its meters {list(entries)}")
        return entries[name]

    @property
    def summary_rows(self) -> Iterator[SummaryRow]:
        """Its meters' lines in a table of its summary."""
        return (row for meter in self.meters for row in meter.summary_rows)

    def as_dict(self) -> dict[str, Any]:
        """Return what report.json holds of the model, its meters' entries by their names."""
        values = {name: getattr(self, name) for name in _FIELDS}
        return values | {"interventions": [asdict(change) for change in self.interventions]} | self.entries


_FIELDS = tuple(part.name for part in fields(ModelReport) if part.name not in ("entries", "meters"))


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
    meters: Sequence[type[Meter]] = REPORT_METERS,
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
        meters: with names of their own (`report_name`), by which the report has their entries.
        progress: show a progress bar, on a terminal.

    Raises:
        ValueError: if a meter's name is missing, taken by another, or that of a field of the report.
        InspectionError: if the text has less than two tokens, a setting is out of range, activations are not finite,
            or the model's layers are not found.
        TokenizerError: if the tokenizer fails, or gives ids that the model has no embeddings for.
    """
    started = time.perf_counter()
    _check_names(meters)
    cut, text_tokens, notes = _cut(model, tokenizer, text, text_name, windows, window_tokens)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    try:
        chosen = _chosen(model, interventions, notes)
        if limit is not None and len(cut[0]) > limit:
            notes.append(f"windows of {len(cut[0])} tokens are longer than max_position_embeddings={limit}")
        with evaluation_mode(model):
            loss, entries, changes = _measured(model, tokenizer, cut, meters, chosen, notes, name if progress else None)
    except InspectionError as error:
        raise type(error)(f"{name}: {error}") from None
    except (IndexError, RuntimeError) as error:
        if limit is None or len(cut[0]) < limit - 2:  # some can't take the last two
            raise
        raise InspectionError(
            f"{name}: does not take windows of {len(cut[0])} tokens, max_position_embeddings={limit}: {error}"
        ) from None
    summaries = [meter.summary(entries[meter.report_name], model.config) for meter in meters]
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
        summary={key: number for summary in summaries for key, number in summary.items()},
        entries=entries,
        interventions=changes,
        notes=notes,
        seconds=time.perf_counter() - started,
        meters=tuple(meters),
    )


def check_settings(windows: int, window_tokens: int, interventions: Sequence[str]) -> None:
    """
    Check what can be checked without a model.

    Raises:
        InspectionError: for counts that are too small, and interventions that there are none of, or that come twice.
    """
    if windows < 1:
        raise InspectionError(f"windows must be at least 1, got {windows}")
    if window_tokens < 2:
        raise InspectionError(f"window_tokens must be at least 2, got {window_tokens}")
    if len(set(interventions)) < len(interventions):
        raise InspectionError(f"interventions must be different, got {list(interventions)}")
    for intervention in interventions:
        Intervention.parse(intervention)


def _chosen(model: PreTrainedModel, names: Sequence[str], notes: list[str]) -> list[Intervention]:
    """Return the interventions that can be made, after checking that their layers and heads exist."""
    chosen = [Intervention.parse(name) for name in names]
    has_gates = any(gated_attentions(decoder_layers(model.get_decoder())))
    if not has_gates:
        notes.append("the model has no gates that are known here")
    chosen = [intervention for intervention in chosen if has_gates or not intervention.needs_gates]
    if has_gates and getattr(model.config, "gate_form", None) == "additive":
        without = [intervention for intervention in chosen if intervention.name != "open_gates"]
        if without != chosen:
            notes.append("open_gates was left out: additive gates are not opened by being 1")
        chosen = without
    for intervention in chosen:
        if intervention.needs_gates:
            with intervention.apply(model):
                pass
    return chosen


def _check_names(meters: Sequence[type[Meter]]) -> None:
    taken = {*dir(ModelReport), *(part.name for part in fields(ModelReport))}
    for meter in meters:
        name = meter.report_name
        if not name.isidentifier() or name in taken:
            raise ValueError(f"{meter.__name__}.report_name={name!r}: must be a name that nothing else in a report has")
        taken.add(name)


def _measured(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    windows: list[torch.Tensor],
    meter_classes: Sequence[type[Meter]],
    interventions: list[Intervention],
    notes: list[str],
    title: str | None,
) -> tuple[float, dict[str, Any], list[LossChange]]:
    """Return the loss, the meters' entries by their names, and the loss under each intervention."""
    total = len(windows) * (1 + len(interventions))
    with tqdm(total=total, desc=title, unit="pass", disable=True if title is None else None) as bar:
        meters = [meter_class() for meter_class in meter_classes]
        entries = {}
        try:
            loss = _loss(model, windows, bar, meters)
        except UnknownAttention as error:
            notes.append(f"attention was not measured: {error}")
            bar.reset()
            entries = {meter.report_name: meter.entry_without_attention for meter in meters}
            meters = [meter_class() for meter_class in meter_classes if not meter_class.overrides(*ATTENTION)]
            loss = _loss(model, windows, bar, meters)
        if not math.isfinite(loss):
            raise InspectionError(f"its loss is {loss}")
        entries |= {meter.report_name: meter.report_entry(tokenizer) for meter in meters}
        changes = []
        for intervention in interventions:
            try:
                with intervention.apply(model):
                    changed = _loss(model, windows, bar, [])
            except UnknownAttention as error:
                notes.append(f"{intervention.name} was left out: {error}")
            else:
                changes.append(LossChange(intervention.name, finite_or_none(changed), finite_or_none(changed - loss)))
    heads_by_layer = entries.get(FirstTokenAttention.report_name, [])
    if without := sum(all(number is None for number in heads) for heads in heads_by_layer):
        notes.append(f"{without} layers have no attention that is known here; hiding the first token leaves them alone")
    return loss, entries, changes


def _cut(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    text_name: str,
    windows: int,
    window_tokens: int,
) -> tuple[list[torch.Tensor], int, list[str]]:
    """Return windows [tokens], the text's own tokens, and notes on what it was too short for."""
    check_settings(windows, window_tokens, ())
    input_ids = text_token_ids(tokenizer, text, text_name, model)
    check_token_ids(tokenizer, beginning(tokenizer), "the beginning of an input", model)
    if len(input_ids) < 2:
        raise InspectionError(f"{text_name}: must have at least 2 tokens, got {len(input_ids)}")
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
    """Return mean loss in nats per token of all windows, one at a time."""
    with inspecting(model, *meters) if meters else nullcontext():
        return mean_loss(model, [window.to(input_device(model)) for window in windows], advance=bar.update)
