"""What the Triton kernels of hybrid attention are made of. `triton_forward` and `triton_backward` hold those of whole
rows, `triton_decoding` that of one token; `triton_attention` launches the former.

Letters: H query heads, K key heads, G = H / K, J tokens of a row, D head, V value head, F columns of a feature map,
L tokens of a block, M blocks, N features in the kernels' order. DP, VP, FP, N: padded to powers of two, 16 at least.

A program takes one block of one row (a query head of one sequence). Keys that some of the block's queries see by
softmax lie in the blocks from `first_block` on; these are weighed one by one. Earlier keys enter by their sums, which
`sum_keys` leaves at every block. Backward, `sum_queries` comes from the end with the gradients of those sums.
Features are computed where they are needed; only backward writes the queries', which it needs twice. Hedgehog's two of
column f, of softmax(x W) and of softmax(-x W), are neighbours.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:  # transformers asks for every module that it finds imported outside of such a block
    raise ImportError(
        "The backend triton needs the package triton, which is for Linux: pip install triton, or lolcats[triton]."
    ) from error

FLOOR = tl.constexpr(1e-12)  # of Hedgehog's features
QUERY_BOUND, KEY_BOUND = tl.constexpr(60.0), tl.constexpr(20.0)


# Of products of fp32, by the inputs' dtype: TF32 is as good as bf16 needs; beside fp16 its error would show.
PRECISIONS = {torch.float32: "ieee", torch.bfloat16: "tf32", torch.float16: "tf32x3"}
INTERPRETED = triton.knobs.runtime.interpret


def launch(kernel: Any, grid: tuple[int, ...], given: Mapping[str, Any], warps: int) -> None:
    """Runs the kernel with those of the given arguments that it names. A tensor that is None is one that it does not
    look at."""
    unused = given["q"]
    if not unused.is_cuda and not INTERPRETED:
        raise ValueError(f"The backend triton needs tensors on a CUDA device; got {unused.device}.")
    arguments = {name: unused if given[name] is None else given[name] for name in kernel.arg_names}
    with torch.cuda.device(unused.device) if unused.is_cuda else nullcontext():
        kernel[grid](**arguments, num_warps=warps, num_stages=1)


def padded(size: int) -> int:
    """The next power of two, 16 at least: what matrix units take."""
    return max(16, 1 << (size - 1).bit_length())


def feature_order(feature_map: str, columns: int) -> int:
    """N."""
    return padded(columns) * (2 if feature_map == "hedgehog" else 1)


@triton.jit
def tile(x, first, stride, count, size, L: tl.constexpr, SIZE: tl.constexpr):
    """Tokens [first, first + L) of x: [L, SIZE]; zeros beyond its count tokens and size columns."""
    row, column = (first + tl.arange(0, L))[:, None], tl.arange(0, SIZE)[None, :]
    return tl.load(x + row.to(tl.int64) * stride + column, mask=(row < count) & (column < size), other=0)


@triton.jit
def put(x, value, first, stride, count, size, L: tl.constexpr, SIZE: tl.constexpr):
    row, column = (first + tl.arange(0, L))[:, None], tl.arange(0, SIZE)[None, :]
    value = value.to(x.dtype.element_ty)
    tl.store(x + row.to(tl.int64) * stride + column, value, mask=(row < count) & (column < size))


@triton.jit
def vector(x, first, count, L: tl.constexpr):
    """x[first : first + L], fp32, zeros beyond count."""
    i = first + tl.arange(0, L)
    return tl.load(x + i, mask=i < count, other=0).to(tl.float32)


@triton.jit
def indices(x, first, count, L: tl.constexpr):
    i = first + tl.arange(0, L)
    return tl.load(x + i, mask=i < count, other=-1)


@triton.jit
def put_vector(x, value, first, count, L: tl.constexpr):
    i = first + tl.arange(0, L)
    tl.store(x + i, value, mask=i < count)


@triton.jit
def window_start(position, WINDOW: tl.constexpr, TERRACED: tl.constexpr):
    """The first key that the query at `position` sees by softmax; `position + 1` for window 0."""
    if TERRACED and WINDOW > 0:
        start = (position // WINDOW - 1) * WINDOW
    else:
        start = position + 1 - WINDOW
    return tl.maximum(start, 0)


@triton.jit
def first_block(m, L: tl.constexpr, WINDOW: tl.constexpr, TERRACED: tl.constexpr):
    """The first block of keys that block m of the queries weighs one by one."""
    return tl.minimum(window_start(m * L, WINDOW, TERRACED) // L, m)


@triton.jit
def end_block(j, M, L: tl.constexpr, WINDOW: tl.constexpr, TERRACED: tl.constexpr):
    """The first block of queries that sees block j of the keys by its sums: the first with first_block > j."""
    end = (j + 1) * L
    if TERRACED and WINDOW > 0:
        block = ((tl.cdiv(end, WINDOW) + 1) * WINDOW + L - 1) // L
    else:
        block = j + 1 + (WINDOW + L - 2) // L
    return tl.minimum(block, M)


@triton.jit
def _rounded(x):
    """fp32 to the nearest TF32; other dtypes as they are."""
    if x.dtype == tl.float32:
        x = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return x


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a b, summed in fp32. Of TF32 the matrix units do not read the lower bits, which would make all sums too small."""
    if PRECISION == "tf32":
        a, b = _rounded(a), _rounded(b)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def map_weight(weight, h, D, F, DP: tl.constexpr, FP: tl.constexpr):
    """W of head h: [DP, FP]."""
    d, f = tl.arange(0, DP)[:, None], tl.arange(0, FP)[None, :]
    return tl.load(weight + (h * D + d) * F + f, mask=(d < D) & (f < F), other=0)


@triton.jit
def features_of(
    x,
    weight,
    bias,
    h,
    D,
    F,
    MAP: tl.constexpr,
    L: tl.constexpr,
    DP: tl.constexpr,
    FP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """phi of x [L, DP]: [L, N] fp32, zero in padded columns."""
    x = x.to(tl.float32)
    if MAP == "elu":
        phi = tl.where(x > 0, x + 1, tl.exp(tl.minimum(x, 0)))
        phi = tl.where(tl.arange(0, DP)[None, :] < D, phi, 0)
    else:
        y = dot(x, map_weight(weight, h, D, F, DP, FP), PRECISION)
        f = tl.arange(0, FP)
        if MAP == "t2r":
            phi = tl.maximum(y + tl.load(bias + h * F + f, mask=f < F, other=0)[None, :], 0)
        else:
            both = tl.join(y, -y)  # [L, FP, 2]
            both = tl.where((f < F)[None, :, None], both, float("-inf"))
            both = tl.exp(both - tl.max(both, 1)[:, None, :])
            both = tl.maximum(both / tl.sum(both, 1)[:, None, :], FLOOR)
            phi = tl.reshape(tl.where((f < F)[None, :, None], both, 0), [L, 2 * FP])
    return phi


@triton.jit
def features_backward(
    x,
    phi,
    dphi,
    weight,
    h,
    D,
    F,
    MAP: tl.constexpr,
    L: tl.constexpr,
    DP: tl.constexpr,
    FP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(dx [L, DP], the gradient of x W + b [L, FP]); the second is dx again for elu."""
    if MAP == "elu":
        dx = dphi * tl.where(x.to(tl.float32) > 0, 1.0, phi)
        dy = dx
    else:
        if MAP == "t2r":
            dy = tl.where(phi > 0, dphi, 0)
        else:
            share = tl.reshape(phi * dphi, [L, FP, 2])
            both = share - tl.reshape(phi, [L, FP, 2]) * tl.sum(share, 1)[:, None, :]
            plus, minus = tl.split(both)
            dy = plus - minus
        dx = dot(dy, tl.trans(map_weight(weight, h, D, F, DP, FP)), PRECISION)
    return dx, dy


@triton.jit
def capped(scores, softcap):
    """(softcap tanh(scores / softcap), its slope)."""
    ratio = 1 - 2 / (1 + tl.exp(2 * scores / softcap))
    return softcap * ratio, 1 - ratio * ratio


@triton.jit
def window_scores(
    q,
    k,
    n,
    i,
    scaling,
    softcap,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    TERRACED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """([L, L] scores of queries n and keys i, -inf for what softmax does not see; the soft cap's slope)."""
    scores = dot(q, tl.trans(k), PRECISION) * scaling
    slope = tl.full([q.shape[0], k.shape[0]], 1.0, tl.float32)
    if SOFTCAP:
        scores, slope = capped(scores, softcap)
    start = window_start(n, WINDOW, TERRACED)
    seen = (i[None, :] <= n[:, None]) & (i[None, :] >= start[:, None])
    return tl.where(seen, scores, float("-inf")), slope


@triton.jit
def is_old(n, i, WINDOW: tl.constexpr, TERRACED: tl.constexpr):
    """[L, L] bool: whether key i is older than the window of query n."""
    start = window_start(n, WINDOW, TERRACED)
    return (i[None, :] <= n[:, None]) & (i[None, :] < start[:, None])


@triton.jit
def key_weight(logits, first, count, L: tl.constexpr):
    """The keys' weight in the linear term: [L]."""
    return tl.exp(tl.minimum(tl.maximum(vector(logits, first, count, L), -KEY_BOUND), KEY_BOUND))


@triton.jit
def linear_weight(logits, top, EXP: tl.constexpr, HAS_WINDOW: tl.constexpr, L: tl.constexpr):
    """The linear term's weight beside the window's largest: [L]."""
    if EXP and HAS_WINDOW:
        weight = tl.exp(tl.minimum(logits - top, QUERY_BOUND))
    else:
        weight = tl.full([L], 1.0, tl.float32)
    return weight
