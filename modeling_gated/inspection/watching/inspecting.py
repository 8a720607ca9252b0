"""Showing meters what a model computes, without changing it."""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from modeling_gated.errors import InspectionError, UnknownAttention

from .attention_rows import attention_rows
from .gate_hooks import gated_attentions, gates_of_a_head, hooked
from .masks import MaskOfOneModel, MaskRecords, RecordedMask
from .meter import ATTENTION, Meter
from .tokens import TokenWatch, watched_tokens


@contextmanager
def inspecting(model: PreTrainedModel, *meters: Meter) -> Iterator[None]:
    """
    Show meters every forward pass of a model inside the `with` block; afterwards their `result()` is complete.

    The model's output is bit for bit what it is without meters: its attention function gets what it always gets, and
    the meters compute probabilities of their own, in float32 and blockwise, beside it. Not for compiled models.

    Args:
        model: any model of Transformers' whose attention goes through its attention interface; inside PEFT, the model
            that `get_base_model()` gives.
        meters: each begins anew.

    Raises:
        InspectionError: if the model's layers are not found, if it is trained with gradient checkpointing, which runs
            each layer twice, and while it runs for numbers that are not finite.
        UnknownAttention: an InspectionError, if a meter of attention cannot know it: because it does not go through
            that interface, or has an argument that may change scores in an unknown way.

    ```python
    >>> first_token, entropy = FirstTokenAttention(), AttentionEntropy()
    >>> with torch.no_grad(), inspecting(model, first_token, entropy):
    ...     model(input_ids)
    >>> first_token.result().mean()  # of [layers, heads]
    ```
    """
    decoder = model.get_decoder()
    layers = decoder_layers(decoder)
    if model.training and _recomputes_layers(model):
        raise InspectionError(
            f"{type(model).__name__}: is trained with gradient checkpointing, which runs layers twice"
        )
    for meter in meters:
        meter.start(len(layers))
    with ExitStack() as stack:
        records = MaskRecords()
        probe = _Probe(layers, meters, records, stack.enter_context(watched_tokens(model, records.padding)))
        stack.callback(decoder.register_forward_pre_hook(lambda *_: records.begin()).remove)
        stack.callback(decoder.register_forward_hook(lambda *_: records.end(), always_call=True).remove)
        if seen := probe.overriding("hidden_states"):
            stack.callback(layers[0].register_forward_pre_hook(probe.embedded(seen), with_kwargs=True).remove)
            for number, layer in enumerate(layers):
                stack.callback(layer.register_forward_hook(probe.layer_output(number, seen)).remove)
            stack.callback(decoder.register_forward_hook(probe.layer_output(len(layers), seen)).remove)
        if seen := probe.overriding("gates"):
            for number, attention in gated_attentions(layers):
                stack.enter_context(hooked(attention, watch=probe.gates(number, seen)))
        if seen := probe.overriding("attention_output"):
            for number, layer in enumerate(layers):
                for module in layer.modules():
                    if (projection := getattr(module, "o_proj", None)) is not None:
                        hook = projection.register_forward_pre_hook(probe.projected(number, module, seen))
                        stack.callback(hook.remove)
        needs_attention = probe.overriding(*ATTENTION)
        if needs_attention:
            attention = probe.attention_function(decoder.config._attn_implementation)
            stack.enter_context(attention_replaced(decoder, attention, lambda base: RecordedMask(base, records)))
        yield
    if needs_attention and probe.watch.passes and not probe.attention_seen:
        raise UnknownAttention(f"{type(model).__name__}: no attention went through Transformers' attention interface")


def _recomputes_layers(model: PreTrainedModel) -> bool:
    """Return whether the model is set to compute its layers again for the backward pass."""
    if hasattr(model, "is_activation_checkpointing"):  # before Transformers 5.23 it has the other name
        return model.is_activation_checkpointing
    return getattr(model, "is_gradient_checkpointing", False)


def decoder_layers(decoder: nn.Module) -> nn.ModuleList:
    """Return the layers of a decoder: the outermost list of as many modules as its config says."""
    wanted = getattr(getattr(decoder, "config", None), "num_hidden_layers", None)
    lists = (module for module in decoder.modules() if isinstance(module, nn.ModuleList) and len(module) == wanted)
    layers = next(lists, None)
    if not layers:
        raise InspectionError(f"{type(decoder).__name__}: no list of num_hidden_layers={wanted} layers found in it")
    return layers


@contextmanager
def attention_replaced(
    decoder: Any, attention: Callable[..., Any], make_mask: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """
    Give a decoder another attention and mask function, under the name of those it has, and then those back. The name
    stays, as what some models compute depends on it; others' modules get what they always get.

    Args:
        decoder: whose config names the functions.
        attention: called with the attention function that is there, and then as it would be.
        make_mask: makes the mask function of the one that is there.

    Raises:
        UnknownAttention: if the decoder does not take its attention from Transformers' attention interface.
    """
    config = decoder.config
    name = config._attn_implementation
    if not decoder._can_set_attn_implementation():
        raise UnknownAttention(
            f"{type(decoder).__name__}: its attention does not go through Transformers' attention interface"
        )
    functions: dict[str, Any] = AttentionInterface._global_mapping
    masks: dict[str, Any] = AttentionMaskInterface._global_mapping
    # A known mask function as well: without one a model makes no mask, and padded or packed inputs are silently wrong.
    if name not in masks or name not in (*functions, "eager"):
        raise UnknownAttention(f"attn_implementation={name!r}: has no mask function, so what it sees is not known")
    before, before_mask = functions.get(name), masks[name]
    modules = set(decoder.modules())
    mask = MaskOfOneModel(before_mask, make_mask(before_mask), config)

    def dispatched(module: nn.Module, *inputs: Any, **arguments: Any) -> Any:
        base = before if before is not None else _eager_attention(module)
        if mask.is_active and module in modules:
            return attention(base, module, *inputs, **arguments)
        return base(module, *inputs, **arguments)

    functions[name], masks[name] = dispatched, mask
    try:
        yield
    finally:
        mask.is_active = False  # also for who has entered later and leaves later
        masks[name] = before_mask
        if before is None:
            functions.pop(name, None)
        else:
            functions[name] = before


def _eager_attention(module: nn.Module) -> Callable[..., Any]:
    """Return the eager attention function of the file that defines a module's class."""
    for kind in type(module).__mro__:
        if (eager := getattr(sys.modules[kind.__module__], "eager_attention_forward", None)) is not None:
            return eager
    raise UnknownAttention(f"{type(module).__name__}: its file has no eager attention")


@contextmanager
def measuring(device: torch.device) -> Iterator[None]:
    """Compute without gradients, and in the dtypes that are written down, whatever a trainer's autocast wants."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluate without dropout, and then restore the mode of every module."""
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in was_training.items():
            module.training = mode


def input_device(model: Any) -> torch.device:
    """Return the device of a model's input: for an offloaded model the device that its layers run on."""
    if model.device.type != "meta":
        return model.device
    return torch.device(getattr(getattr(model, "_hf_hook", None), "execution_device", None) or "cpu")


class _Probe:
    """Hooks in a model that is inspected, which show its meters what they see."""

    def __init__(
        self, layers: nn.ModuleList, meters: tuple[Meter, ...], records: MaskRecords, watch: TokenWatch
    ) -> None:
        self.meters, self.records, self.watch = meters, records, watch
        self.count = len(layers)
        self.layer_of = {module: number for number, layer in enumerate(layers) for module in layer.modules()}
        self.attention_seen = False
        self.heads: dict[nn.Module, int] = {}

    def overriding(self, *methods: str) -> tuple[Meter, ...]:
        """Return the meters that want to see one of these."""
        return tuple(meter for meter in self.meters if meter.overrides(*methods))

    def show_hidden_states(self, layer: int, states: Any, meters: tuple[Meter, ...]) -> None:
        name = {-1: "the embeddings", self.count: "the last norm's output"}.get(layer, f"layer {layer}'s output")
        if not isinstance(states, torch.Tensor):
            raise InspectionError(f"{name}: is {type(states).__name__}, not [batch, tokens, hidden_size]")
        with measuring(states.device):
            tokens = self.watch.tokens(states.device)
            if states.ndim != 3 or states.shape[:2] != tokens.current.shape:
                raise InspectionError(f"{name}: is {list(states.shape)}, not [batch, tokens, hidden_size]")
            _check_finite(name, states, tokens.current)
            for meter in meters:
                meter.hidden_states(layer, states, tokens)

    def embedded(self, meters: tuple[Meter, ...]) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            self.show_hidden_states(-1, arguments[0] if arguments else keywords.get("hidden_states"), meters)

        return hook

    def layer_output(self, layer: int, meters: tuple[Meter, ...]) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            self.show_hidden_states(layer, output if isinstance(output, torch.Tensor) else output[0], meters)

        return hook

    def gates(self, layer: int, meters: tuple[Meter, ...]) -> Callable[[Any, str, torch.Tensor], None]:
        def watch(attention: Any, position: str, gates: torch.Tensor) -> None:
            with measuring(gates.device):
                tokens = self.watch.tokens(gates.device)
                # [batch, tokens, heads, gates of a head], also of those that are independent of the input.
                split = gates.view(-1, gates.shape[-2], *_split(attention, position, gates.shape[-1]))
                split = split.expand(*tokens.current.shape, -1, -1)
                _check_finite(f"layer {layer}'s gates", split, tokens.current)
                for meter in meters:
                    meter.gates(layer, position, split, attention.gate_scale, tokens)

        return watch

    def projected(self, layer: int, attention: nn.Module, meters: tuple[Meter, ...]) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            if attention in self.heads:  # else its attention function is another
                self.show_output(layer, arguments[0], self.heads[attention], meters)

        return hook

    def show_output(self, layer: int, output: torch.Tensor, heads: int, meters: tuple[Meter, ...]) -> None:
        with measuring(output.device):
            tokens = self.watch.tokens(output.device)
            if output.shape[:2] != tokens.current.shape:
                raise UnknownAttention(f"layer {layer}: its attention output is {list(output.shape)}")
            output = output.reshape(*tokens.current.shape, heads, -1)
            _check_finite(f"layer {layer}'s attention output", output, tokens.current)
            for meter in meters:
                meter.attention_output(layer, output, tokens)

    def attention_function(self, implementation: str) -> Callable[..., Any]:
        wants_output = self.overriding("attention_output")

        def attention(
            base: Callable[..., Any],
            module: nn.Module,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            attention_mask: Any = None,
            **arguments: Any,
        ) -> Any:
            output = base(module, query, key, value, attention_mask, **arguments)
            layer = self.layer_of.get(module)
            if layer is None:  # of a part that is not the decoder
                return output
            self.attention_seen = True
            self.heads[module] = query.shape[1]
            with measuring(query.device):
                self.show_attention(layer, implementation, module, query, key, value, attention_mask, arguments)
            if not hasattr(module, "o_proj"):
                self.show_output(layer, output[0], query.shape[1], wants_output)
            return output

        return attention

    def show_attention(
        self,
        layer: int,
        implementation: str,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        arguments: dict[str, Any],
    ) -> None:
        tokens = self.watch.tokens(query.device)
        wanted = arguments.get("is_causal")
        # Without a mask eager attention hides nothing.
        is_causal = implementation != "eager" and (getattr(module, "is_causal", True) if wanted is None else wanted)
        window = arguments.get("sliding_window")
        mask = self.records.seen(attention_mask, tokens.offset, query, key, window, is_causal)
        if query.shape[2] != tokens.current.shape[1]:
            raise UnknownAttention(f"layer {layer}: has {query.shape[2]} queries for {tokens.current.shape[1]} tokens")
        current = slice(tokens.offset - mask.first_key, tokens.offset - mask.first_key + query.shape[2])
        if wants_inputs := self.overriding("attention_inputs"):
            keys, values = key[:, :, current], value[:, :, current]
            _check_finite(f"layer {layer}'s keys", keys.transpose(1, 2), tokens.current)
            _check_finite(f"layer {layer}'s values", values.transpose(1, 2), tokens.current)
            for meter in wants_inputs:
                meter.attention_inputs(layer, keys, values, tokens)
        if wants_rows := self.overriding("attention"):
            ignored = [name for name in ("softcap", "s_aux") if arguments.get(name) is not None]
            if ignored and implementation == "sdpa":
                raise UnknownAttention(f"layer {layer}: sdpa ignores its {ignored[0]}; use attn_implementation='eager'")
            for rows in attention_rows(layer, query, key, mask, tokens, arguments):
                for meter in wants_rows:
                    meter.attention(rows)


def _check_finite(name: str, states: torch.Tensor, real: torch.Tensor) -> None:
    """Check states [batch, tokens, ...], of which those of real tokens count."""
    counted = states if bool(real.all()) else states[real]
    if counted.numel() and not all(math.isfinite(bound) for bound in counted.aminmax()):
        raise InspectionError(f"{name}: must be finite, got NaN or infinity")


def _split(attention: Any, position: str, rows: int) -> tuple[int, int]:
    gates = gates_of_a_head(attention, position, rows)
    return rows // gates, gates
