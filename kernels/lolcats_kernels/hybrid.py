"""The one operation: hybrid attention, by whichever implementation fits.

Letters: see ../README.md.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal, overload

import torch
from torch import Tensor

from .maps import HybridMaps
from .reference import reference_attention
from .spec import CallSpec, NoRoom, check_choice, common_dtype, compute_dtype
from .state import KVState, may_overwrite
from .torch_attention import chunked_attention


def _triton_attention(*args: Any, **options: Any) -> tuple[Tensor, KVState | None]:
    from .triton_attention import triton_attention  # an optional package

    return triton_attention(*args, **options)


# Every implementation takes what `hybrid_attention` takes, checked, its options as a spec; -> (out, state or None).
_BACKENDS: dict[str, Callable[..., tuple[Tensor, KVState | None]]] = {
    "reference": reference_attention,
    "chunked": chunked_attention,
    "triton": _triton_attention,
}
BACKENDS = ("auto", *_BACKENDS)
_TOO_LARGE: set[tuple[Any, ...]] = set()  # sizes for which the GPU has no room, so that "auto" takes "chunked"
LARGEST = 256  # heads and feature maps that the Triton kernels take
HAS_TRITON = find_spec("triton") is not None


def backend_for(q: Tensor, v: Tensor, maps: HybridMaps) -> str:
    """What "auto" takes for such inputs."""
    fits = HAS_TRITON and q.is_cuda and q.dtype != torch.float64
    fits = fits and max(q.shape[3], v.shape[3], maps.feature_dim) <= LARGEST
    return "triton" if fits and torch.cuda.get_device_properties(q.device).major >= 8 else "chunked"


def _triton_or_chunked(sizes: tuple[Any, ...], *args: Any, **options: Any) -> tuple[Tensor, KVState | None]:
    try:
        return _triton_attention(*args, **options)
    except NoRoom as error:
        warnings.warn(f"{error} It is used here.", stacklevel=3)
        _TOO_LARGE.add(sizes)
        return chunked_attention(*args, **options)


@overload
def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: HybridMaps,
    *,
    scaling: float,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    valid: Tensor | None = ...,
    initial_state: KVState | None = ...,
    return_state: Literal[False] = ...,
    terms: str = ...,
    consume_state: bool = ...,
    waiting: int | None = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: HybridMaps,
    *,
    scaling: float,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    valid: Tensor | None = ...,
    initial_state: KVState | None = ...,
    return_state: Literal[True],
    terms: str = ...,
    consume_state: bool = ...,
    waiting: int | None = ...,
    backend: str = ...,
) -> tuple[Tensor, KVState]: ...
def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: HybridMaps,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    valid: Tensor | None = None,
    initial_state: KVState | None = None,
    return_state: bool = False,
    terms: str = "both",
    consume_state: bool = False,
    waiting: int | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, KVState]:
    """Windowed softmax plus linear attention with one shared denominator (arXiv 2410.10254, eq. 7), causal.

    q [B, H, T, D]; k [B, K, T, D], v [B, K, T, Dv], not repeated (K divides H), after RoPE; float dtypes.
    maps: the layer's feature maps and gamma, for H heads of size D.
    scaling: factor of q . k in the softmax scores (the feature maps take q and k as they are).
    softcap: the scores become softcap tanh(scores / softcap), as in Gemma 2.
    sinks [H]: a logit that each head's window has besides its keys', with the value 0, as in gpt-oss.
    valid [B, T] bool: False is padding, anywhere in the row. It contributes nothing, its outputs are 0, and
        positions count valid tokens only, so the others get what they would get in the row without it.
    initial_state: from the tokens before these; None at the start. Not changed, unless it is consumed. It must come
        from maps of the same configuration. Only shapes and the dtype of keys are checked. Other configurations give
        the same ones: a sliding window that is `maps.config.waiting` keys longer, or a terraced one of half the length.
    return_state: also return the state after these tokens.
    terms: "both"; or for ablations "window" (the linear term is 0) or "linear" (the window's term is 0).
        A query for which nothing is left to sum gets output 0.
    consume_state: the state given is not used again, so that the one returned may take its tensors: decoding in place.
    waiting: how many keys may wait for the sums in the state returned where none is given: `maps.config.waiting` or 0.
        By default what is best where this backend decodes. By Triton none waits in a state that has gradients.
    backend: "reference" (the definition, quadratic), "chunked" (linear time and memory, on any device), "triton"
        (the same by GPU kernels: fp32, bf16 and fp16, sizes up to 256, compute capability 8.0), or "auto":
        triton where it can be, else chunked.

    Returns out [B, H, T, Dv] in q's dtype, or (out, state). Sums are in fp32 (fp64 for fp64 inputs).
    Differentiable in q, k, v, sinks and the parameters of `maps`.
    Raises ValueError when shapes, dtypes or options do not fit together; ImportError for "triton" without its package.
    """
    check_choice("backend", backend, BACKENDS)
    spec = CallSpec(maps.config, scaling, softcap, terms)
    _check(q, k, v, maps, valid, initial_state)
    if sinks is not None and sinks.shape != (maps.num_heads,):
        raise ValueError(
            f"sinks must be one for each of {maps.num_heads} query heads. Their shape is {list(sinks.shape)}."
        )
    wanted = q.dtype
    q, k, v = (x.to(common_dtype(q, k, v)) for x in (q, k, v))
    chosen = backend_for(q, v, maps) if backend == "auto" else backend
    if initial_state is not None:
        waiting = initial_state.waiting(maps.config)
    elif waiting is None:
        waiting = maps.config.waiting if chosen == "triton" else 0
    sizes = q.shape[3], v.shape[3], maps.config, q.dtype, q.device
    run = _BACKENDS[chosen]
    if backend == "auto" and chosen == "triton":
        run = _BACKENDS["chunked"] if sizes in _TOO_LARGE else partial(_triton_or_chunked, sizes)
    with torch.autocast(q.device.type, enabled=False):  # sums stay in fp32
        out, after = run(
            q,
            k,
            v,
            maps,
            spec,
            sinks=None if sinks is None else sinks.to(compute_dtype(q.dtype)),
            valid=valid,
            initial_state=initial_state,
            return_state=return_state,
            consume_state=consume_state and initial_state is not None and may_overwrite(maps, initial_state, q, k, v),
            waiting=waiting,
        )
    out = out.to(wanted)
    if not return_state:
        return out
    assert after is not None
    return out, after


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: HybridMaps,
    valid: Tensor | None,
    initial_state: KVState | None,
) -> None:
    def shapes() -> str:
        return f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"

    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"q, k and v must be [batch, heads, time, head size]. They are {shapes()}.")
    batch, heads, time, head_dim = q.shape
    if k.shape[:3] != v.shape[:3] or (k.shape[0], k.shape[2]) != (batch, time) or time == 0:
        raise ValueError(f"q, k and v must have the same batch and time, of at least 1. They are {shapes()}.")
    if heads != maps.num_heads or head_dim != maps.head_dim or k.shape[3] != head_dim:
        raise ValueError(
            f"The feature maps are for {maps.num_heads} query heads of size {maps.head_dim}. q, k and v are {shapes()}."
        )
    if k.shape[1] == 0 or heads % k.shape[1]:
        raise ValueError(f"The {heads} query heads must be a multiple of the key heads. q, k and v are {shapes()}.")
    if not all(x.is_floating_point() for x in (q, k, v)):
        raise ValueError(f"q, k and v must have float dtypes. They are {q.dtype}, {k.dtype}, {v.dtype}.")
    if valid is not None and (valid.shape != (batch, time) or valid.dtype != torch.bool):
        raise ValueError(
            f"valid must be bool [{batch}, {time}] (True for a token). It is {valid.dtype} {list(valid.shape)}."
        )
    if initial_state is not None:
        waiting = maps.config.waiting if initial_state.waiting(maps.config) else 0
        held = KVState.shapes(maps, batch, k.shape[1], v.shape[3], waiting)
        for name, shape in held.items():
            got = getattr(initial_state, name).shape
            if got != shape:
                raise ValueError(
                    f"The state's {name} are {list(got)}, and these inputs need {list(shape)}. "
                    "The state comes from another batch, layer or configuration."
                )
        if initial_state.keys.dtype != common_dtype(q, k, v):
            raise ValueError(f"The state holds {initial_state.keys.dtype}, and the inputs are {common_dtype(q, k, v)}.")
