"""The operation as others call it: what lies in padding, dtypes, errors."""

import ast
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import lolcats_kernels
import pytest
import torch
from lolcats_kernels import KVState, hybrid_attention, hybrid_attention_weights

BACKENDS = ("reference", "chunked")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padding", ["left", "right", "holes", "empty"])
@pytest.mark.parametrize("window", [0, 8])
def test_nan_in_padding_does_not_leak(make_case, backend, padding, window):
    def results(poison):
        case = make_case(time=90, padding=padding, window=window)
        for x in (case.q, case.k, case.v):
            x.masked_fill_(~case.valid[:, None, :, None], poison)
        grads = case.gradients(backend)
        out, state = case.run(backend, return_state=True)
        more, _ = case.run(backend, initial_state=state, return_state=True)
        weights = hybrid_attention_weights(case.q, case.k, case.maps, scaling=0.4, valid=case.valid)
        return case.valid, [out, more, weights, *grads]

    valid, clean = results(0.0)
    _, poisoned = results(torch.nan)
    for a, b in zip(clean, poisoned, strict=True):
        assert torch.equal(a, b)
    invalid = ~valid[:, None, :, None].expand_as(clean[0])
    assert (clean[0][invalid] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision_inputs(make_case, dtype, backend):
    case = make_case(time=90, dtype=dtype)
    out = case.run(backend)
    assert out.dtype == dtype
    full = replace(case, q=case.q.float(), k=case.k.float(), v=case.v.float())
    assert torch.equal(out, full.run(backend).to(dtype))  # cast once, at the end
    assert case.gradients(backend)[0].dtype == dtype


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_reach_the_sums(make_case, backend):
    case = make_case(time=90, dtype=torch.float32)
    expected, grads = case.run(backend), case.gradients(backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(case.run(backend), expected)
        mixed = replace(case, v=case.v.bfloat16())
        assert mixed.run(backend).dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(case.gradients(backend, autocast=True), grads, strict=True))


def test_auto_is_chunked(make_case):
    case = make_case(time=90)
    assert torch.equal(case.run("auto"), case.run("chunked"))


def test_same_input_same_bits(make_case):
    case = make_case(time=200, dtype=torch.float32)
    assert torch.equal(case.run("chunked"), case.run("chunked"))
    assert all(torch.equal(a, b) for a, b in zip(case.gradients("chunked"), case.gradients("chunked"), strict=True))


def test_errors_say_what_is_wrong(make_case):
    case = make_case()
    q, k, v, maps = case.q, case.k, case.v, case.maps

    def fails(words, *inputs, **options):
        with pytest.raises(ValueError, match=words):
            hybrid_attention(*inputs, maps, scaling=0.4, **options)

    fails("terms is 'all'. Choose one of both, window, linear", q, k, v, terms="all")
    fails("backend is 'fast'. Choose one of auto, reference, chunked", q, k, v, backend="fast")
    fails("must be \\[batch, heads, time, head size\\]", q[0], k, v)
    fails("the same batch and time", q, k[:, :, 1:], v[:, :, 1:])
    fails("the same batch and time, of at least 1", q[:, :, :0], k[:, :, :0], v[:, :, :0])
    fails("feature maps are for 4 query heads of size 6", q[:, :3], k, v)
    fails("feature maps are for 4 query heads of size 6", q[..., :5], k[..., :5], v)
    fails("multiple of the key heads", q, k.repeat(1, 2, 1, 1)[:, :3], v.repeat(1, 2, 1, 1)[:, :3])
    fails("float dtypes", q.long(), k, v)
    fails("valid must be bool \\[2, 23\\]", q, k, v, valid=torch.ones(2, 23))
    fails("valid must be bool \\[2, 23\\]", q, k, v, valid=torch.ones(2, 22, dtype=torch.bool))
    fails("state's sums .* another batch", q, k, v, initial_state=KVState.empty(maps, 3, 2, dtype=torch.float64))
    fails("state holds torch.float32", q, k, v, initial_state=KVState.empty(maps, 2, 2))


def test_the_files_travel():
    """They lie flat inside merged models, where each is found by relative imports alone. Triton is for the files that
    are called so, inside `try`, and transformers for those that speak to it."""
    files = sorted(Path(lolcats_kernels.__file__).parent.glob("*.py"))
    speak = [file for file in files if file.name.startswith("hf_") or file.name.endswith("_lolcats.py")]
    assert len(speak) == 7
    for file in files:
        tree = ast.parse(file.read_text())
        guarded = {id(node) for block in ast.walk(tree) if isinstance(block, ast.Try) for node in ast.walk(block)}
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [name.name for name in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level != 1:
                names = [node.module or ""]
            allowed = set(sys.stdlib_module_names) | {"torch"} | ({"transformers"} if file in speak else set())
            if file.name.startswith("triton_") and id(node) in guarded:
                allowed.add("triton")
            assert {name.split(".")[0] for name in names} <= allowed, file.name


WITHOUT_TRITON = """
import sys

sys.modules["triton"] = None  # as if it were not installed
import torch
from lolcats_kernels import HybridConfig, HybridMaps, hybrid_attention

maps, x = HybridMaps(HybridConfig(), 2, 8), torch.ones(1, 2, 3, 8)
assert hybrid_attention(x, x, x, maps, scaling=1.0).shape == x.shape
try:
    hybrid_attention(x, x, x, maps, scaling=1.0, backend="triton")
except ImportError as error:
    print(error)
assert not [name for name in sys.modules if name.startswith("transformers")]
"""


def test_without_triton():
    """All else works, and what is asked for is not replaced. Nor is transformers needed."""
    environment = {**os.environ, "PYTHONPATH": str(Path(lolcats_kernels.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "The backend triton needs the package triton, which is for Linux: pip install triton, or lolcats[triton].\n"
    )
