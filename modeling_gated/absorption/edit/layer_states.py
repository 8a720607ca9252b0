"""Hidden states of windows between two layers of a model, so that a layer can be edited on its own input."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from modeling_gated.absorption.bfloat16_matmuls import matmuls_in_bfloat16
from modeling_gated.kv_cache import cache_argument

from .attention import AttentionInputs, captured_attention


class LayerStates:
    """
    Hidden states of windows before a layer of a model: layer 0 at first, the next layer after each `advance`.

    The states are in CPU memory as float32 and take (tokens of all windows) * hidden_size * 4 bytes.

    Args:
        model: causal language model of this package, in evaluation mode.
        batches: token ids [batch, tokens] of each batch, without padding.
        bfloat16_matmuls: use bfloat16 matmuls on a CPU although the model is float32.
    """

    def __init__(
        self, model: PreTrainedModel, batches: Sequence[torch.Tensor], *, bfloat16_matmuls: bool = False
    ) -> None:
        decoder: Any = model.base_model
        self._decoder = decoder
        weight = decoder.embed_tokens.weight
        self._device: torch.device = weight.device
        self._dtype: torch.dtype = weight.dtype
        with torch.no_grad():
            embedded = [decoder.embed_tokens(batch.to(self._device)) for batch in batches]
        self.states = [states.float().cpu() for states in embedded]
        self.number, self._bfloat16_matmuls = 0, bfloat16_matmuls

    def __len__(self) -> int:
        return len(self.states)

    @property
    def layer(self) -> Any:
        """Return the layer that the states are before."""
        return self._decoder.layers[self.number]

    def input(self, batch: int) -> torch.Tensor:
        """Return the attention block's normed input for a batch, [batch, tokens, hidden_size], on the device."""
        with torch.no_grad():
            return self.layer.input_layernorm(self._on_device(self.states[batch]))

    def inputs(self) -> Iterator[torch.Tensor]:
        """Yield the attention block's input for each batch, as `input` returns it."""
        for batch in range(len(self.states)):
            yield self.input(batch)

    def attend(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, AttentionInputs]:
        """Return the attention block's output and the inputs of its attention function, with gradients."""
        positions = torch.arange(hidden_states.shape[1], device=hidden_states.device)[None]
        with matmuls_in_bfloat16(self._bfloat16_matmuls), captured_attention(self._decoder) as captured:
            output, _ = self.layer.self_attn(
                hidden_states,
                position_embeddings=self._decoder.rotary_emb(hidden_states, positions),
                attention_mask=self._mask(hidden_states, positions),
            )
        return output, captured[self.number]

    @torch.no_grad()
    def advance(self) -> None:
        """Run the windows through the current layer and move on to the next layer."""
        for batch, states in enumerate(self.states):
            states = self._on_device(states)
            positions = torch.arange(states.shape[1], device=states.device)[None]
            with matmuls_in_bfloat16(self._bfloat16_matmuls):
                output = self.layer(
                    states,
                    attention_mask=self._mask(states, positions),
                    position_ids=positions,
                    position_embeddings=self._decoder.rotary_emb(states, positions),
                )
            self.states[batch] = output.float().cpu()
        self.number += 1

    def _on_device(self, states: torch.Tensor) -> torch.Tensor:
        return states.to(self._device, self._dtype)

    def _mask(self, states: torch.Tensor, positions: torch.Tensor) -> Any:
        slides = self.layer.self_attn.sliding_window is not None
        make_mask = create_sliding_window_causal_mask if slides else create_causal_mask
        return make_mask(
            config=self._decoder.config,
            inputs_embeds=states,
            attention_mask=None,
            position_ids=positions,
            **{cache_argument(make_mask): None},
        )
