"""The Triton kernels on a GPU are the definition, for sizes up to 256: `make test-gpu`.

A handful of calls takes a minute, as each compiles kernels of its own, so sizes come from a grid. Everywhere else these
tests are skipped, and the same checks are made once each, of small sizes under Triton's interpreter.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from lolcats_kernels.slots import attend_in_slots, decode_in_slots, pad_rows
from lolcats_kernels.state import KVState, SlotStates

pytest.importorskip("triton")

PHASES = (Phase.explicit, Phase.generate)  # no shrinking: every case compiles
CPU = torch.device("cpu")


def on_a_gpu(count):
    """A test of so many cases from the grid."""

    def mark(test):
        test = settings(max_examples=count, deadline=None, derandomize=True, phases=PHASES)(given(data=st.data())(test))
        return pytest.mark.gpu(pytest.mark.timeout(1800)(test))

    return mark


@pytest.fixture(autouse=True)
def interpreted_as_on_gpus(request):
    device = request.getfixturevalue("gpu") if request.node.get_closest_marker("gpu") else CPU
    if device == CPU:
        request.getfixturevalue("numbers_of_gpus")


def assert_near(found, exact, limit, floor=1e-3):
    """Error beside size; what should be 0 may be `floor` times the limit."""
    error = (found.detach().double().cpu() - exact).norm()
    assert error <= limit * (exact.norm() + floor), f"{error / (exact.norm() + floor):.1e} of its size"


def check_output_and_gradients(case, device):
    with torch.no_grad():
        exact = case.run("reference")
    gradients = case.gradients("reference")
    there = case.on(device, torch.float32)
    with torch.no_grad():
        assert_near(there.run("triton"), exact, 5e-3)
    for found, gradient in zip(there.gradients("triton"), gradients, strict=True):
        # Gradients of all tokens sum up in a parameter, and may cancel.
        assert_near(found, gradient, 5e-3, floor=1)


def check_parts(case, device):
    with torch.no_grad():
        exact, state = case.run("reference", return_state=True, waiting=case.maps.config.waiting)
        found, after = case.on(device, torch.float32).run_in_parts("triton", case.cuts)
    assert_near(found, exact, 5e-3)
    assert torch.equal(after.length.cpu(), state.length)
    assert_near(after.sums, state.sums, 5e-3)
    assert_near(after.norms, state.norms, 5e-3)


def check_steps(case, device, count=3):
    """The last tokens one by one, in place, after the state of those before."""
    time = case.q.shape[2]
    begin = max(0, time - count)
    there = case.on(device, torch.float32)
    waiting = case.maps.config.waiting
    sizes = {"value_dim": case.v.shape[3], "waiting": waiting}
    state = KVState.empty(there.maps, case.q.shape[0], case.k.shape[1], device=device, **sizes)
    with torch.no_grad():
        exact, last = case.run("reference", return_state=True, waiting=waiting)
        if begin:
            _, state = there.part(0, begin).run("triton", return_state=True)
        for at in range(begin, time):
            one = there.part(at, at + 1)
            found, state = one.run("triton", initial_state=state, return_state=True, consume_state=True)
            assert_near(found, exact[:, :, at : at + 1], 5e-3)
    assert_near(state.sums, last.sums, 5e-3)
    assert_near(state.norms, last.norms, 5e-3)


def check_slots(case, device, count=3):
    """A server's sequences: prompts in a flat batch, then token by token beside a row of padding. What lies in slots
    that nobody has written must not matter."""
    case = replace(case, valid=None, terms="both")
    batch, _, time, _ = case.q.shape
    begin = max(0, time - count)
    there = case.on(device, torch.float32)
    pages = []
    shapes = KVState.shapes(there.maps, batch + 2, case.k.shape[1], case.v.shape[3], case.maps.config.waiting)
    for shape in (shapes[name] for name in SlotStates._fields):
        size = torch.Size(shape[1:]).numel()
        page = torch.full((batch + 2, size + 3), torch.nan, dtype=torch.float32, device=device)
        pages.append(page[:, :size].view(shape))
    states, slots = SlotStates(*pages), torch.arange(batch, device=device).flip(0) + 1
    options = {"scaling": 0.4, "softcap": there.softcap, "sinks": there.sinks, "backend": "triton"}
    with torch.no_grad():
        exact = case.run("reference")
        if begin:
            q, k, v = (x[:, :, :begin].transpose(1, 2).flatten(0, 1) for x in (there.q, there.k, there.v))
            out = q.new_full((*q.shape[:2], v.shape[2]), torch.nan)
            for rows in pad_rows(torch.arange(batch + 1) * begin, torch.zeros(batch, dtype=torch.int64), slots):
                attend_in_slots(q, k, v, there.maps, states, rows, out, **options)
            assert_near(out.unflatten(0, (batch, begin)).transpose(1, 2), exact[:, :, :begin], 5e-3)
        padded = torch.cat([slots, slots.new_full((1,), -1)]).int()
        for at in range(begin, time):
            nan = torch.full((1,), torch.nan, device=device)
            q, k, v = (torch.cat([x[:, :, at], nan.expand(1, *x.shape[1::2])]) for x in (there.q, there.k, there.v))
            length = torch.full_like(padded, at)
            out = decode_in_slots(q, k, v, there.maps, states, padded, length, **options)
            assert_near(out[:batch], exact[:, :, at], 5e-3)
            assert (out[batch] == 0).all()


def check_half(case, device, dtype):
    """In half precision errors are at most twice the reference's."""
    half = case.on(CPU, dtype)
    with torch.no_grad():
        exact = half.on(CPU, torch.float64).run("reference")
        plain = (half.run("reference").double() - exact).norm()
        error = (half.on(device, dtype).run("triton").double().cpu() - exact).norm()
    assert error <= 2 * plain + 1e-6 * exact.norm()


@on_a_gpu(16)
def test_output_and_gradients_are_the_references(gpu, grid_cases, data):
    check_output_and_gradients(data.draw(grid_cases), gpu)


@on_a_gpu(8)
def test_parts_are_the_whole(gpu, grid_cases, data):
    check_parts(data.draw(grid_cases), gpu)


@on_a_gpu(12)
def test_steps_are_the_references(gpu, grid_cases, data):
    check_steps(data.draw(grid_cases), gpu)


@on_a_gpu(12)
def test_slots_hold_what_their_sequences_need(gpu, grid_cases, data):
    check_slots(data.draw(grid_cases), gpu)


@on_a_gpu(8)
def test_in_half_precision_errors_are_at_most_twice_the_references(gpu, grid_cases, data):
    check_half(data.draw(grid_cases), gpu, data.draw(st.sampled_from((torch.bfloat16, torch.float16))))


SAMPLE = {"time": 21, "cuts": (12, 13), "head_dim": 16, "value_dim": 24, "feature_dim": 8, "key_heads": 1, "sinks": 1.0}


@pytest.mark.parametrize("check", [check_output_and_gradients, check_parts, check_steps, check_slots])
@pytest.mark.parametrize("kind", [{"window": 8, "linear_factor": "exp", "padding": "left"}, {"window": 0}], ids=str)
def test_the_checks_under_the_interpreter(make_case, check, kind):
    check(make_case(**SAMPLE, **kind), CPU)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_under_the_interpreter(make_case, dtype):
    check_half(make_case(**SAMPLE, window=8, layout="terraced"), CPU, dtype)


def test_the_checks_see_an_error(make_case, monkeypatch):
    """Of 2% in one value."""
    case = make_case(**SAMPLE, window=8)
    plain = type(case).run

    def wrong(self, backend, **options):
        found = plain(self, backend, **options)
        if backend == "triton":
            (found if isinstance(found, torch.Tensor) else found[0])[:] *= 1.02
        return found

    monkeypatch.setattr(type(case), "run", wrong)
    for check in (check_output_and_gradients, check_parts, check_steps):
        with pytest.raises(AssertionError, match="of its size"):
            check(case, CPU)
