"""Records the queries, keys and values of a model's attentions, through transformers' attention interface.

Shapes: B batch, H query heads, K key heads, T time, D head.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from lolcats_kernels.equation import repeat_heads, take_heads
from lolcats_kernels.hf_adapters import adapt, adapter, key_mask
from lolcats_kernels.hf_attention import lolcats_mask
from lolcats_kernels.hf_student import layer_index
from lolcats_kernels.softmax import AttentionSpec, softmax_attention
from torch import Tensor, nn

from lolcats_cli.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "lolcats_record"
PROBE_LENGTH = 48
TOLERANCE = 1e-4  # of the largest output: the accepted difference between two orders of the same fp32 sums

FINITE_ADVICE = (
    "The weights hold NaN or infinity, or the activations are too large for float16. Try --dtype bfloat16 or float32."
)

Sink = Callable[[int, Tensor, Tensor, Tensor, AttentionSpec], None]


@dataclass(frozen=True)
class LayerInfo:
    """One layer as the probe saw it; 0 heads if it has no softmax attention.

    Attributes:
        head_dim: the size of a head's queries and keys.
        value_dim: the size of a head's values; 0: the same.
    """

    num_heads: int
    num_key_value_heads: int
    head_dim: int
    spec: AttentionSpec
    value_dim: int = 0

    @property
    def v_head_dim(self) -> int:
        """The size of a head's values."""
        return self.value_dim or self.head_dim

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Heads, and the size of each, of q, k and v."""
        k = self.num_key_value_heads
        return {"q": (self.num_heads, self.head_dim), "k": (k, self.head_dim), "v": (k, self.v_head_dim)}

    @property
    def has_attention(self) -> bool:
        return self.num_heads > 0

    def take(self, key_heads: Sequence[int]) -> LayerInfo:
        """The layer with these key heads alone, and their query heads."""
        sinks = self.spec.sinks
        if sinks is not None:
            sinks = take_heads(sinks[None], key_heads, self.num_key_value_heads)[0]
        count = self.num_heads // self.num_key_value_heads * len(key_heads)
        spec = replace(self.spec, sinks=sinks)
        return replace(self, num_heads=count, num_key_value_heads=len(key_heads), spec=spec)

    def to_dict(self) -> dict[str, Any]:
        return {
            "num_heads": self.num_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            **({} if self.v_head_dim == self.head_dim else {"v_head_dim": self.v_head_dim}),
            **self.spec.to_dict(),
        }

    @classmethod
    def from_dict(cls, layer: dict[str, Any]) -> LayerInfo:
        heads = {key: layer[key] for key in ("num_heads", "num_key_value_heads", "head_dim")}
        spec = {key: value for key, value in layer.items() if key not in {*heads, "v_head_dim"}}
        return cls(**heads, spec=AttentionSpec.from_dict(spec), value_dim=layer.get("v_head_dim", 0))

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes that q, k and v of one token take in this layer."""
        return sum(heads * size for heads, size in self.shapes.values()) * dtype.itemsize


NO_ATTENTION = LayerInfo(0, 0, 0, AttentionSpec(1.0))


@contextmanager
def recording(model: PreTrainedModel, sink: Sink) -> Iterator[None]:
    """While open, every attention of `model` hands `sink` its layer index, q, k, v and specification.

    q is [B, H, T, D]; k and v are [B, K, T, D], as the attention function receives them.
    """

    def attention(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        spec = _spec(q, options)
        sink(layer_index(module), q, k, v, spec)
        valid = key_mask(module, attention_mask)
        return softmax_attention(q, k, v, spec, valid).transpose(1, 2).contiguous(), None

    with _intercepted(model, attention, lolcats_mask):
        yield


# Takes a layer's index, q [B, H, T, D], k and v [B, K, T, D], valid [B, T] bool or None, and its specification. Returns
# [B, T, H, D], or None where softmax attention stays.
Replacement = Callable[[int, Tensor, Tensor, Tensor, Tensor | None, AttentionSpec], Tensor | None]


@contextmanager
def replacing(model: PreTrainedModel) -> Iterator[Callable[[Replacement | None], None]]:
    """While open, every attention of `model` is computed by `softmax_attention`, or by what replaces it. What it yields
    is told what that is from now on; None: nothing."""
    chosen: list[Replacement | None] = [None]

    def attention(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        spec, valid, replacement = _spec(q, options), key_mask(module, attention_mask), chosen[0]
        out = None if replacement is None else replacement(layer_index(module), q, k, v, valid, spec)
        return softmax_attention(q, k, v, spec, valid).transpose(1, 2).contiguous() if out is None else out, None

    def choose(replacement: Replacement | None) -> None:
        chosen[0] = replacement

    with _intercepted(model, attention, lolcats_mask):
        yield choose


@contextmanager
def checking(model: PreTrainedModel, valid: Tensor | None = None) -> Iterator[dict[int, LayerInfo]]:
    """While open, every attention of `model` is computed twice and compared: by the function that its own code brings,
    and by `softmax_attention`. Both get the same q, k, v, mask and options in fp32, so the errors of earlier layers and
    of the model's dtype have no part in it. It holds for any forward pass, through the whole model or some layers.

    Args:
        valid: [B, T] bool, true for the real tokens of the batch that is passed; None if all are.

    Yields:
        What was found, by layer index; filled while the pass goes on.

    Raises:
        BadInput: from inside the forward pass, naming the model, the layer and what is wrong with its attention.
    """
    from transformers.masking_utils import eager_mask

    found: dict[int, LayerInfo] = {}

    def attention(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        name, layer = f"{type(model).__name__} cannot be linearized", module.layer_idx
        if not all(bool(part.isfinite().all()) for part in (q, k, v)):
            raise BadInput(f"{name}: the queries, keys or values of layer {layer} are NaN or infinite. {FINITE_ADVICE}")
        spec = _spec(q, options)
        q32, k32, v32 = q.float(), k.float(), v.float()
        mask = attention_mask
        if mask is not None and mask.is_floating_point():
            mask = mask.float()
        own = _own_attention(module)(module, q32, k32, v32, mask, **options)[0]
        ours = softmax_attention(q32, k32, v32, spec, valid).transpose(1, 2)
        real = slice(None) if valid is None else valid
        largest = own[real].abs().max()
        error = (ours[real] - own[real]).abs().max()
        if not error <= TOLERANCE * largest:
            raise BadInput(
                f"{name}: the attention of layer {layer} is not reproduced by softmax attention over its queries, keys "
                f"and values. The largest difference is {error:.2g}, where outputs reach {largest:.2g}. It may use a "
                "bias or another mask that lolcats does not know."
            )
        if layer in found:
            raise BadInput(
                f"{name}: layer {layer} computes its attention more than once, as differential attention does."
            )
        sizes = q.shape[1], k.shape[1], q.shape[-1]
        value_dim = 0 if v.shape[-1] == q.shape[-1] else v.shape[-1]
        found[layer_index(module)] = LayerInfo(*sizes, spec, value_dim)
        return own.to(q.dtype), None

    with _intercepted(model, attention, eager_mask), _compare_adapters(model, valid):
        yield found


@torch.no_grad()
def probe(model: PreTrainedModel, *, seed: int = 0) -> list[LayerInfo]:
    """Checks that every attention of `model` can be recorded and reproduced (see `checking`). Returns the layers.

    It runs random tokens through the model, with one row left-padded. Layers of other kinds, such as the recurrences of
    a hybrid model, have no attention in the result.

    Raises:
        BadInput: naming the model and the layer whose attention differs, or if no attention is reached.
    """
    name, config = type(model).__name__, model.config.get_text_config()
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, config.vocab_size, (2, PROBE_LENGTH), generator=generator).to(model.device)
    mask = torch.ones_like(ids)
    mask[1, : PROBE_LENGTH // 3] = 0
    with checking(model, mask.bool()) as layers:
        last = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)[0]
    count = config.num_hidden_layers
    if not layers:
        raise BadInput(
            f"{name} cannot be linearized: none of its {count} layers has an attention that uses transformers' "
            "attention interface, so there are no queries, keys and values to record."
        )
    if not last[mask.bool()].isfinite().all():
        raise BadInput(
            f"{name} cannot be linearized: the output of its last layer, {count - 1}, is NaN or infinite. "
            f"{FINITE_ADVICE}"
        )
    return [layers.get(layer, NO_ATTENTION) for layer in range(count)]


@contextmanager
def _intercepted(model: PreTrainedModel, attention: Callable[..., Any], mask: Callable[..., Any]) -> Iterator[None]:
    """While open, `attention` computes every attention of `model`, with masks as `mask` makes them."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)  # without it padding would be ignored
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    model.config._attn_implementation = NAME  # also where transformers thinks that a model cannot
    undo = adapt(model, attention)
    try:
        yield
    finally:
        undo()
        model.config._attn_implementation = before
        model.set_attn_implementation(before)


def _spec(q: Tensor, options: dict[str, Any]) -> AttentionSpec:
    """What decides the attention in addition to q, k and v, from the options that a module passes to its function."""
    scaling = options.get("scaling")
    scaling = q.shape[-1] ** -0.5 if scaling is None else float(scaling)
    sinks = options.get("s_aux")  # what transformers calls them
    sinks = None if sinks is None else sinks.detach().float()
    return AttentionSpec(scaling, options.get("sliding_window"), options.get("softcap"), sinks)


def _own_attention(module: nn.Module) -> Callable[..., Any]:
    """The attention function that the module's own code falls back to; every file of transformers has it by one name.
    Modules with an adapter have none, and are compared as a whole (`_compare_adapters`).

    Raises `BadInput` for code that has not.
    """
    if adapter(module) is not None:
        return _plain_attention
    own: Callable[..., Any] | None = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if own is None:
        raise BadInput(
            f"{type(module).__name__} cannot be linearized: its code has no eager_attention_forward, and the recorded "
            "attention must be compared with that function."
        )
    return own


def _plain_attention(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Softmax attention with an additive mask; causal where the mask is one of keys."""
    scores = q @ repeat_heads(k, q.shape[1]).transpose(2, 3) * scaling
    age = torch.arange(q.shape[2], device=q.device)[:, None] - torch.arange(q.shape[2], device=q.device)
    seen = (age >= 0) & (age < (sliding_window or age.shape[0]))
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min) + (0 if mask is None else mask)
    return (scores.softmax(-1) @ repeat_heads(v, q.shape[1])).transpose(1, 2), None


@contextmanager
def _compare_adapters(model: PreTrainedModel, valid: Tensor | None) -> Iterator[None]:
    """While open, what an attention with an adapter gives is compared with what its own code gives, in fp32.

    Raises `BadInput` from inside the forward pass, as `checking` does.
    """

    def compare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        plain = deepcopy(module).float()
        for name in ("forward", "_old_forward", "_attn"):
            plain.__dict__.pop(name, None)
        if hasattr(plain, "config"):
            plain.config._attn_implementation = "eager"  # type: ignore[union-attr]
        floats = [x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
        options = {k: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in kwargs.items()}
        own, ours = type(plain).forward(plain, *floats, **options)[0], output[0].float()
        if valid is not None:
            own, ours = own[valid], ours[valid]
        largest, error = own.abs().max(), (own - ours).abs().max()
        if not error <= (TOLERANCE if output[0].dtype == torch.float32 else 0.05) * largest:
            raise BadInput(
                f"{type(model).__name__} cannot be linearized: with lolcats' adapter the attention of layer "
                f"{module.layer_idx} differs by {error:.2g}, where outputs reach {largest:.2g}."
            )

    adapted = [module for module in model.modules() if adapter(module) is not None]
    handles = [module.register_forward_hook(compare, with_kwargs=True) for module in adapted]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
