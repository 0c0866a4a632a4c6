"""Hybrid attention by Triton kernels: their launches, forward and backward, registered with torch.

Shapes: B batch, H query heads, K key heads, J tokens of a row, D head, V value head, F columns of a feature map, F'
features, N features in the kernels' order (padded), M blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .chunked import attend_in_rows
from .maps import KEY_BOUND, QUERY_BOUND, HybridMaps, op_name
from .state import KVState, records_gradients
from .triton_backward import backward_keys, backward_queries, backward_values, sum_queries
from .triton_decoding import triton_decode_step
from .triton_forward import attend, sum_keys
from .triton_parts import PRECISIONS, feature_order, launch, padded

# By compute capability, then by the largest head: tokens of a block, forward and backward; warps.
TILES = {
    80: {64: (32, 32, 8), 128: (32, 32, 8), 256: (16, 16, 8)},
    90: {64: (64, 32, 8), 128: (64, 32, 8), 256: (16, 16, 8)},
}
COLUMNS = 64  # of values and S that one program takes, where it does not need all

# The tensors of a call, in the order of the arguments of `_forward`.
_TENSORS = (
    *("q", "k", "v", "q_weight", "k_weight", "q_bias", "k_bias", "logits", "key_logits"),
    *("gamma", "factor", "start_sums", "start_norms", "count"),
)


class _Call:
    """The launches of one call. `given` holds the arguments of the kernels, which take what they need by name."""

    def __init__(self, tensors: Sequence[Tensor | None], options: Sequence[Any], *, backward: bool) -> None:
        feature_map, window, layout, scaling, softcap, terms = options
        self.given: dict[str, Any] = dict(zip(_TENSORS, tensors, strict=True))
        q, k, v, q_weight = (self.given[name] for name in ("q", "k", "v", "q_weight"))
        batch, heads, time, size = q.shape
        value_size, columns = v.shape[3], size if q_weight is None else q_weight.shape[2]
        tiles = TILES[max(known for known in TILES if known <= capability(q.device))]
        *blocks_of, self.warps = tiles[next(fits for fits in tiles if fits >= max(size, value_size))]
        block = blocks_of[backward]
        blocks, features = -(-time // block), feature_order(feature_map, columns)
        part = min(COLUMNS, padded(value_size))
        self.grid, self.key_grid = (blocks, batch * heads), (blocks, batch * k.shape[1], -(-value_size // part))
        self.state_grid = batch * heads, -(-value_size // part)
        self.state_shape = batch, heads, blocks + 1, features, value_size
        self.give(J=time, D=size, V=value_size, F=columns, M=blocks, H=heads, GROUP=heads // k.shape[1])
        self.give(MAP=feature_map, EXP=self.given["logits"] is not None, SOFTCAP=softcap > 0, softcap=softcap)
        self.give(WINDOW=window, TERRACED=layout == "terraced", scaling=scaling)
        self.give(HAS_WINDOW=window > 0 and terms != "linear")
        self.give(L=block, DP=padded(size), VP=padded(value_size), BV=part, FP=padded(columns), N=features)
        self.give(PRECISION=PRECISIONS[q.dtype], HAS_START=self.given["start_sums"] is not None)
        self.give_strides(q=q, k=k, v=v)

    def give(self, **arguments: Any) -> None:
        self.given |= arguments

    def give_strides(self, **tensors: Tensor) -> None:
        for name, x in tensors.items():
            self.given |= {f"{name}_{axis}": x.stride(i) for i, axis in enumerate(("batch", "head", "time"))}

    def run(self, kernel: Any, grid: tuple[int, ...], **own: Any) -> None:
        launch(kernel, grid, self.given | own, self.warps)

    def sum_keys(self) -> None:
        """Gives sums [B, H, M + 1, N, V] and norms [B, H, M + 1, N]."""
        like = self.given["gamma"]
        self.give(sums=like.new_empty(self.state_shape), norms=like.new_empty(self.state_shape[:-1]))
        self.run(sum_keys, self.state_grid, weight=self.given["k_weight"], bias=self.given["k_bias"])


def capability(device: torch.device) -> int:
    """The GPU's compute capability, 90 for 9.0; the newest that there are tiles for, for the interpreter."""
    if device.type != "cuda":
        return max(TILES)
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def to_kernel_order(x: Tensor, feature_map: str, columns: int) -> Tensor:
    """[B, H, F', V] -> [B, H, N, V]."""
    if feature_map == "hedgehog":
        x = x.unflatten(2, (2, columns)).transpose(2, 3).flatten(2, 3)
    return pad(x, (0, 0, 0, feature_order(feature_map, columns) - x.shape[2])).contiguous()


def from_kernel_order(x: Tensor, feature_map: str, columns: int) -> Tensor:
    """[B, H, N, V] -> [B, H, F', V]."""
    if feature_map == "hedgehog":
        return x[:, :, : 2 * columns].unflatten(2, (columns, 2)).transpose(2, 3).flatten(2, 3)
    return x[:, :, :columns]


def _vectors(gamma: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Room for what backward needs of every query, [B, H, J]: fp32, int32, fp32."""
    shape = q.shape[:3]
    return gamma.new_empty(shape), gamma.new_empty(shape, dtype=torch.int32), gamma.new_empty(shape)


def _for_model(q: Tensor, size: int) -> Tensor:
    """An empty [B, H, J, size], in memory as models want it: [B, J, H, size]."""
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], size).transpose(1, 2)


@torch.library.custom_op(op_name(__name__, "forward"), mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    logits: Tensor | None,
    key_logits: Tensor | None,
    gamma: Tensor,
    factor: Tensor,
    start_sums: Tensor | None,
    start_norms: Tensor | None,
    count: Tensor,
    feature_map: str,
    window: int,
    layout: str,
    scaling: float,
    softcap: float,
    terms: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows without gaps: out [B, H, J, V]; S [B, H, N, V] and z [B, H, N] over the first `count` [B] keys and the
    start's; and for backward c_n, the key that has it, and 1 / denominator, each [B, H, J]."""
    tensors = q, k, v, q_weight, k_weight, q_bias, k_bias, logits, key_logits, gamma, factor
    options = feature_map, window, layout, scaling, softcap, terms
    call = _Call((*tensors, start_sums, start_norms, count), options, backward=False)
    call.sum_keys()
    out = _for_model(q, v.shape[3])
    top, best, inverse = _vectors(gamma, q)
    call.give_strides(out=out)
    call.run(attend, call.grid, out=out, top=top, best=best, inverse=inverse)
    sums, norms = (call.given[name][:, :, -1].clone() for name in ("sums", "norms"))
    return out, sums, norms, top, best, inverse


@_forward.register_fake
def _forward_fake(q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    gamma, feature_map = rest[5], rest[10]
    norms = gamma.new_empty(*q.shape[:2], feature_order(feature_map, (q if q_weight is None else q_weight).shape[-1]))
    return _for_model(q, v.shape[3]), gamma.new_empty(*norms.shape, v.shape[3]), norms, *_vectors(gamma, q)


@torch.library.custom_op(op_name(__name__, "backward"), mutates_args=())
def _backward(
    grads: Sequence[Tensor],
    results: Sequence[Tensor],
    tensors: Sequence[Tensor | None],
    needs: Sequence[bool],
    feature_map: str,
    window: int,
    layout: str,
    scaling: float,
    softcap: float,
    terms: str,
) -> list[Tensor]:
    """Gradients of q, k, v; of q W + b and k W + b, [B, H, J, F]; of the logarithms of the linear term's weight and of
    the key's, [B, H, J]; of the start's S and z.

    grads: of out, S and z. results: out, c_n, the key that has it, 1 / denominator. needs: of q, k, v, the map of q,
    anything of the map of k. Gradients of what is not needed are empty."""
    call = _Call(tensors, (feature_map, window, layout, scaling, softcap, terms), backward=True)
    q, k, v, gamma = (call.given[name] for name in ("q", "k", "v", "gamma"))
    need_q, need_k, need_v, need_q_map, need_k_map = needs
    grad, (out, top, best, inverse) = grads[0], results
    call.give(grad=grad, top=top, best=best, inverse=inverse, end_sums=grads[1], end_norms=grads[2])
    call.give(delta=-(grad.float() * out.float()).sum(-1) * inverse)
    call.give_strides(grad=grad)

    def room(shape: Sequence[int], needed: bool, dtype: torch.dtype = torch.float32) -> Tensor:
        return gamma.new_empty(shape if needed else 0, dtype=dtype)

    columns = (*q.shape[:3], call.given["F"])
    mapped = feature_map != "elu"
    dq, dk, dv = room(q.shape, need_q, q.dtype), room(k.shape, need_k, k.dtype), room(v.shape, need_v, v.dtype)
    dy_q, dy_k = room(columns, need_q_map and mapped), room(columns, need_k_map and mapped)
    dlinear, dkey = torch.empty_like(top), torch.zeros_like(top)
    call.give(phi=gamma.new_empty(*q.shape[:3], call.given["N"]))
    call.give(dlinear=dlinear, dq=dq, dk=dk, dv=dv, dy_q=dy_q, dy_k=dy_k, dkey=dkey)
    call.sum_keys()
    call.run(backward_queries, call.grid, NEED_X=need_q, NEED_MAP=dy_q.numel() > 0)
    call.give(dsums=call.given["sums"], dnorms=call.given["norms"])  # in their place
    call.run(sum_queries, call.state_grid)
    dstart = [call.given[name][:, :, 0].clone() for name in ("dsums", "dnorms")]
    if need_k or need_k_map:
        call.run(backward_keys, call.key_grid[:2], NEED_X=need_k, NEED_MAP=dy_k.numel() > 0)
    if need_v:
        call.run(backward_values, call.key_grid)
    return [dq, dk, dv, dy_q, dy_k, dlinear, dkey, *dstart]


@_backward.register_fake
def _backward_fake(grads: Any, results: Any, tensors: Any, needs: Any, feature_map: str, *rest: Any) -> list[Tensor]:
    q, k, v, q_weight, gamma = (tensors[i] for i in (0, 1, 2, 3, 9))
    top = gamma.new_empty(q.shape[:3])
    dx = [x.new_empty(x.shape if need else 0) for x, need in zip((q, k, v), needs[:3], strict=True)]
    mapped = [need and feature_map != "elu" for need in needs[3:]]
    dy = [gamma.new_empty((*q.shape[:3], q_weight.shape[2]) if need else 0) for need in mapped]
    return [*dx, *dy, torch.empty_like(top), torch.empty_like(top), *(torch.empty_like(x) for x in grads[1:])]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    out, _, _, *vectors = output
    ctx.options = inputs[len(_TENSORS) :]
    ctx.save_for_backward(out, *vectors, *inputs[: len(_TENSORS)])
    ctx.mark_non_differentiable(*vectors)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    out, top, best, inverse, *tensors = ctx.saved_tensors
    q, k, _, q_weight, _, _, _, logits, key_logits, gamma, factor, *_ = tensors
    need = dict(zip(_TENSORS, ctx.needs_input_grad, strict=False))
    q_map, k_map = (need[f"{x}_weight"] or need[f"{x}_bias"] for x in "qk")
    needs = [need["q"], need["k"], need["v"], q_map, k_map or need["key_logits"]]
    size = feature_order(ctx.options[0], (q if q_weight is None else q_weight).shape[-1])
    state = gamma.new_zeros(*q.shape[:2], size, out.shape[3]), gamma.new_zeros(*q.shape[:2], size)
    dout = torch.zeros_like(out) if grads[0] is None else grads[0]
    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    given = [dout, *(zero if grad is None else grad.contiguous() for zero, grad in zip(state, grads[1:3], strict=True))]
    found = _backward(given, [out, top, best, inverse], tensors, needs, *ctx.options)
    dq, dk, dv, dy_q, dy_k, dlinear, dkey, dsums, dnorms = found
    has_window = ctx.options[1] > 0 and ctx.options[5] != "linear"

    def weight(needed: bool, x: Tensor, dy: Tensor) -> Tensor | None:
        """Of W [H, D, F], from x [B, H or K, J, D] and the gradient of x W."""
        if not needed or not dy.numel():
            return None
        dy = dy.unflatten(1, (x.shape[1], -1))
        return torch.einsum("bkjd,bkgjf->kgdf", x.float(), dy).flatten(0, 1)

    dlogits = dkey_logits = None
    if need["logits"]:
        inside = logits - top < QUERY_BOUND if has_window else torch.zeros_like(top, dtype=torch.bool)
        dlogits = dlinear * inside
    if need["key_logits"]:
        dkey_logits = dkey * (key_logits.abs() < KEY_BOUND)
    total = dlinear.sum((0, 2))
    return (
        dq if need["q"] else None,
        dk if need["k"] else None,
        dv if need["v"] else None,
        weight(need["q_weight"], q, dy_q),
        weight(need["k_weight"], k, dy_k),
        dy_q.sum((0, 2)) if need["q_bias"] and dy_q.numel() else None,
        dy_k.sum((0, 2)) if need["k_bias"] and dy_k.numel() else None,
        dlogits,
        dkey_logits,
        # The gradients of all weights sum to 0, so the window's sum is the linear term's, with the other sign.
        (-total / gamma if has_window else torch.zeros_like(total)) if need["gamma"] else None,
        total / factor if need["factor"] else None,
        dsums if need["start_sums"] else None,
        dnorms if need["start_norms"] else None,
        *(None for _ in range(7)),
    )


_forward.register_autograd(_differentiate, setup_context=_setup)


def _rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    count: Tensor | None,
    maps: HybridMaps,
    *,
    scaling: float,
    softcap: float | None,
    state: KVState | None,
    terms: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows without gaps, as `attend_in_rows` asks for."""
    name = maps.config.feature_map
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    columns = maps.q_weight.shape[2] if hasattr(maps, "q_weight") else maps.head_dim
    weights = [getattr(maps, f"{side}_{part}", None) for part in ("weight", "bias") for side in "qk"]
    gamma, factor = maps.factors()
    if terms == "window":
        factor = torch.zeros_like(gamma)
    start: tuple[Tensor | None, Tensor | None] = None, None
    if state is not None:
        sums = torch.cat([state.sums, state.norms[..., None]], -1)
        sums = to_kernel_order(sums, name, columns)
        start = sums[..., :-1].contiguous(), sums[..., -1].contiguous()
    if count is None:
        count = torch.full((q.shape[0],), q.shape[2], device=q.device)
    out, sums, norms, *_ = _forward(
        q,
        k,
        v,
        *(x if x is None else x.float().contiguous() for x in weights),
        *(x if x is None else x.contiguous() for x in (maps.query_logits(q), maps.key_logits(k))),
        gamma,
        factor,
        *start,
        count,
        name,
        maps.config.window,
        maps.config.layout,
        scaling,
        softcap or 0.0,
        terms,
    )
    return out, from_kernel_order(sums, name, columns), from_kernel_order(norms[..., None], name, columns)[..., 0]


def triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: HybridMaps,
    *,
    valid: Tensor | None = None,
    state: KVState | None = None,
    consume_state: bool = False,
    **options: Any,
) -> tuple[Tensor, KVState | None]:
    """Hybrid attention by Triton kernels; arguments as for `hybrid_attention`."""
    if q.dtype not in PRECISIONS:
        raise ValueError(f"The backend triton takes {', '.join(map(str, PRECISIONS))}; got {q.dtype}.")
    if state is not None and q.shape[2] == 1 and not records_gradients(maps, state, q, k, v):
        return triton_decode_step(q, k, v, maps, valid=valid, state=state, consume_state=consume_state, **options)
    if valid is not None and bool(valid.all()):
        valid = None
    return attend_in_rows(_rows, q, k, v, maps, valid=valid, state=state, **options)
