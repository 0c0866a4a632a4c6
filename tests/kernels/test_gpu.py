"""The Triton kernels on a GPU are the definition, for sizes up to 256: `make test-gpu`.

A handful of calls takes a minute, as each compiles kernels of its own.
"""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800)]
PHASES = (Phase.explicit, Phase.generate)  # no shrinking: every case compiles


@pytest.fixture(autouse=True)
def interpreted_as_on_gpus(gpu, request):
    if gpu.type == "cpu":
        request.getfixturevalue("numbers_of_gpus")


def assert_near(found, exact, limit, floor=1e-3):
    """Error beside size; what should be 0 may be `floor` times the limit."""
    error = (found.detach().double().cpu() - exact).norm()
    assert error <= limit * (exact.norm() + floor), f"{error / (exact.norm() + floor):.1e} of its size"


@settings(max_examples=16, deadline=None, derandomize=True, phases=PHASES)
@given(data=st.data())
def test_output_and_gradients_are_the_references(gpu, grid_cases, data):
    case = data.draw(grid_cases)
    with torch.no_grad():
        exact = case.run("reference")
    gradients = case.gradients("reference")
    there = case.on(gpu, torch.float32)
    with torch.no_grad():
        assert_near(there.run("triton"), exact, 5e-3)
    for found, gradient in zip(there.gradients("triton"), gradients, strict=True):
        # Gradients of all tokens sum up in a parameter, and may cancel.
        assert_near(found, gradient, 5e-3, floor=1)


@settings(max_examples=8, deadline=None, derandomize=True, phases=PHASES)
@given(data=st.data())
def test_parts_and_steps_are_the_whole(gpu, grid_cases, data):
    case = data.draw(grid_cases)
    with torch.no_grad():
        exact, state = case.run("reference", return_state=True)
        found, after = case.on(gpu, torch.float32).run_in_parts("triton", case.cuts)
    assert_near(found, exact, 5e-3)
    assert torch.equal(after.length.cpu(), state.length)
    assert_near(after.sums, state.sums, 5e-3)
    assert_near(after.norms, state.norms, 5e-3)


@settings(max_examples=8, deadline=None, derandomize=True, phases=PHASES)
@given(data=st.data(), dtype=st.sampled_from((torch.bfloat16, torch.float16)))
def test_in_half_precision_errors_are_at_most_twice_the_references(gpu, grid_cases, data, dtype):
    half = data.draw(grid_cases).on(torch.device("cpu"), dtype)
    with torch.no_grad():
        exact = half.on(torch.device("cpu"), torch.float64).run("reference")
        plain = (half.run("reference").double() - exact).norm()
        error = (half.on(gpu, dtype).run("triton").double().cpu() - exact).norm()
    assert error <= 2 * plain + 1e-6 * exact.norm()
