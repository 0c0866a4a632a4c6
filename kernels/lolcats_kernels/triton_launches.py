"""Launches of the Triton kernels of whole rows, forward and backward. Letters: see ../README.md and `triton_parts`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad, softplus

from .spec import CallSpec, NoRoom
from .state import KeySums
from .triton_backward import backward_keys, backward_queries, backward_values, map_gradients
from .triton_decay import decay_gradients
from .triton_forward import attend
from .triton_parts import (
    PRECISIONS,
    launch,
    map_arguments,
    no_room,
    operand_dtype,
    padded,
    padded_features,
    shared_memory,
    strides,
    window_arguments,
)
from .triton_sums import join_segments, key_features, run_sums


class Tile(NamedTuple):
    """What a program takes."""

    L: int  # tokens of a chunk
    warps: int


# By compute capability, then by the largest head: forward, and backward. Products of bf16, and of fp32.
_LARGE = {64: (Tile(64, 4), Tile(64, 4)), 128: (Tile(64, 4), Tile(64, 8)), 256: (Tile(32, 8), Tile(32, 8))}
_SMALL = {64: (Tile(32, 8), Tile(32, 8)), 128: (Tile(32, 8), Tile(32, 8)), 256: (Tile(16, 8), Tile(16, 8))}
BF16_TILES = {80: _SMALL, 89: _SMALL, 90: _LARGE, 100: _LARGE}
FP32_TILES = {80: _SMALL}
LEAST = 16  # tokens of a chunk: matrix units take no fewer
SUMS_BYTES = 65536  # of the part of S that a program holds at a time
PROGRAMS = 256  # that sums are cut into: about two for each multiprocessor of the largest GPUs

T = TypeVar("T")
_FITTING: dict[tuple[Any, ...], int] = {}  # chunks for which there was room, where the table's are too large


class Inputs(NamedTuple):
    """What forward differentiates."""

    q: Tensor  # [B, H, T, D]
    k: Tensor  # [B, K, T, D]
    v: Tensor  # [B, K, T, Dv]
    q_weight: Tensor | None  # [H, D, F], fp32 as all that follows
    k_weight: Tensor | None
    q_bias: Tensor | None  # [H, F]
    k_bias: Tensor | None
    q_slope: Tensor | None  # [H, D], with "exp"
    k_slope: Tensor | None
    linear_logit: Tensor | None  # [H], with "exp"
    decay_slope: Tensor | None  # [H, D], with a decay
    decay_bias: Tensor | None  # [H], with a decay
    gamma: Tensor  # [H]
    linear_weight: Tensor  # [H]
    initial_sums: Tensor | None  # [B, H, N, Dv]
    initial_norms: Tensor | None  # [B, H, N]
    sinks: Tensor | None  # [H]; None where there is no window


class Results(NamedTuple):
    """What forward gives."""

    out: Tensor  # [B, H, T, Dv]
    sums: Tensor  # [B, H, N, Dv], over the keys that were asked for and the initial state's
    norms: Tensor  # [B, H, N]
    m: Tensor  # [B, H, T]: c_n
    m_index: Tensor  # [B, H, T]: the key that has it; -1 for the sink. Empty with "exp"
    inv_denominator: Tensor  # [B, H, T]

    @classmethod
    def room(cls, inputs: Inputs, spec: CallSpec) -> Results:
        q, size, new = inputs.q, inputs.v.shape[3], inputs.gamma.new_empty
        sums = *q.shape[:2], padded_features(spec.config.map, feature_dim(inputs, spec))
        # In memory as models want it: [B, T, H, Dv].
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], size).transpose(1, 2)
        index = new(0 if _exp(spec) else q.shape[:3], dtype=torch.int32)
        return cls(out, new(*sums, size), new(sums), new(q.shape[:3]), index, new(q.shape[:3]))


class Keys(NamedTuple):
    """What `key_features` leaves."""

    phi_k: Tensor  # [B, H, T, N]; 0 for keys that enter no sums
    decay_logits: Tensor | None  # [B, H, T], with a decay: b + a . k; -inf for keys that enter no sums
    entered: Tensor | None  # [B, H, T + 1], with a decay: the sum of g over the keys before each, fp64


class RunningSums(NamedTuple):
    """What `run_sums` leaves, joined."""

    sums: Tensor  # [B, H, M, N, Dv]: in front of each chunk, within its segment
    norms: Tensor  # [B, H, M, N]
    starts: Tensor  # [B, H, segments, N, Dv]: in front of each segment
    start_norms: Tensor  # [B, H, segments, N]
    total: KeySums


@dataclass(frozen=True)
class Cut:
    """How the kernels of one call cut its rows, and the arguments that say so."""

    inputs: Inputs
    spec: CallSpec
    L: int
    warps: int

    @classmethod
    def of(cls, inputs: Inputs, spec: CallSpec, *, backward: bool) -> Cut:
        tiles = BF16_TILES if inputs.q.dtype == torch.bfloat16 else FP32_TILES
        by_size = tiles[max(x for x in tiles if x <= capability(inputs.q.device))]
        size = max(inputs.q.shape[3], inputs.v.shape[3])
        return cls(inputs, spec, *by_size[next(fits for fits in by_size if fits >= size)][backward])

    @classmethod
    def run(cls, run: Callable[[Cut], T], inputs: Inputs, spec: CallSpec, *, backward: bool) -> T:
        """What `run` gives for the largest chunk, of the table's or shorter, for which the GPU has room."""
        cut = cls.of(inputs, spec, backward=backward)
        sizes = inputs.q.shape[3], inputs.v.shape[3], inputs.q.dtype, inputs.q.device
        key = *sizes, spec.config, backward, cut.L
        cut = replace(cut, L=_FITTING.get(key, cut.L))
        limit = shared_memory(inputs.q.device)
        while True:
            try:
                if limit is not None and cut.least_shared > limit:
                    raise no_room(cut.least_shared, "shared memory", limit)
                return run(cut)
            except NoRoom:
                if cut.L <= LEAST:
                    raise
                cut = replace(cut, L=cut.L // 2)
                _FITTING[key] = cut.L

    @property
    def dtype(self) -> torch.dtype:
        """Of what lies in memory between kernels."""
        return operand_dtype(self.inputs.q.dtype)

    @property
    def rows(self) -> int:
        return self.inputs.q.shape[0] * self.inputs.q.shape[1]

    @property
    def num_chunks(self) -> int:
        """M."""
        return -(-self.inputs.q.shape[2] // self.L)

    @property
    def segment(self) -> int:
        """Chunks of a segment."""
        return -(-self.num_chunks // max(1, PROGRAMS // self.rows))

    @property
    def segments(self) -> int:
        return -(-self.num_chunks // self.segment)

    @property
    def num_features(self) -> int:
        """N."""
        return padded_features(self.spec.config.map, feature_dim(self.inputs, self.spec))

    @property
    def part_dv(self) -> int:
        """Of S, that a program holds at a time."""
        size, part = self.dtype.itemsize * self.num_features, padded(self.inputs.v.shape[3])
        while size * part > SUMS_BYTES and part > LEAST:
            part //= 2
        return part

    @property
    def least_shared(self) -> int:
        """Bytes of shared memory that a kernel needs at least: those of the second factor of its largest product. So
        what cannot fit is known before minutes of compilation."""
        size, features = self.inputs.q.shape[3], feature_dim(self.inputs, self.spec)
        weight = padded(size) * padded(features) if self.spec.config.map.has_weight else 0
        tokens = self.L * max(padded(size), self.part_dv)
        return self.dtype.itemsize * max(weight, self.num_features * self.part_dv, tokens)

    @property
    def value_parts(self) -> int:
        return -(-self.inputs.v.shape[3] // self.part_dv)

    @property
    def bands(self) -> int:
        """In how many chunks the windows of one chunk's queries begin, at most. The last of them begins less than a
        chunk after the first, or in terraces by a multiple of the window."""
        window, spread = self.spec.config.window, self.L - 1
        if self.spec.config.layout == "terraced" and window:
            spread = -(-spread // window) * window
        return -(-spread // self.L) + 1

    def arguments(self) -> dict[str, Any]:
        """Of all kernels."""
        x, (_, heads, tokens, size) = self.inputs, self.inputs.q.shape
        features, value_size = feature_dim(x, self.spec), x.v.shape[3]
        return {
            **x._asdict(),
            **strides(q=x.q, k=x.k, v=x.v),
            **{"T": tokens, "D": size, "Dv": value_size, "F": features},
            **{"M": self.num_chunks, "segment": self.segment, "segments": self.segments},
            **{"H": heads, "G": heads // x.k.shape[1], "L": self.L, "N": self.num_features},
            **{"BLOCK_D": padded(size), "BLOCK_DV": padded(value_size), "BLOCK_F": padded(features)},
            **{"PART_DV": self.part_dv, "PRECISION": PRECISIONS[x.q.dtype], "HAS_SINKS": x.sinks is not None},
            **{"DECAY": self.spec.config.decay, "BANDS": self.bands},
            **map_arguments(self.spec.config.map, exp=_exp(self.spec)),
            **window_arguments(self.spec),
        }

    def key_features(self, arguments: dict[str, Any]) -> Keys:
        x = self.inputs
        phi_k = x.q.new_empty(*x.q.shape[:3], self.num_features, dtype=self.dtype)
        logits = x.gamma.new_empty(x.q.shape[:3]) if self.spec.config.decay else None
        own = {"weight": arguments["k_weight"], "bias": x.k_bias, "slope": x.k_slope}
        own |= {"phi_k": phi_k, "decay_logits": logits}
        launch(key_features, (self.num_chunks, self.rows), self.warps, arguments | own)
        entered = None if logits is None else pad(softplus(logits).cumsum(2, dtype=torch.float64), (1, 0))
        return Keys(phi_k, logits, entered)

    def running_sums(
        self, arguments: dict[str, Any], a: Tensor, b: Tensor, initial: KeySums | None, delta: Tensor | None = None
    ) -> RunningSums:
        """Over the keys, of a = φk and b = v; with delta from the end over the queries, of the weighted φq and the
        gradient of out."""
        new, shape = self.inputs.gamma.new_empty, (*a.shape[:2], self.num_chunks, self.num_features)
        made = KeySums(a.new_empty(*shape, b.shape[3]), new(shape))
        shape = (*a.shape[:2], self.segments, self.num_features)
        totals = KeySums(new(*shape, b.shape[3]), new(shape))
        shrinks = new(shape[:3]) if self.spec.config.decay else None
        part_n, part_dv = min(self.num_features, 128), min(padded(b.shape[3]), 64)
        own = {"a": a, "b": b, "delta": delta, "sums": made.sums, "norms": made.norms, **strides(b=b)}
        own |= {"totals": totals.sums, "total_norms": totals.norms, "shrinks": shrinks, "REVERSE": delta is not None}
        own |= {"G": self.inputs.q.shape[1] // b.shape[1], "PART_N": part_n, "PART_DV": part_dv}
        grid = self.segments, self.rows, self.num_features // part_n * -(-b.shape[3] // part_dv)
        launch(run_sums, grid, 4, arguments | own)
        first = (None, None) if initial is None else initial
        starts, total_sums = self._joined(totals.sums, first[0], shrinks, self.dtype)
        start_norms, total_norms = self._joined(totals.norms, first[1], shrinks, torch.float32)
        return RunningSums(*made, starts, start_norms, KeySums(total_sums, total_norms))

    def _joined(
        self, totals: Tensor, initial: Tensor | None, shrinks: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """What comes before each segment, in `dtype`, and the sum of all: of totals [B, H, segments, ...]."""
        starts, last = torch.empty_like(totals, dtype=dtype), totals.new_empty(totals[:, :, 0].shape)
        size = last[0, 0].numel()
        block = min(1024, padded(size))
        given: dict[str, Any] = {
            "totals": totals,
            "initial": initial,
            "HAS_INITIAL": initial is not None,
            "shrinks": shrinks,
            "DECAY": shrinks is not None,
            "starts": starts,
        }
        given |= {"last": last, "SIZE": size, "segments": self.segments, "BLOCK": block}
        launch(join_segments, (self.rows, -(-size // block)), 4, given)
        return starts, last


def capability(device: torch.device) -> int:
    """The GPU's compute capability, 90 for 9.0; the newest that there are tiles for, for the interpreter."""
    if device.type != "cuda":
        return max(BF16_TILES)
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def feature_dim(inputs: Inputs, spec: CallSpec) -> int:
    """F."""
    return spec.config.map.feature_dim(inputs.q.shape[3], spec.config.feature_dim)


def _exp(spec: CallSpec) -> bool:
    return spec.config.linear_factor == "exp"


def forward(inputs: Inputs, num_summed: Tensor, waiting: int, spec: CallSpec) -> Results:
    """num_summed [B]: how many first keys of each row enter S and z; waiting: as for `Rows`, at most 16."""
    return Cut.run(partial(_forward, num_summed, waiting), inputs, spec, backward=False)


def _forward(num_summed: Tensor, waiting: int, cut: Cut) -> Results:
    made, arguments = Results.room(cut.inputs, cut.spec), cut.arguments()
    arguments |= {"num_summed": num_summed, "waiting": waiting}
    keys = cut.key_features(arguments)
    arguments |= keys._asdict()
    of_keys = cut.running_sums(arguments, keys.phi_k, cut.inputs.v, _initial(cut.inputs))
    own = made._asdict() | of_keys._asdict() | strides(out=made.out)
    launch(attend, (cut.num_chunks, cut.rows, cut.value_parts), cut.warps, arguments | own)
    return made._replace(**of_keys.total._asdict())


def _initial(inputs: Inputs) -> KeySums | None:
    if inputs.initial_sums is None or inputs.initial_norms is None:
        return None
    return KeySums(inputs.initial_sums, inputs.initial_norms)


class OfOutputs(NamedTuple):
    """Gradients that backward is given, of out, S and z."""

    grad: Tensor
    dsums: Tensor
    dnorms: Tensor


def needed_room(inputs: Inputs, needs: Inputs) -> Inputs:
    """Room for the gradients of `inputs` that `needs`, of booleans, asks for; None for the others."""
    pairs = zip(inputs, needs, strict=True)
    return Inputs(*(x.new_empty(x.shape) if x is not None and need else None for x, need in pairs))  # type: ignore[arg-type]


def backward(
    given: OfOutputs, made: Results, inputs: Inputs, num_summed: Tensor, needs: Inputs, spec: CallSpec
) -> Inputs:
    """The gradients of `inputs` that `needs`, of booleans, asks for; None for the others. made: without S and z."""
    return Cut.run(partial(_backward, given, made, num_summed, needs), inputs, spec, backward=True)


def _backward(given: OfOutputs, made: Results, num_summed: Tensor, needs: Inputs, cut: Cut) -> Inputs:
    x, spec, exp = cut.inputs, cut.spec, _exp(cut.spec)
    found, arguments, forgets = needed_room(x, needs), cut.arguments(), spec.config.decay
    arguments |= {"num_summed": num_summed, "waiting": 0}
    q_map, k_map = needs.q_weight or needs.q_bias, needs.k_weight or needs.k_bias
    decay = forgets and (needs.k or needs.decay_slope or needs.decay_bias)
    vector = partial(x.gamma.new_empty, x.q.shape[:3])
    dlog_weight, delta, dkey_logits = vector(), vector(), vector() if exp else None
    keys = cut.key_features(arguments)
    weighted_q = torch.empty_like(keys.phi_k)
    dy_q, dy_k = (keys.phi_k.new_empty(*x.q.shape[:3], feature_dim(x, spec)) if n else None for n in (q_map, k_map))
    arguments |= made._asdict() | given._asdict() | strides(out=made.out, grad=given.grad) | keys._asdict()
    arguments |= {"delta": delta, "dlog_weight": dlog_weight, "weighted_q": weighted_q}
    arguments |= {"dq": found.q, "dk": found.k, "dv": found.v, "dy_q": dy_q, "dy_k": dy_k, "dkey_logits": dkey_logits}
    arguments |= {name: vector() if forgets else None for name in ("dlinear", "dentering", "ddecay_logits")}
    bands = *x.q.shape[:2], cut.num_chunks, cut.bands
    arguments["straddling"] = x.gamma.new_empty(bands) if forgets else None

    of_keys = cut.running_sums(arguments, keys.phi_k, x.v, _initial(x))._asdict()
    own: dict[str, Any] = {**of_keys, "NEED_X": needs.q, "NEED_MAP": q_map}
    launch(backward_queries, (cut.num_chunks, cut.rows), cut.warps, arguments | own)
    if not decay:
        of_keys.clear()  # they are large
    del own
    if needs.k or k_map or needs.k_slope or decay or needs.v or needs.initial_sums or needs.initial_norms:
        last = KeySums(given.dsums, given.dnorms)
        later = cut.running_sums(arguments, weighted_q, given.grad, last, delta)
        arguments |= {"dsums": later.sums, "dnorms": later.norms}
        arguments |= {"later": later.starts, "later_norms": later.start_norms}
        grid = cut.num_chunks, x.k.shape[0] * x.k.shape[1]
        if needs.k or k_map or needs.k_slope or decay:
            launch(backward_keys, grid, cut.warps, arguments | {"NEED_X": needs.k, "NEED_MAP": k_map})
        if needs.v:
            launch(backward_values, (*grid, cut.value_parts), cut.warps, arguments)
        found = found._replace(initial_sums=later.total.sums, initial_norms=later.total.norms)
        if decay:
            found = _with_decay(found, cut, arguments | of_keys)

    of_q = _map_gradients(cut, arguments, x.q, dy_q, dlog_weight if needs.q_slope else None)
    of_k = _map_gradients(cut, arguments, x.k, dy_k, dkey_logits if needs.k_slope else None)
    log_weight = dlog_weight.sum((0, 2))
    found = found._replace(
        q_weight=of_q.weight,
        k_weight=of_k.weight,
        q_bias=of_q.bias,
        k_bias=of_k.bias,
        q_slope=of_q.slope,
        k_slope=of_k.slope,
        linear_logit=log_weight,
        # The gradients of all weights sum to 0, so the window's sum is the linear term's, with the other sign.
        gamma=-log_weight / x.gamma if spec.has_window else torch.zeros_like(log_weight),
        linear_weight=log_weight / x.linear_weight,
    )
    if needs.sinks:
        found = found._replace(sinks=_sink_gradient(x, made, delta, None if exp else dlog_weight))
    return Inputs(*(gradient if need else None for gradient, need in zip(found, needs, strict=True)))  # type: ignore[arg-type]


def _with_decay(found: Inputs, cut: Cut, arguments: dict[str, Any]) -> Inputs:
    """`found` with the gradients of the decay's parameters, and in that of k what comes by the decay."""
    x, logits = cut.inputs, arguments["ddecay_logits"]
    assert x.decay_slope is not None
    launch(decay_gradients, (cut.num_chunks, cut.rows), 4, arguments)
    if found.k is not None:
        of_heads = logits.unflatten(1, (x.k.shape[1], -1)).transpose(2, 3)  # [B, K, T, G]
        found.k.add_(of_heads @ x.decay_slope.unflatten(0, (x.k.shape[1], -1)))
    slope = _map_gradients(cut, arguments, x.k, None, logits).slope
    return found._replace(decay_slope=slope, decay_bias=logits.sum((0, 2)))


class OfMap(NamedTuple):
    """Gradients of the parameters of one side's features; None where none is needed."""

    weight: Tensor | None
    bias: Tensor | None
    slope: Tensor | None


def _map_gradients(cut: Cut, arguments: dict[str, Any], x: Tensor, dy: Tensor | None, dlogits: Tensor | None) -> OfMap:
    """For x, q or k: from the gradients of x W + b and of the slope's logits."""
    if dy is None and dlogits is None:
        return OfMap(None, None, None)
    size, features = x.shape[3], arguments["F"]
    room = partial(cut.inputs.gamma.new_empty, *cut.inputs.q.shape[:2], cut.segments)
    made = OfMap(
        weight=None if dy is None else room(size, features),
        bias=room(features) if dy is not None and arguments["HAS_BIAS"] else None,
        slope=None if dlogits is None else room(size),
    )
    part_f = min(padded(features), 64)
    own = {"x": x, "dy": dy, "dlogits": dlogits, **strides(x=x), "G": cut.inputs.q.shape[1] // x.shape[1]}
    own |= {"dweight": made.weight, "dbias": made.bias, "dslope": made.slope, "PART_F": part_f}
    own |= {"HAS_WEIGHT": dy is not None, "HAS_BIAS": made.bias is not None, "EXP": dlogits is not None}
    grid = cut.segments, cut.rows, 1 if dy is None else -(-features // part_f)
    launch(map_gradients, grid, 4, arguments | own)
    return OfMap(*(x if x is None else x.sum((0, 2)) for x in made))


def _sink_gradient(inputs: Inputs, made: Results, delta: Tensor, dlog_weight: Tensor | None) -> Tensor:
    """Of the sinks [H], whose value is 0. Where a sink is c_n it has the gradient of that too, unless that cancels and
    dlog_weight is None."""
    assert inputs.sinks is not None
    weights = inputs.gamma[:, None] * (inputs.sinks[:, None] - made.m).exp()
    each = -weights * made.inv_denominator * delta
    if dlog_weight is not None:
        each = each + dlog_weight * (made.m_index < 0)
    return each.sum((0, 2))
