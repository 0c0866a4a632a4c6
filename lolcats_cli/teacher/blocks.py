"""Runs some neighbouring layers of a teacher by the model's own forward pass, with only their weights on the device.

When transformers loads a model on the CPU, it maps the weights from the checkpoint's files. They take memory only while
they are used. So a model of any size can be loaded, and its layers can be moved to the device one block at a time.

Shapes: B batch, T time, E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lolcats_cli.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Takes input_ids [B, T], valid [B, T] bool or None, and the hidden states [B, T, E] in front of the first layer. With
# None, these are computed from the tokens. Returns the hidden states behind the last layer. If that is the last of the
# model, it returns the logits [B, T, V] where they are asked for, and None otherwise.
Run = Callable[[Tensor, Tensor | None, Tensor | None], Tensor | None]


class _Reached(Exception):
    """Ends a forward pass in front of a layer."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The model's decoder layers, in order. Raises `BadInput` if they cannot be found."""
    count = model.config.get_text_config().num_hidden_layers
    lists = [x for x in model.base_model.modules() if isinstance(x, nn.ModuleList) and len(x) == count]
    found = [x for x in lists if all(map(_has_layer, x, range(count)))]
    # An encoder of images may have as many layers; theirs have no numbers.
    for module in sorted(found, key=lambda layers: not any(map(_numbers, layers))):
        return list(module)
    raise BadInput(
        f"{type(model).__name__} cannot be captured: it has no list of {count} decoder layers with an attention each."
    )


def _has_layer(module: nn.Module, index: int) -> bool:
    """Whether the module is a layer of that number, as far as its parts know; recurrences may not know."""
    numbers = _numbers(module)
    return not numbers or index in numbers


def _numbers(module: nn.Module) -> set[int]:
    numbers = (getattr(part, "layer_idx", None) for part in module.modules())
    return {number for number in numbers if isinstance(number, int)}


@contextmanager
def block(model: PreTrainedModel, layers: range, device: torch.device, logits: bool = False) -> Iterator[Run]:
    """While open, the model's `layers` lie on the device. Yields a function that runs them.

    A model that is already on the device stays there. If it is on the CPU, its other layers stay there. Its head does
    too, unless `logits` are asked for and the layers are the model's last.
    """
    everything = decoder_layers(model)
    chosen, last = everything[layers.start : layers.stop], layers.stop == len(everything)
    root: nn.Module = model if logits and last else model.base_model
    state: dict[str, Tensor | None] = {"hidden": None}

    def begin(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if state["hidden"] is None:
            return None
        if args:
            return (state["hidden"], *args[1:]), kwargs
        return args, kwargs | {"hidden_states": state["hidden"]}

    def end(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Reached(args[0] if args else kwargs["hidden_states"])

    @torch.no_grad()
    def run(input_ids: Tensor, valid: Tensor | None, hidden: Tensor | None) -> Tensor | None:
        state["hidden"] = None if hidden is None else hidden.to(device)
        mask = None if valid is None else valid.to(device).long()
        try:
            found = root(input_ids=input_ids.long().to(device), attention_mask=mask, use_cache=False)
        except _Reached as reached:
            return reached.hidden
        return found.logits if root is model else None

    with ExitStack() as stack:
        stack.enter_context(_on_device(root, everything, chosen, device))
        for module in everything[: layers.start]:
            stack.enter_context(_skipped(module))
        if layers.start:
            handle = chosen[0].register_forward_pre_hook(begin, with_kwargs=True)
            stack.callback(handle.remove)
        if not last:
            handle = everything[layers.stop].register_forward_pre_hook(end, with_kwargs=True, prepend=True)
            stack.callback(handle.remove)
        yield run


@contextmanager
def _skipped(module: nn.Module) -> Iterator[None]:
    """The layer returns its input. The next hook replaces it, so only its form matters: a tensor or a tuple."""

    def forward(hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        return hidden_states

    module.forward = forward
    try:
        yield
    finally:
        del module.forward


@contextmanager
def _on_device(
    model: nn.Module, layers: list[nn.Module], chosen: list[nn.Module], device: torch.device
) -> Iterator[None]:
    """While open, the chosen layers, and all modules that are not layers, are on the device."""
    if next(model.parameters()).device == device:
        yield
        return
    left = {id(part) for layer in layers if layer not in chosen for part in layer.modules()}
    before: list[tuple[dict[str, Tensor | None], str, Tensor]] = []
    moved: dict[int, Tensor] = {}  # tensors that are shared stay shared
    for module in (module for module in model.modules() if id(module) not in left):
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    before.append((tensors, name, tensor))  # type: ignore[arg-type]
                    if id(tensor) not in moved:
                        moved[id(tensor)] = _moved(tensor, device)
                    tensors[name] = moved[id(tensor)]  # type: ignore[assignment]
    try:
        yield
    finally:
        for tensors, name, tensor in before:
            tensors[name] = tensor


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    there = tensor.detach().to(device)
    return nn.Parameter(there, requires_grad=False) if isinstance(tensor, nn.Parameter) else there
