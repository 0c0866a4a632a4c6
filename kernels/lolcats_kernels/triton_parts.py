"""What the Triton kernels of hybrid attention are made of. `triton_forward` and `triton_backward` hold those of whole
rows, `triton_sums` what both take, `triton_decoding` that of one token; `triton_launches` launches those of rows.

Letters: see ../README.md. Sizes that matrix units take are padded to powers of two, 16 at least: BLOCK_D, BLOCK_DV,
BLOCK_F, and N, the features. PART_DV is the part of Dv that a program takes, or takes at a time.

A program takes one chunk of one row (a query head of one sequence). Keys that some of the chunk's queries see by
softmax lie in the chunks from `first_chunk` on; these are weighed one by one. Earlier keys enter by their sums, which
lie in memory for every chunk, see `triton_sums`. The kernels' order of features: of a map that gives more than one for
each number of y = x W + b, those of one y are neighbours.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .feature_map import FeatureMap
from .spec import KEY_BOUND as _KEY_BOUND
from .spec import QUERY_BOUND as _QUERY_BOUND
from .spec import CallSpec, NoRoom

try:
    import triton
    import triton.language as tl
except ImportError as error:  # transformers asks for every module that it finds imported outside of such a block
    raise ImportError(
        "The backend triton needs the package triton, which is for Linux: pip install triton, or lolcats[triton]."
    ) from error

QUERY_BOUND, KEY_BOUND = tl.constexpr(_QUERY_BOUND), tl.constexpr(_KEY_BOUND)

# What products take, by the inputs' dtype: bf16, or fp32 in one of Triton's precisions. fp16 has too few exponents for
# features, and beside its own error one product of TF32 would show.
PRECISIONS = {torch.float32: "ieee", torch.bfloat16: "bf16", torch.float16: "tf32x3"}
INTERPRETED = triton.knobs.runtime.interpret


def launch(kernel: Any, grid: tuple[int, ...], warps: int, arguments: dict[str, Any]) -> None:
    """Runs the kernel with those of the arguments that it has. A tensor that is None is one that it does not read.

    Raises NoRoom, before anything runs, if the GPU lacks shared memory or registers for it.
    """
    unread = next(x for x in arguments.values() if isinstance(x, Tensor))
    arguments = {name: unread if arguments[name] is None else arguments[name] for name in kernel.arg_names}
    device = unread.device
    if device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"The backend triton needs tensors on a CUDA device; got {device}.")
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        try:
            kernel[grid](**arguments, num_warps=warps, num_stages=1)
        except triton.runtime.errors.OutOfResources as error:
            raise no_room(error.required, error.name, error.limit) from error


def no_room(required: int, name: str, limit: int) -> NoRoom:
    return NoRoom(
        f"The Triton kernels need {required:,} of {name} for heads and features of these sizes, and the GPU has "
        f"{limit:,}. Use the backend chunked."
    )


def shared_memory(device: torch.device) -> int | None:
    """Bytes that a program can have; None where there is no such limit, as under the interpreter."""
    if device.type != "cuda":
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    limit: int = triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
    return limit


def operand_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of what products take, and of what lies in memory between kernels."""
    return dtype if dtype == torch.bfloat16 else torch.float32


def strides(**tensors: Tensor) -> dict[str, int]:
    """The arguments that say how to step through tensors [B, H or K, T, size] whose last steps are 1."""
    axes = ("batch", "head", "time")
    return {f"{name}_{axis}": x.stride(i) for name, x in tensors.items() for i, axis in enumerate(axes)}


def map_arguments(record: FeatureMap, *, exp: bool) -> dict[str, Any]:
    """The arguments that say how features are made; the map's own Triton functions are among them."""
    return {
        "ACTIVATION": record.triton_activation,
        "GRADIENT": record.triton_gradient,
        "HAS_WEIGHT": record.has_weight,
        "HAS_BIAS": record.has_bias,
        "EXP": exp,
    }


def window_arguments(spec: CallSpec) -> dict[str, Any]:
    """The arguments that say which keys softmax sees, and how it weighs them."""
    return {
        "scaling": spec.scaling,
        "softcap": spec.softcap or 0.0,
        "SOFTCAP": spec.softcap is not None,
        "WINDOW": spec.config.window,
        "TERRACED": spec.config.layout == "terraced",
        "HAS_WINDOW": spec.has_window,
    }


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def padded(size: int) -> int:
    """The next power of two, 16 at least: what matrix units take."""
    return max(16, 1 << (size - 1).bit_length())


def padded_features(record: FeatureMap, feature_dim: int) -> int:
    """N."""
    return record.num_features(padded(feature_dim))


def to_kernel_order(x: Tensor, record: FeatureMap) -> Tensor:
    """[B, H, F', Dv] -> [B, H, N, Dv]."""
    feature_dim = x.shape[2] // record.features_each
    x = x.unflatten(2, (record.features_each, feature_dim)).transpose(2, 3).flatten(2, 3)
    return pad(x, (0, 0, 0, padded_features(record, feature_dim) - x.shape[2])).contiguous()


def from_kernel_order(x: Tensor, record: FeatureMap, feature_dim: int) -> Tensor:
    """[B, H, N, Dv] -> [B, H, F', Dv]."""
    x = x[:, :, : record.num_features(feature_dim)]
    return x.unflatten(2, (feature_dim, record.features_each)).transpose(2, 3).flatten(2, 3)


@triton.jit
def tile(x, first, stride, num_tokens, size, L: tl.constexpr, SIZE: tl.constexpr):
    """Tokens [first, first + L) of x: [L, SIZE]; zeros beyond its tokens and its size."""
    t, i = (first + tl.arange(0, L))[:, None], tl.arange(0, SIZE)[None, :]
    return tl.load(x + t.to(tl.int64) * stride + i, mask=(t < num_tokens) & (i < size), other=0)


@triton.jit
def put(x, value, first, stride, num_tokens, size, L: tl.constexpr, SIZE: tl.constexpr):
    t, i = (first + tl.arange(0, L))[:, None], tl.arange(0, SIZE)[None, :]
    value = value.to(x.dtype.element_ty)
    tl.store(x + t.to(tl.int64) * stride + i, value, mask=(t < num_tokens) & (i < size))


@triton.jit
def vector(x, first, num_tokens, L: tl.constexpr):
    """x[first : first + L], fp32, zeros beyond its tokens."""
    t = first + tl.arange(0, L)
    return tl.load(x + t, mask=t < num_tokens, other=0).to(tl.float32)


@triton.jit
def indices(x, first, num_tokens, L: tl.constexpr):
    t = first + tl.arange(0, L)
    return tl.load(x + t, mask=t < num_tokens, other=-1)


@triton.jit
def put_vector(x, value, first, num_tokens, L: tl.constexpr):
    t = first + tl.arange(0, L)
    tl.store(x + t, value, mask=t < num_tokens)


@triton.jit
def window_start(position, WINDOW: tl.constexpr, TERRACED: tl.constexpr):
    """The first key that the query at `position` sees by softmax; `position + 1` for window 0."""
    if TERRACED and WINDOW > 0:
        start = (position // WINDOW - 1) * WINDOW
    else:
        start = position + 1 - WINDOW
    return tl.maximum(start, 0)


@triton.jit
def first_chunk(c, L: tl.constexpr, WINDOW: tl.constexpr, TERRACED: tl.constexpr):
    """The first chunk of keys that chunk c of the queries weighs one by one."""
    return tl.minimum(window_start(c * L, WINDOW, TERRACED) // L, c)


@triton.jit
def end_chunk(j, M, L: tl.constexpr, WINDOW: tl.constexpr, TERRACED: tl.constexpr):
    """The first chunk of queries that sees chunk j of the keys by its sums: the first with first_chunk > j."""
    end = (j + 1) * L
    if TERRACED and WINDOW > 0:
        chunk = ((tl.cdiv(end, WINDOW) + 1) * WINDOW + L - 1) // L
    else:
        chunk = j + 1 + (WINDOW + L - 2) // L
    return tl.minimum(chunk, M)


@triton.jit
def operand(x, PRECISION: tl.constexpr):
    """x as products take it, and as it lies in memory between kernels."""
    if PRECISION == "bf16":
        x = x.to(tl.bfloat16)
    else:
        x = x.to(tl.float32)
    return x


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a b, summed in fp32."""
    if PRECISION == "bf16" or a.dtype != b.dtype:
        a, b = operand(a, PRECISION), operand(b, PRECISION)
    return tl.dot(a, b, input_precision="ieee" if PRECISION == "bf16" else PRECISION)


@triton.jit
def map_weight(weight, h, D, F, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr):
    """W of head h: [BLOCK_D, BLOCK_F]."""
    d, f = tl.arange(0, BLOCK_D)[:, None], tl.arange(0, BLOCK_F)[None, :]
    return tl.load(weight + (h * D + d) * F + f, mask=(d < D) & (f < F), other=0)


@triton.jit
def features(
    x,
    weight,
    bias,
    h,
    D,
    F,
    ACTIVATION: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """phi of x [tokens, BLOCK_D]: [tokens, N] fp32, zero in the padding."""
    y = x.to(tl.float32)
    if HAS_WEIGHT:
        w = map_weight(weight, h, D, F, BLOCK_D, BLOCK_F)
        y = dot(x, w, PRECISION)
        if PRECISION == "bf16":  # features are exponentials of y: W takes two products
            y += dot(x, w - w.to(tl.bfloat16).to(tl.float32), PRECISION)
    if HAS_BIAS:
        f = tl.arange(0, BLOCK_F)
        y += tl.load(bias + h * F + f, mask=f < F, other=0)[None, :]
    return ACTIVATION(y, F, x.shape[0], BLOCK_F)


@triton.jit
def features_backward(
    phi,
    dphi,
    weight,
    h,
    D,
    F,
    GRADIENT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(dx [tokens, BLOCK_D], the gradient of y = x W + b [tokens, BLOCK_F])."""
    dy = GRADIENT(phi, dphi, phi.shape[0], BLOCK_F)
    dx = dy
    if HAS_WEIGHT:
        dx = dot(dy, tl.trans(map_weight(weight, h, D, F, BLOCK_D, BLOCK_F)), PRECISION)
    return dx, dy


@triton.jit
def capped(scores, softcap):
    """(softcap tanh(scores / softcap), its slope)."""
    ratio = 1 - 2 / (1 + tl.exp(2 * scores / softcap))
    return softcap * ratio, 1 - ratio * ratio


@triton.jit
def window_scores(
    products,
    n,
    i,
    scaling,
    softcap,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    TERRACED: tl.constexpr,
):
    """(scores of queries n and keys i, -inf for what softmax does not see; the soft cap's slope).

    products: q . k of these, and either way round: n and i are a row and a column.
    """
    scores = products * scaling
    slope = tl.full(products.shape, 1.0, tl.float32)
    if SOFTCAP:
        scores, slope = capped(scores, softcap)
    seen = (i <= n) & (i >= window_start(n, WINDOW, TERRACED))
    return tl.where(seen, scores, float("-inf")), slope


@triton.jit
def is_older(n, i, WINDOW: tl.constexpr, TERRACED: tl.constexpr):
    """Whether key i is older than the window of query n, where n and i are a row and a column."""
    return (i <= n) & (i < window_start(n, WINDOW, TERRACED))


@triton.jit
def has_older(c, j, L: tl.constexpr, WINDOW: tl.constexpr, TERRACED: tl.constexpr):
    """Whether chunk j has a key that is older than the window of some query of chunk c."""
    return j * L < window_start(c * L + L - 1, WINDOW, TERRACED)


@triton.jit
def sums_end(c, M, T, L: tl.constexpr, WINDOW: tl.constexpr, TERRACED: tl.constexpr):
    """How many keys are in the sums that chunk c of the queries sees; those beyond the last chunk see all."""
    return tl.where(c < M, first_chunk(c, L, WINDOW, TERRACED) * L, T)


@triton.jit
def later_ends(end, M, T, segment, L: tl.constexpr, WINDOW: tl.constexpr, TERRACED: tl.constexpr):
    """The keys at which the sums of the queries from chunk `end` on are taken: those within a segment, and those of all
    segments after it."""
    next_segment = tl.minimum(((end - 1) // segment + 1) * segment, M)
    return sums_end(end, M, T, L, WINDOW, TERRACED), sums_end(next_segment, M, T, L, WINDOW, TERRACED)


@triton.jit
def forgotten(entered, earlier, later, T):
    """By a decay, between the entries of key `earlier` and of key `later`, as an exponent, fp32.

    entered [T + 1]: the sum of g over the keys before each. It is in fp64, so that the differences are exact at any
    length.
    """
    before = tl.load(entered + tl.minimum(earlier, T))
    return (tl.load(entered + tl.minimum(later, T)) - before).to(tl.float32)


@triton.jit
def kept(entered, earlier, later, T):
    """What a decay leaves between the entries of key `earlier` and of key `later`: at most 1."""
    return tl.exp(-forgotten(entered, earlier, later, T))


@triton.jit
def kept_of(key, query):
    """What a decay leaves of keys for queries, a row and a column, of their `forgotten` since the same key; of keys
    that are older than the query's window. Others get 1 at most."""
    return tl.exp(tl.minimum(key - query, 0))


@triton.jit
def slope_logits(x, slope, h, D, BLOCK_D: tl.constexpr):
    """x [tokens, BLOCK_D] . slope of head h: [tokens] fp32."""
    return tl.sum(x.to(tl.float32) * head_slope(slope, h, D, BLOCK_D), 1)


@triton.jit
def head_slope(slope, h, D, BLOCK_D: tl.constexpr):
    """[1, BLOCK_D]."""
    d = tl.arange(0, BLOCK_D)
    return tl.load(slope + h * D + d, mask=d < D, other=0)[None, :]


@triton.jit
def softplus(x):
    """log(1 + e^x), with fp32's digits where it is small too."""
    small = tl.exp(-tl.abs(x))
    wide = 1 + small
    log = tl.where(wide == 1, small, tl.log(wide) * (small / tl.where(wide == 1, 1, wide - 1)))
    return tl.maximum(x, 0) + log


@triton.jit
def key_weight(logits):
    """What phi_k has as a factor with "exp", of w . k."""
    return tl.exp(tl.minimum(tl.maximum(logits, -KEY_BOUND), KEY_BOUND))


@triton.jit
def lambda_beside(logits, m):
    """λ with "exp", of l + u . q and the window's largest score."""
    return tl.exp(tl.minimum(logits - m, QUERY_BOUND))


@triton.jit
def lambda_of(
    x,
    m,
    linear_weight,
    linear_logit,
    q_slope,
    h,
    D,
    EXP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """λ of each query, and whether its gradient reaches l + u . q (with EXP): [tokens] twice."""
    constant = tl.load(linear_weight + h)
    if EXP and HAS_WINDOW:
        logits = tl.load(linear_logit + h) + slope_logits(x, q_slope, h, D, BLOCK_D)
        weight, inside = constant * lambda_beside(logits, m), logits - m < QUERY_BOUND
    else:
        weight, inside = constant + tl.zeros_like(m), m != m
    return weight, inside
