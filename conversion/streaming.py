"""Running a checkpoint's model one layer at a time, so that memory holds a layer and not the model."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from modeling_gated.checkpoints.checkpoint import Checkpoint
from modeling_gated.errors import ConversionError

from .gates import open_gate_tensor


if TYPE_CHECKING:
    from transformers import PreTrainedModel


_HEAD_ROWS = 8192


class StreamedModel:
    """
    A causal language model of Transformers' or ours whose decoder layers are read when they run and dropped after.

    Args:
        model: the model, on the meta device, with a decoder `model.model` that has `layers`, `norm` and `rotary_emb`,
            as Llama has.
        checkpoint: what its weights are read from.
        dtype: the dtype to compute in.
    """

    def __init__(self, model: "PreTrainedModel", checkpoint: Checkpoint, dtype: torch.dtype):
        self.decoder, self.config, self.dtype = model.model, model.config, dtype
        self.tensors = checkpoint.tensors()
        self.directory = checkpoint.directory
        self._load(self.decoder.norm, "model.norm")
        self.decoder.rotary_emb = type(self.decoder.rotary_emb)(self.config)  # its frequencies are in no checkpoint
        self.decoder.embed_tokens = nn.Identity()
        self.decoder.eval()

    @torch.no_grad()
    def hidden_states(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return hidden states [seq, hidden_size] in `dtype`, before the head, for token ids [seq] of one sequence."""
        (hidden_states,) = self.run({"inputs_embeds": self.embed(tokens)[None], "use_cache": False})
        return hidden_states[0]

    @torch.no_grad()
    def run(self, *calls: dict[str, Any]) -> list[torch.Tensor]:
        """
        Return the last hidden states, after the final norm, of several calls of the decoder that share each layer's
        weights, so that these are read once for all calls.

        Args:
            calls: keyword arguments of the decoder's forward, each with `inputs_embeds` [batch, seq, hidden_size].
        """
        layer_calls = [self._layer_calls(call) for call in calls]
        states = [call["inputs_embeds"] for call in calls]
        for number, layer in enumerate(self.decoder.layers):
            self._load(layer, f"model.layers.{number}")
            states = [
                layer(hidden, *recorders[number].arguments, **recorders[number].keywords)
                for hidden, recorders in zip(states, layer_calls, strict=True)
            ]
            layer.to("meta")
        return [self.decoder.norm(hidden) for hidden in states]

    def _layer_calls(self, call: dict[str, Any]) -> "list[_Recorder]":
        """Return what the decoder's own forward gives each layer beside hidden states: masks, positions, cache."""
        layers = self.decoder.layers
        recorders = [_Recorder() for _ in layers]
        self.decoder.layers = nn.ModuleList(recorders)
        try:
            self.decoder(**call)
        finally:
            self.decoder.layers = layers
        return recorders

    @torch.no_grad()
    def logits(self, hidden_states: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield float32 logits [seq, rows] for hidden states [seq, hidden_size], some thousands of rows at a time."""
        # As Transformers does, a stored head goes before the tie.
        is_tied = self.config.tie_word_embeddings and "lm_head.weight" not in self.tensors
        name = "model.embed_tokens.weight" if is_tied else "lm_head.weight"
        for start in range(0, self.config.vocab_size, _HEAD_ROWS):
            yield F.linear(hidden_states, self._read(name, start, start + _HEAD_ROWS)).float()

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return embeddings [..., hidden_size], in `dtype`, of token ids [...]."""
        used, where = tokens.unique(return_inverse=True)
        rows = [self._read("model.embed_tokens.weight", token, token + 1) for token in used.tolist()]
        return torch.cat(rows)[where]

    def _load(self, module: nn.Module, prefix: str) -> None:
        values = {}
        for name, empty in module.state_dict().items():
            if ".g_proj." in name and f"{prefix}.{name}" not in self.tensors:  # gates that are missing are open
                values[name] = open_gate_tensor(name, tuple(empty.shape), self.config.gate_init, self.dtype)
            else:
                values[name] = self._read(f"{prefix}.{name}")
        module.load_state_dict(values, assign=True)

    def _read(self, name: str, first: int = 0, last: int | None = None) -> torch.Tensor:
        if name not in self.tensors:
            raise ConversionError(f"{self.directory}: {name} is in no shard")
        return self.tensors[name][0].read(name, first, last).to(self.dtype)


class _Recorder(nn.Module):
    """Stands for a decoder layer, keeps the arguments of its call and returns the hidden states as they are."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def forward(self, hidden_states: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
        self.arguments, self.keywords = arguments, keywords
        return hidden_states


class LogitsComparison:
    """
    Two models' logits over the same tokens, by what a reader asks of them.

    `max_difference` is the largest |Δ| of two logits, `max_logit` the first model's largest magnitude, `kl_divergence`
    the mean over tokens of KL(first ‖ second) in nats, `top1_agreement` the share of tokens whose likeliest
    continuation is the same.
    """

    def __init__(self, first: StreamedModel, second: StreamedModel, tokens: torch.Tensor):
        hidden = first.hidden_states(tokens), second.hidden_states(tokens)
        self.max_difference = self.max_logit = self.kl_divergence = 0.0
        log_sums = [torch.full((len(tokens),), -torch.inf) for _ in hidden]
        best = [(torch.full((len(tokens),), -torch.inf), torch.zeros(len(tokens), dtype=torch.long)) for _ in hidden]
        start = 0
        for pair in zip(first.logits(hidden[0]), second.logits(hidden[1]), strict=True):
            difference = (pair[0] - pair[1]).abs().max().item()
            self.max_difference = max(self.max_difference, difference) if difference == difference else torch.nan
            self.max_logit = max(self.max_logit, pair[0].abs().max().item())
            for which, logits in enumerate(pair):
                log_sums[which] = torch.logaddexp(log_sums[which], logits.logsumexp(-1))
                value, index = logits.max(-1)
                known, where = best[which]
                best[which] = torch.maximum(known, value), torch.where(value > known, index + start, where)
            start += pair[0].shape[-1]
        self.top1_agreement = (best[0][1] == best[1][1]).float().mean().item()
        if self.max_difference:
            for first_logits, second_logits in zip(first.logits(hidden[0]), second.logits(hidden[1]), strict=True):
                log_p, log_q = first_logits - log_sums[0][:, None], second_logits - log_sums[1][:, None]
                self.kl_divergence += (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
