"""Decoding by one Triton kernel, under the interpreter, is the definition's step."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from lolcats_kernels import FEATURE_MAPS, LAYOUTS, TERMS, KVState

pytest.importorskip("triton")

from lolcats_kernels import triton_decoding

pytestmark = pytest.mark.usefixtures("numbers_of_gpus")
NAMES = ("sums", "norms", "keys", "values", "length")


def steps(case, backend, begin, waiting=0, **options):
    """Outputs of the tokens from `begin` on, one by one after the reference's state, and the last state."""
    sizes = {"value_dim": case.v.shape[3], "waiting": waiting, "dtype": case.k.dtype}
    state = KVState.empty(case.maps, case.q.shape[0], case.k.shape[1], **sizes)
    if begin:
        _, state = case.part(0, begin).run("reference", return_state=True, waiting=waiting)
    outs = []
    for at in range(begin, case.q.shape[2]):
        out, state = case.part(at, at + 1).run(backend, initial_state=state, return_state=True, **options)
        outs.append(out)
    return torch.cat(outs, 2), state


def assert_same_states(case, found, expected):
    # Slots that the window has not reached, or has left, may hold anything.
    live = expected.live_slots(case.maps.config)[1][:, None, :, None]
    for name in NAMES:
        x, y = getattr(found, name), getattr(expected, name)
        if name in ("keys", "values"):
            x, y = torch.where(live, x, 0), torch.where(live, y, 0)
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@settings(max_examples=25, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))
@given(data=st.data())
def test_steps_are_the_references(small_cases, data):
    case = data.draw(small_cases).to(torch.float32)
    time = case.q.shape[2]
    begin = data.draw(st.integers(max(0, time - 4), time - 1))
    waiting = data.draw(st.sampled_from((case.maps.config.waiting, case.maps.config.waiting, 0)))
    with torch.no_grad():
        out, state = steps(case, "triton", begin, waiting, consume_state=data.draw(st.booleans()))
        expected, last = steps(case, "reference", begin, waiting)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert_same_states(case, state, last)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [0, 1, 3, 20])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_from_the_first_token(make_case, layout, window, feature_map):
    """Rings fill and turn, and terraces end: more keys at once than the kernel takes."""
    sizes = {"batch": 1, "key_heads": 1, "time": 45 if window == 20 else 10, "head_dim": 5, "value_dim": 7}
    factor = {0: "affine", 1: "one"}.get(window, "exp")
    sizes["decay"] = feature_map == "hedgehog"
    case = make_case(window=window, layout=layout, feature_map=feature_map, linear_factor=factor, **sizes)
    case = case.to(torch.float32)
    begin = 36 if window == 20 else 0
    with torch.no_grad():
        out, state = steps(case, "triton", begin, consume_state=True)
        expected, last = steps(case, "reference", begin)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert_same_states(case, state, last)


@pytest.mark.parametrize(("window", "decay"), [(0, False), (1, True), (5, True)])
def test_through_several_turns_of_the_waiting_keys(make_case, window, decay):
    """After prompts of all lengths from 0 to 16, with steps in which a row pauses, beams that change places, and a
    second prompt; what the slots of keys that are in the sums hold does not matter."""
    sizes = {"batch": 17, "key_heads": 1, "group": 1, "time": 44, "head_dim": 4, "linear_factor": "exp"}
    double = make_case(window=window, decay=decay, **sizes)
    double.valid = torch.arange(44) >= 16 - torch.arange(17)[:, None]
    double.valid[3, 20:23] = double.valid[8, 30] = False
    with torch.no_grad():
        exact, last = double.run("reference", return_state=True, waiting=16)
        case = double.to(torch.float32)
        out, state = case.part(0, 16).run("triton", return_state=True)
        assert state.waiting(case.maps.config) == 16
        outs, order = [out], torch.arange(17)
        for begin, end in [*((at, at + 1) for at in range(16, 38)), (38, 41), *((at, at + 1) for at in range(41, 44))]:
            if begin == 25:
                order = order.flip(0)
                state = state.select_batch(order)
            dead = ~state.live_slots(case.maps.config).live[:, None, :, None]
            for ring in (state.keys, state.values):
                ring.masked_fill_(dead, torch.nan if end == begin + 1 else 0)
            part = case.part(begin, end)
            part.q, part.k, part.v, part.valid = (x[order] for x in (part.q, part.k, part.v, part.valid))
            out, state = part.run("triton", initial_state=state, return_state=True, consume_state=True)
            outs.append(out[order])  # flipped again
    torch.testing.assert_close(torch.cat(outs, 2).double(), exact, rtol=1e-4, atol=1e-5)
    found = state.select_batch(order)
    for name in ("sums", "norms"):
        torch.testing.assert_close(getattr(found, name).double(), getattr(last, name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("terms", TERMS)
def test_padding_changes_nothing(make_case, terms):
    """Not even NaN; and rows go on by themselves."""
    case = make_case(batch=3, key_heads=1, time=12, window=4, terms=terms, softcap=2.0, dtype=torch.float32)
    case.valid = torch.tensor([True, False, True])[:, None].repeat(1, 12)
    case.valid[:, :8] = True
    clean = case.part(0, 12)
    for x in (case.q, case.k, case.v):
        x[1, :, 8:] = torch.nan
    with torch.no_grad():
        _, before = case.part(0, 8).run("reference", return_state=True)
        out, state = steps(case, "triton", 8)
        expected, last = steps(clean, "reference", 8)
    assert (out[1] == 0).all()
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert_same_states(case, state, last)
    for name in NAMES:
        assert torch.equal(getattr(state, name)[1], getattr(before, name)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", ["one", "exp"])
def test_as_exact_as_the_reference_in_the_same_dtype(make_case, dtype, factor):
    sizes = {
        "batch": 1,
        "key_heads": 1,
        "time": 40,
        "head_dim": 24,
        "feature_dim": 20,
        "window": 16,
        "linear_factor": factor,
    }
    case, double = make_case(dtype=dtype, **sizes), make_case(**sizes)
    with torch.no_grad():
        for a, b in zip(double.leaves, case.leaves, strict=True):
            a.copy_(b)
        exact = double.run("reference")[:, :, 34:]
        error = {name: (steps(case, name, 34)[0] - exact).square().mean().sqrt() for name in ("reference", "triton")}
    assert error["triton"] < 1.5 * error["reference"]


@pytest.mark.parametrize("waiting", [0, 16])
def test_in_place_where_the_state_is_consumed(make_case, waiting):
    case = make_case(batch=1, time=12, window=4, dtype=torch.float32)
    with torch.no_grad():
        _, state = steps(case, "triton", 10, waiting)  # its tensors are contiguous
        before = {name: getattr(state, name).clone() for name in NAMES}
        one = case.part(11, 12)
        out, after = one.run("triton", initial_state=state, return_state=True)
        only = one.run("triton", initial_state=state)
        assert all(torch.equal(getattr(state, name), before[name]) for name in NAMES)
        again, same = one.run("triton", initial_state=state, return_state=True, consume_state=True)
    assert torch.equal(out, again) and torch.equal(out, only)
    for name in NAMES:
        assert getattr(same, name).data_ptr() == getattr(state, name).data_ptr()
        assert torch.equal(getattr(same, name), getattr(after, name))


def test_with_gradients_a_step_is_a_row(make_case):
    case = make_case(batch=1, key_heads=1, time=6, window=2, dtype=torch.float32)
    grads = []
    for backend in ("reference", "triton"):
        leaves = [leaf.requires_grad_() for leaf in case.leaves]
        out, _ = case.run_in_parts(backend, [5])
        grads.append(torch.autograd.grad(out.sin().sum(), leaves))
    for found, exact in zip(*reversed(grads), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-4 * (1 + exact.abs().max().item()))


def test_registered(make_case, monkeypatch):
    """The schema names what is changed, and the step compiles as one graph."""
    calls = []
    real = triton_decoding._decode

    def note(*arguments):
        calls.append([x.clone() if isinstance(x, torch.Tensor) else x for x in arguments])
        return real(*arguments)

    case = make_case(batch=1, key_heads=1, time=7, window=3, linear_factor="exp", dtype=torch.float32)
    with torch.no_grad():
        _, state = case.part(0, 6).run("reference", return_state=True)
        one = case.part(6, 7)
        with monkeypatch.context() as patch:
            patch.setattr(triton_decoding, "_decode", note)
            out, after = one.run("triton", initial_state=state, return_state=True)
        torch.library.opcheck(real, tuple(calls[0]))

        @torch.compile(backend="aot_eager", fullgraph=True)
        def step(state):
            return one.run("triton", initial_state=state, return_state=True, consume_state=True)

        found, same = step(state)
    torch.testing.assert_close(found, out)
    for name in NAMES:
        torch.testing.assert_close(getattr(same, name), getattr(after, name))
