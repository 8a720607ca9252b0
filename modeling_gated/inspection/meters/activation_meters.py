"""Meters of how large activations are, and of what that costs."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from modeling_gated.errors import InspectionError
from modeling_gated.inspection.numbers import Numbers, mean_of, numbers
from modeling_gated.inspection.watching.meter import LayerMeans, Meter, SummaryRow
from modeling_gated.inspection.watching.tokens import Tokens


_MEDIAN_TOKENS = 512  # a median takes a hundred times as long as a maximum


@dataclass(frozen=True)
class Activation:
    """One number of a hidden state: its value, the channel, and the token, by its place in its sequence and its id."""

    value: float
    channel: int
    position: int
    token_id: int | None


@dataclass(frozen=True)
class LayerActivations:
    """
    What a layer gives: the largest numbers by magnitude, and the median magnitude: of every n-th token, so that there
    are at most 512 in a pass, mean over passes.
    """

    top: tuple[Activation, ...]
    median: float

    @property
    def maximum(self) -> float:
        """The largest magnitude, the paper's M-Act of a layer."""
        return abs(self.top[0].value)


@dataclass(frozen=True)
class HiddenMaxima:
    """Largest activations of the embeddings, of each layer's output, and of the last norm's output."""

    embeddings: LayerActivations
    layers: tuple[LayerActivations, ...]
    final: LayerActivations

    @property
    def mean_maximum(self) -> float:
        """The paper's M-Act (arXiv 2505.06708, Table 4): the layers' largest magnitudes, mean over layers."""
        return sum(layer.maximum for layer in self.layers) / len(self.layers)


class MassiveActivations(Meter):
    """The largest |hidden state| of each layer, with channel and token (Sun et al., arXiv 2402.17762)."""

    report_name = "hidden_states"
    summary_rows = (
        SummaryRow(
            "massive_activation",
            "massive activation",
            "M-Act: the largest |hidden| of a layer, mean over layers",
            "{:,.0f}",
        ),
        SummaryRow("hidden_state_maximum", "largest |hidden|", "of all layers", "{:,.0f}"),
    )

    def __init__(self, top: int = 3) -> None:
        self.top = top

    def start(self, layers: int) -> None:
        self._layers, self._medians = layers, LayerMeans()
        self._top: dict[int, list[Activation]] = {layer: [] for layer in range(-1, layers + 1)}

    def hidden_states(self, layer: int, hidden_states: torch.Tensor, tokens: Tokens) -> None:
        where = tokens.current.nonzero()  # [real tokens, 2]
        if not len(where):
            return
        states = hidden_states[tokens.current]
        magnitudes = states.abs().float()
        # They are in the tokens with the largest maxima, which are found much sooner than they are.
        rows = magnitudes.amax(-1).topk(min(self.top, len(states))).indices
        largest = magnitudes[rows].flatten().topk(self.top).indices
        self._top[layer] += list(self._activations(states[rows], where[rows], largest, tokens))
        self._top[layer] = sorted(self._top[layer], key=lambda activation: -abs(activation.value))[: self.top]
        # One row more than there are layers, and the embeddings first.
        sample = magnitudes[:: len(magnitudes) // _MEDIAN_TOKENS + 1]
        self._medians.add(layer + 1, sample.median().reshape(1), 1)

    def _activations(
        self, states: torch.Tensor, where: torch.Tensor, largest: torch.Tensor, tokens: Tokens
    ) -> Iterator[Activation]:
        for index in largest.tolist():
            row, channel = divmod(index, states.shape[1])
            sequence, place = where[row].tolist()
            number = place + tokens.offset
            token_id = None if tokens.input_ids is None else int(tokens.input_ids[sequence, place])
            position = number - int(tokens.starts[sequence, number])
            yield Activation(states[row, channel].item(), channel, position, token_id)

    def result(self) -> HiddenMaxima:
        """
        Raises:
            InspectionError: if there was no forward pass.
        """
        if not self._top[-1]:
            raise InspectionError("there was no forward pass to find activations in")
        medians = self._medians.result(self._layers + 2).flatten().tolist()
        embeddings, *layers, final = (
            LayerActivations(tuple(top), median) for top, median in zip(self._top.values(), medians, strict=True)
        )
        return HiddenMaxima(embeddings, tuple(layers), final)

    def report_entry(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        maxima = self.result()
        return {
            "embeddings": _activations_entry(maxima.embeddings, tokenizer),
            "layers": [_activations_entry(layer, tokenizer) for layer in maxima.layers],
            "final": _activations_entry(maxima.final, tokenizer),
        }

    @staticmethod
    def summary(entry: dict[str, Any], config: PreTrainedConfig) -> dict[str, float | None]:
        maxima = [layer["maximum"] for layer in entry["layers"]]
        return {"massive_activation": mean_of(maxima), "hidden_state_maximum": max(maxima)}


def _activations_entry(layer: LayerActivations, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    # Ids are there, as the windows are given by them.
    top = [asdict(activation) | {"token": str(tokenizer.decode(activation.token_id or 0))} for activation in layer.top]
    return {"maximum": layer.maximum, "median": layer.median, "top": top}


@dataclass(frozen=True)
class Int8Errors:
    """Relative errors of each layer's output, [layers], float64, with one scale for a sequence, and one per token."""

    per_tensor: torch.Tensor
    per_token: torch.Tensor


class QuantizationError(Meter):
    """
    What rounding hidden states to int8 and back loses: ||x - round trip of x|| / ||x|| of each token, mean over tokens.
    Symmetric, scale = max |x| / 127, either over a whole sequence (per tensor), whose one massive activation makes all
    other numbers coarse, or over a token.
    """

    report_name = "int8_error"
    summary_rows = (
        SummaryRow(
            "int8_error_per_tensor", "int8 error", "share of a hidden state lost, one scale for a window", "{:.3f}"
        ),
    )

    def start(self, layers: int) -> None:
        self._layers, self._tensor, self._token = layers, LayerMeans(), LayerMeans()

    def hidden_states(self, layer: int, hidden_states: torch.Tensor, tokens: Tokens) -> None:
        if not 0 <= layer < self._layers:
            return
        for states, real in zip(hidden_states, tokens.current, strict=True):
            states = states[real].float()
            if len(states) == 0:
                continue
            for means, largest in ((self._tensor, states.abs().amax()), (self._token, states.abs().amax(-1, True))):
                means.add(layer, _relative_errors(states, largest / 127).sum().reshape(1), len(states))

    def result(self) -> Int8Errors:
        return Int8Errors(self._tensor.result(self._layers).flatten(), self._token.result(self._layers).flatten())

    def report_entry(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Numbers]:
        return {scale: numbers(errors) for scale, errors in vars(self.result()).items()}

    @staticmethod
    def summary(entry: dict[str, Numbers], config: PreTrainedConfig) -> dict[str, float | None]:
        return {f"int8_error_{scale}": mean_of(errors) for scale, errors in entry.items()}


def _relative_errors(states: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    scale = scale.clamp_min(torch.finfo(states.dtype).tiny)
    lost = torch.linalg.vector_norm(states - (states / scale).round() * scale, dim=-1)
    return lost / torch.linalg.vector_norm(states, dim=-1).clamp_min(torch.finfo(states.dtype).tiny)
