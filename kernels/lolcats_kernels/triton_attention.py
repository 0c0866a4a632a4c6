"""Hybrid attention by Triton kernels: their launches, forward and backward, registered with torch.

Letters: see ../README.md and `triton_parts`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .maps import HybridMaps
from .rows import RowResults, attend_in_rows
from .spec import KEY_BOUND, QUERY_BOUND, CallSpec, NoRoom, op_name
from .state import KeySums, KVState, records_gradients
from .triton_backward import backward_keys, backward_queries, backward_values, sum_queries
from .triton_decoding import triton_decode_step
from .triton_forward import attend, sum_keys
from .triton_parts import (
    PRECISIONS,
    contiguous,
    from_kernel_order,
    launch,
    map_arguments,
    padded,
    padded_features,
    strides,
    to_kernel_order,
    window_arguments,
)

# By compute capability, then by the largest head: (tokens of a chunk, warps) forward, and backward.
TILES = {
    80: {64: ((32, 8), (32, 8)), 128: ((32, 8), (32, 8)), 256: ((16, 8), (16, 8))},
    90: {64: ((64, 8), (32, 8)), 128: ((64, 8), (32, 8)), 256: ((16, 8), (16, 8))},
}
# In place of these for bf16, where they were measured. Products of fp32 take minutes to compile in such chunks.
BF16_TILES = {90: {128: ((128, 8), (64, 4))}}
LEAST = 16  # tokens of a chunk: matrix units take no fewer
PART_DV = 64  # of values and S that one program takes, where it does not need all


T = TypeVar("T")
_FITTING: dict[tuple[Any, ...], int] = {}  # chunks for which there was room, where the table's are too large


class Inputs(NamedTuple):
    """What `_forward` differentiates."""

    q: Tensor  # [B, H, T, D]
    k: Tensor  # [B, K, T, D]
    v: Tensor  # [B, K, T, Dv]
    q_weight: Tensor | None  # [H, D, F], fp32 as all that follows
    k_weight: Tensor | None
    q_bias: Tensor | None  # [H, F]
    k_bias: Tensor | None
    query_logits: Tensor | None  # [B, H, T], with "exp"
    key_logits: Tensor | None  # [B, H, T], with "exp"
    gamma: Tensor  # [H]
    linear_weight: Tensor  # [H]
    initial_sums: Tensor | None  # [B, H, N, Dv]
    initial_norms: Tensor | None  # [B, H, N]
    sinks: Tensor | None  # [H]; None where there is no window


class Results(NamedTuple):
    """What `_forward` gives."""

    out: Tensor  # [B, H, T, Dv]
    sums: Tensor  # [B, H, N, Dv], over the keys that were asked for and the initial state's
    norms: Tensor  # [B, H, N]
    m: Tensor  # [B, H, T]: c_n
    m_index: Tensor  # [B, H, T]: the key that has it; -1 for the sink
    inv_denominator: Tensor  # [B, H, T]


class Kept(NamedTuple):
    """What backward needs of `Results`."""

    out: Tensor
    m: Tensor
    m_index: Tensor
    inv_denominator: Tensor


class Gradients(NamedTuple):
    """What `_backward` gives; empty where it is not needed."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dy_q: Tensor  # [B, H, T, F], of q W + b
    dy_k: Tensor  # [B, H, T, F], of k W + b
    dlog_weight: Tensor  # [B, H, T], of log λ
    dkey_logits: Tensor  # [B, H, T], of the logarithm of the key's weight
    dinitial_sums: Tensor
    dinitial_norms: Tensor


class Needs(NamedTuple):
    """Which gradients are asked for: of q_map and k_map, of anything that the features of q and k are made with."""

    q: bool
    k: bool
    v: bool
    q_map: bool
    k_map: bool


_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? q_weight, Tensor? k_weight, Tensor? q_bias, Tensor? k_bias, "
    "Tensor? query_logits, Tensor? key_logits, Tensor gamma, Tensor linear_weight, Tensor? initial_sums, "
    "Tensor? initial_norms, Tensor? sinks"
)


@dataclass(frozen=True)
class Cut:
    """How the kernels of one call cut its rows, and the arguments that say so."""

    inputs: Inputs
    spec: CallSpec
    L: int
    warps: int

    @classmethod
    def of(cls, inputs: Inputs, spec: CallSpec, *, backward: bool) -> Cut:
        known = max(x for x in TILES if x <= capability(inputs.q.device))
        tiles = TILES[known] | (BF16_TILES.get(known, {}) if inputs.q.dtype == torch.bfloat16 else {})
        size = max(inputs.q.shape[3], inputs.v.shape[3])
        return cls(inputs, spec, *tiles[next(fits for fits in tiles if fits >= size)][backward])

    @classmethod
    def run(cls, run: Callable[[Cut], T], inputs: Inputs, spec: CallSpec, *, backward: bool) -> T:
        """What `run` gives for the largest chunk, of the table's or shorter, for which the GPU has room."""
        cut = cls.of(inputs, spec, backward=backward)
        sizes = inputs.q.shape[3], inputs.v.shape[3], inputs.q.dtype, inputs.q.device
        key = *sizes, spec.config, backward, cut.L
        cut = replace(cut, L=_FITTING.get(key, cut.L))
        while True:
            try:
                return run(cut)
            except NoRoom:
                if cut.L <= LEAST:
                    raise
                cut = replace(cut, L=cut.L // 2)
                _FITTING[key] = cut.L

    @property
    def num_chunks(self) -> int:
        """M."""
        return -(-self.inputs.q.shape[2] // self.L)

    @property
    def part_dv(self) -> int:
        return min(PART_DV, padded(self.inputs.v.shape[3]))

    @property
    def query_grid(self) -> tuple[int, int]:
        return self.num_chunks, self.inputs.q.shape[0] * self.inputs.q.shape[1]

    @property
    def key_grid(self) -> tuple[int, int]:
        return self.num_chunks, self.inputs.k.shape[0] * self.inputs.k.shape[1]

    @property
    def value_parts(self) -> int:
        return -(-self.inputs.v.shape[3] // self.part_dv)

    @property
    def state_grid(self) -> tuple[int, int]:
        return self.query_grid[1], self.value_parts

    def sizes(self) -> dict[str, Any]:
        """Arguments of all kernels."""
        q, k, v = self.inputs.q, self.inputs.k, self.inputs.v
        feature_dim = _feature_dim(self.inputs, self.spec)
        return {
            **{"T": q.shape[2], "D": q.shape[3], "Dv": v.shape[3], "F": feature_dim, "M": self.num_chunks},
            **{"H": q.shape[1], "G": q.shape[1] // k.shape[1], "L": self.L},
            **{"BLOCK_D": padded(q.shape[3]), "BLOCK_DV": padded(v.shape[3]), "PART_DV": self.part_dv},
            **{"BLOCK_F": padded(feature_dim), "N": padded_features(self.spec.config.map, feature_dim)},
            "PRECISION": PRECISIONS[q.dtype],
        }

    def of_map(self) -> dict[str, Any]:
        """Arguments of the kernels that make features."""
        return map_arguments(self.spec.config.map, exp=self.inputs.query_logits is not None)

    def sum_keys(self, num_summed: Tensor) -> KeySums:
        """S and z in front of every chunk, and at the end."""
        x, made = self.inputs, _room_for_sums(self.inputs, self.spec, self.num_chunks + 1)
        launch(
            sum_keys,
            self.state_grid,
            self.warps,
            {
                **{"k": x.k, "v": x.v, "weight": x.k_weight, "bias": x.k_bias, "key_logits": x.key_logits},
                **{"initial_sums": x.initial_sums, "initial_norms": x.initial_norms, "num_summed": num_summed},
                **{"sums": made.sums, "norms": made.norms, "HAS_INITIAL": x.initial_sums is not None},
                **strides(k=x.k, v=x.v),
                **self.sizes(),
                **self.of_map(),
            },
        )
        return made


def capability(device: torch.device) -> int:
    """The GPU's compute capability, 90 for 9.0; the newest that there are tiles for, for the interpreter."""
    if device.type != "cuda":
        return max(TILES)
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _feature_dim(inputs: Inputs, spec: CallSpec) -> int:
    """F."""
    return spec.config.map.feature_dim(inputs.q.shape[3], spec.config.feature_dim)


def _for_model(q: Tensor, size: int) -> Tensor:
    """An empty [B, H, T, size], in memory as models want it: [B, T, H, size]."""
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], size).transpose(1, 2)


def _room_for_sums(inputs: Inputs, spec: CallSpec, *chunks: int) -> KeySums:
    """[B, H, *chunks, N, Dv] and [B, H, *chunks, N]."""
    shape = *inputs.q.shape[:2], *chunks, padded_features(spec.config.map, _feature_dim(inputs, spec))
    return KeySums(inputs.gamma.new_empty(*shape, inputs.v.shape[3]), inputs.gamma.new_empty(shape))


def _room(inputs: Inputs, spec: CallSpec) -> Results:
    """Room for what `_forward` gives."""
    new, shape = inputs.gamma.new_empty, inputs.q.shape[:3]
    vectors = new(shape), new(shape, dtype=torch.int32), new(shape)
    return Results(_for_model(inputs.q, inputs.v.shape[3]), *_room_for_sums(inputs, spec), *vectors)


def _decoded(arguments: Sequence[Any]) -> tuple[Inputs, Tensor, CallSpec]:
    """What `_forward` takes."""
    inputs, (num_summed, *spec) = arguments[: len(Inputs._fields)], arguments[len(Inputs._fields) :]
    return Inputs(*inputs), num_summed, CallSpec.decode(*spec)


@torch.library.custom_op(
    op_name(__name__, "forward"),
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor num_summed, {CallSpec.SCHEMA}) -> ({', '.join(['Tensor'] * len(Results._fields))})",
)
def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    """Rows without gaps. Takes `Inputs`; num_summed [B]: how many first keys of each row enter S and z; the encoded
    spec. Returns the tensors of `Results`."""
    inputs, num_summed, spec = _decoded(arguments)
    return Cut.run(partial(_run_forward, num_summed), inputs, spec, backward=False)


def _run_forward(num_summed: Tensor, cut: Cut) -> Results:
    x = cut.inputs
    sums, norms = cut.sum_keys(num_summed)
    made = _room(x, cut.spec)
    launch(
        attend,
        cut.query_grid,
        cut.warps,
        {
            **{"q": x.q, "k": x.k, "v": x.v, "q_weight": x.q_weight, "k_weight": x.k_weight, "q_bias": x.q_bias},
            **{"k_bias": x.k_bias, "query_logits": x.query_logits, "key_logits": x.key_logits, "gamma": x.gamma},
            **{"linear_weight": x.linear_weight, "sinks": x.sinks, "HAS_SINKS": x.sinks is not None},
            **{"sums": sums, "norms": norms, "out": made.out},
            **{"m": made.m, "m_index": made.m_index, "inv_denominator": made.inv_denominator},
            **strides(q=x.q, k=x.k, v=x.v, out=made.out),
            **cut.sizes(),
            **cut.of_map(),
            **window_arguments(cut.spec),
        },
    )
    return made._replace(sums=sums[:, :, -1].clone(), norms=norms[:, :, -1].clone())


@_forward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, _, spec = _decoded(arguments)
    return _room(inputs, spec)


@torch.library.custom_op(
    op_name(__name__, "backward"),
    mutates_args=(),
    schema=(
        "(Tensor grad, Tensor dsums, Tensor dnorms, Tensor[] kept, Tensor?[] inputs, Tensor num_summed, "
        f"bool[] needs, {CallSpec.SCHEMA}) -> ({', '.join(['Tensor'] * len(Gradients._fields))})"
    ),
)
def _backward(
    grad: Tensor,
    dsums: Tensor,
    dnorms: Tensor,
    kept: Sequence[Tensor],
    inputs: Sequence[Tensor | None],
    num_summed: Tensor,
    needs: Sequence[bool],
    *spec: Any,
) -> tuple[Tensor, ...]:
    """grad, dsums, dnorms: gradients of out, S and z. -> the tensors of `Gradients`."""
    run = partial(_run_backward, grad, dsums, dnorms, Kept(*kept), num_summed, Needs(*needs))
    return Cut.run(run, Inputs(*inputs), CallSpec.decode(*spec), backward=True)  # type: ignore[arg-type]


def _run_backward(
    grad: Tensor, dsums: Tensor, dnorms: Tensor, made: Kept, num_summed: Tensor, need: Needs, cut: Cut
) -> Gradients:
    x = cut.inputs
    room = _gradient_room(x, cut.spec, need)
    weighted_q = x.gamma.new_empty(*x.q.shape[:3], _room_for_sums(x, cut.spec).norms.shape[-1])
    sums, norms = cut.sum_keys(num_summed)
    of_queries = {
        **{"q": x.q, "k": x.k, "k_weight": x.k_weight, "k_bias": x.k_bias, "key_logits": x.key_logits},
        **{"gamma": x.gamma, "m": made.m, "inv_denominator": made.inv_denominator, "grad": grad},
        **{"weighted_q": weighted_q, **cut.sizes(), **cut.of_map(), **window_arguments(cut.spec)},
    }
    ddenominator = -(grad.float() * made.out.float()).sum(-1) * made.inv_denominator
    launch(
        backward_queries,
        cut.query_grid,
        cut.warps,
        {
            **of_queries,
            **{"v": x.v, "ddenominator": ddenominator},
            **{"q_weight": x.q_weight, "q_bias": x.q_bias, "query_logits": x.query_logits},
            **{"linear_weight": x.linear_weight, "sums": sums, "norms": norms, "m_index": made.m_index},
            **{"dlog_weight": room.dlog_weight, "dq": room.dq, "dy_q": room.dy_q},
            **{"NEED_X": need.q, "NEED_MAP": room.dy_q.numel() > 0},
            **strides(q=x.q, k=x.k, v=x.v, grad=grad),
        },
    )
    later_sums, later_norms = sums, norms  # the gradients of all sums take their place
    launch(
        sum_queries,
        cut.state_grid,
        cut.warps,
        {
            **{
                "weighted_q": weighted_q,
                "ddenominator": ddenominator,
                "inv_denominator": made.inv_denominator,
                "grad": grad,
            },
            **{"dlast_sums": dsums, "dlast_norms": dnorms, "dsums": later_sums, "dnorms": later_norms},
            **strides(grad=grad),
            **cut.sizes(),
        },
    )
    if need.k or need.k_map:
        launch(
            backward_keys,
            cut.key_grid,
            cut.warps,
            {
                **of_queries,
                **{
                    "v": x.v,
                    "ddenominator": ddenominator,
                    "m_index": made.m_index,
                    "dlog_weight": room.dlog_weight,
                    "num_summed": num_summed,
                },
                **{"dsums": later_sums, "dnorms": later_norms},
                **{"dk": room.dk, "dy_k": room.dy_k, "dkey_logits": room.dkey_logits},
                **{"NEED_X": need.k, "NEED_MAP": room.dy_k.numel() > 0},
                **strides(q=x.q, k=x.k, v=x.v, grad=grad),
            },
        )
    if need.v:
        launch(
            backward_values,
            (*cut.key_grid, cut.value_parts),
            cut.warps,
            {
                **of_queries,
                **{"dsums": later_sums, "num_summed": num_summed, "dv": room.dv},
                **strides(q=x.q, k=x.k, grad=grad),
            },
        )
    return room._replace(dinitial_sums=later_sums[:, :, 0].clone(), dinitial_norms=later_norms[:, :, 0].clone())


def _gradient_room(inputs: Inputs, spec: CallSpec, needs: Needs) -> Gradients:
    """Room for what `_backward` gives."""
    q, k, v = inputs.q, inputs.k, inputs.v
    new, feature_dim, record = inputs.gamma.new_empty, _feature_dim(inputs, spec), spec.config.map
    y = (*q.shape[:3], feature_dim)
    initial = _room_for_sums(inputs, spec)
    return Gradients(
        dq=q.new_empty(q.shape if needs.q else 0),
        dk=k.new_empty(k.shape if needs.k else 0),
        dv=v.new_empty(v.shape if needs.v else 0),
        dy_q=new(y if needs.q_map and record.has_weight else 0),
        dy_k=new(y if needs.k_map and record.has_weight else 0),
        dlog_weight=new(q.shape[:3]),
        dkey_logits=inputs.gamma.new_zeros(q.shape[:3]),
        dinitial_sums=initial.sums,
        dinitial_norms=initial.norms,
    )


@_backward.register_fake
def _(
    grad: Any, dsums: Any, dnorms: Any, kept: Any, inputs: Any, num_summed: Any, needs: Any, *spec: Any
) -> tuple[Tensor, ...]:
    return _gradient_room(Inputs(*inputs), CallSpec.decode(*spec), Needs(*needs))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    given, num_summed, spec = _decoded(inputs)
    made = Results(*output)
    vectors = made.m, made.m_index, made.inv_denominator
    ctx.spec = spec.encode()
    ctx.save_for_backward(num_summed, *Kept(made.out, *vectors), *given)
    ctx.mark_non_differentiable(*vectors)
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, grad: Tensor | None, dsums: Tensor | None, dnorms: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    num_summed, *saved = ctx.saved_tensors
    kept, x = Kept(*saved[: len(Kept._fields)]), Inputs(*saved[len(Kept._fields) :])
    spec, need = CallSpec.decode(*ctx.spec), Inputs(*ctx.needs_input_grad[: len(Inputs._fields)])
    q_map, k_map = need.q_weight or need.q_bias, need.k_weight or need.k_bias or need.key_logits
    needs = [bool(needed) for needed in Needs(need.q, need.k, need.v, q_map, k_map)]  # type: ignore[arg-type]
    grad = torch.zeros_like(kept.out) if grad is None else grad
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    dsums, dnorms = (
        torch.zeros_like(room) if given is None else given.contiguous()
        for room, given in zip(_room_for_sums(x, spec), (dsums, dnorms), strict=True)
    )
    found = Gradients(*_backward(grad, dsums, dnorms, kept, x, num_summed, needs, *ctx.spec))
    log_weight = found.dlog_weight.sum((0, 2))
    query_logits = key_logits = None
    if x.query_logits is not None:  # the bounds pass no gradient
        inside = (
            x.query_logits - kept.m < QUERY_BOUND if spec.has_window else torch.zeros_like(kept.m, dtype=torch.bool)
        )
        query_logits = found.dlog_weight * inside
    if x.key_logits is not None:
        key_logits = found.dkey_logits * (x.key_logits.abs() < KEY_BOUND)
    gradients = Inputs(
        q=found.dq,
        k=found.dk,
        v=found.dv,
        q_weight=_weight_gradient(x.q, found.dy_q),
        k_weight=_weight_gradient(x.k, found.dy_k),
        q_bias=found.dy_q.sum((0, 2)) if x.q_bias is not None and found.dy_q.numel() else None,
        k_bias=found.dy_k.sum((0, 2)) if x.k_bias is not None and found.dy_k.numel() else None,
        query_logits=query_logits,
        key_logits=key_logits,
        # The gradients of all weights sum to 0, so the window's sum is the linear term's, with the other sign.
        gamma=-log_weight / x.gamma if spec.has_window else torch.zeros_like(log_weight),
        linear_weight=log_weight / x.linear_weight,
        initial_sums=found.dinitial_sums,
        initial_norms=found.dinitial_norms,
        sinks=None if x.sinks is None else _sink_gradient(x, kept, grad, found.dlog_weight),
    )
    wanted = (x if n else None for x, n in zip(gradients, need, strict=True))
    return *wanted, *(None for _ in range(1 + len(ctx.spec)))


def _sink_gradient(inputs: Inputs, kept: Kept, grad: Tensor, dlog_weight: Tensor) -> Tensor:
    """Of the sinks [H], whose value is 0. Where a sink is c_n it has the gradient of that too, unless that cancels."""
    assert inputs.sinks is not None
    weights = inputs.gamma[:, None] * (inputs.sinks[:, None] - kept.m).exp()
    each = -weights * kept.inv_denominator * (grad.float() * kept.out.float()).sum(-1)
    if inputs.query_logits is None:
        each = each + dlog_weight * (kept.m_index < 0)
    return each.sum((0, 2))


def _weight_gradient(x: Tensor, dy: Tensor) -> Tensor | None:
    """Of W [H, D, F], from x [B, H or K, T, D] and the gradient of x W, empty if there is none."""
    if not dy.numel():
        return None
    dy = dy.unflatten(1, (x.shape[1], -1))
    return torch.einsum("bkjd,bkgjf->kgdf", x.float(), dy).flatten(0, 1)


_forward.register_autograd(_differentiate, setup_context=_setup)


def _triton_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: HybridMaps,
    spec: CallSpec,
    *,
    sinks: Tensor | None,
    initial_state: KVState | None,
    num_summed: Tensor | None,
) -> RowResults:
    """Rows without gaps, as `attend_in_rows` asks for."""
    record = maps.feature_map
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    of_q, of_k = maps.q_parameters(torch.float32), maps.k_parameters(torch.float32)
    gamma, linear_weight = maps.term_weights()
    initial_sums = initial_norms = None
    if initial_state is not None:
        initial_sums = to_kernel_order(initial_state.sums, record)
        initial_norms = to_kernel_order(initial_state.norms[..., None], record)[..., 0].contiguous()
    if num_summed is None:
        num_summed = torch.full((q.shape[0],), q.shape[2], device=q.device)
    inputs = Inputs(
        q=q,
        k=k,
        v=v,
        q_weight=contiguous(of_q.weight),
        k_weight=contiguous(of_k.weight),
        q_bias=contiguous(of_q.bias),
        k_bias=contiguous(of_k.bias),
        query_logits=contiguous(maps.query_logits(q)),
        key_logits=contiguous(maps.key_logits(k)),
        gamma=gamma,
        linear_weight=linear_weight if spec.has_linear else torch.zeros_like(gamma),
        initial_sums=initial_sums,
        initial_norms=initial_norms,
        sinks=contiguous(sinks) if spec.has_window else None,
    )
    made = Results(*_forward(*inputs, num_summed, *spec.encode()))
    sums = from_kernel_order(made.sums, record, maps.feature_dim)
    norms = from_kernel_order(made.norms[..., None], record, maps.feature_dim)[..., 0]
    return RowResults(made.out, KeySums(sums, norms))


def triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: HybridMaps,
    spec: CallSpec,
    *,
    sinks: Tensor | None = None,
    valid: Tensor | None = None,
    initial_state: KVState | None = None,
    return_state: bool = False,
    consume_state: bool = False,
) -> tuple[Tensor, KVState | None]:
    """Hybrid attention by Triton kernels; arguments as for `hybrid_attention`."""
    if q.dtype not in PRECISIONS:
        raise ValueError(f"The backend triton takes {', '.join(map(str, PRECISIONS))}; got {q.dtype}.")
    if initial_state is not None and q.shape[2] == 1 and not records_gradients(maps, initial_state, q, k, v):
        return triton_decode_step(
            *(q, k, v, maps, spec),
            sinks=sinks,
            valid=valid,
            initial_state=initial_state,
            return_state=return_state,
            consume_state=consume_state,
        )
    if valid is not None and bool(valid.all()):
        valid = None
    return attend_in_rows(
        partial(_triton_rows, sinks=sinks),
        *(q, k, v, maps, spec),
        valid=valid,
        initial_state=initial_state,
        return_state=return_state,
    )
