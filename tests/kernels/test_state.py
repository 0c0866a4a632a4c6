"""States: any split gives the whole, any prefix gives what the whole gives, and the size is constant."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lolcats_kernels import FEATURE_MAPS, LAYOUTS, KVState


def tensors(state):
    return {name: getattr(state, name) for name in ("sums", "norms", "keys", "values", "length")}


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@settings(max_examples=120, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_split_gives_the_whole(cases, backend, data):
    case = data.draw(cases)
    waiting = data.draw(st.sampled_from((0, case.maps.config.waiting)))
    with torch.no_grad():
        out, state = case.run_in_parts(backend, case.cuts, waiting)
        whole, expected = case.run("reference", return_state=True, waiting=waiting)
    torch.testing.assert_close(out, whole, rtol=1e-10, atol=1e-10)
    # Slots that the window has not reached, or has left, may hold anything.
    live = expected.live_slots(case.maps.config)[1][:, None, :, None]
    for name, x in tensors(state).items():
        y = tensors(expected)[name]
        if name in ("keys", "values"):
            x, y = x * live, y * live
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_prefix_gives_what_the_whole_gives(cases, data):
    case = data.draw(cases)
    length = data.draw(st.integers(1, case.q.shape[2]))
    with torch.no_grad():
        part, whole = case.part(0, length).run("chunked"), case.run("chunked")
    torch.testing.assert_close(part, whole[:, :, :length], rtol=1e-10, atol=1e-10)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_padding_gives_what_the_row_alone_gives(cases, data):
    case = data.draw(cases)
    with torch.no_grad():
        out = case.run("chunked")
        for row in range(out.shape[0]):
            index = torch.arange(out.shape[2]) if case.valid is None else case.valid[row].nonzero()[:, 0]
            alone = torch.zeros_like(out[row])
            if len(index):
                one = case.part(0, out.shape[2])
                one.q, one.k, one.v = (x[row : row + 1, :, index] for x in (case.q, case.k, case.v))
                one.valid = None
                alone[:, index] = one.run("chunked")[0]
            torch.testing.assert_close(out[row], alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [0, 1, 5])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("terms", ["both", "window", "linear"])
def test_decoding_one_by_one(make_case, layout, window, feature_map, terms, waits):
    case = make_case(time=23, window=window, layout=layout, feature_map=feature_map, terms=terms)
    with torch.no_grad():
        out, _ = case.run_in_parts("chunked", range(23), case.maps.config.waiting if waits else 0)
        torch.testing.assert_close(out, case.run("reference"), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("window", [0, 1, 5])
def test_keys_wait_for_the_sums(make_case, window, decay):
    """S and z change once in 16 tokens, rows at times of their own; a state that waits is part of the definition."""
    case = make_case(batch=3, time=60, window=window, decay=decay, linear_factor="exp")
    case.valid = torch.ones(3, 60, dtype=torch.bool)
    case.valid[1, :5] = case.valid[2, 20:27] = False
    with torch.no_grad():
        whole = case.run("reference")
        state, changes = KVState.empty(case.maps, 3, 2, waiting=16, dtype=torch.float64), [[], [], []]
        for at in range(60):
            out, after = case.part(at, at + 1).run("chunked", initial_state=state, return_state=True)
            torch.testing.assert_close(out, whole[:, :, at : at + 1], rtol=1e-10, atol=1e-10)
            for row in range(3):
                if not torch.equal(after.sums[row], state.sums[row]):
                    changes[row].append(int(after.length[row]))
            state = after
        folds = [max(window, 1) + 15 + 16 * n for n in range(4)]
        assert changes == [[end for end in folds if end <= seen] for seen in (60, 55, 53)]
        for begin in (2, 17, 40):
            for backend in ("reference", "chunked"):
                _, before = case.part(0, begin).run(backend, return_state=True, waiting=16)
                rest = case.part(begin, 60).run(backend, initial_state=before)
                torch.testing.assert_close(rest, whole[:, :, begin:], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [0, 5])
def test_decoding_after_prompts_of_different_lengths(make_case, layout, window, waits):
    """Left-padded prompts, then steps in which a row may pause."""
    case = make_case(batch=4, time=40, window=window, layout=layout)
    case.valid = torch.ones(4, 40, dtype=torch.bool)
    for row, pad in enumerate((0, 3, 11, 17)):
        case.valid[row, :pad] = False
    case.valid[1, 30] = case.valid[2, 33] = False
    with torch.no_grad():
        out, _ = case.run_in_parts("chunked", range(17, 40), case.maps.config.waiting if waits else 0)
        torch.testing.assert_close(out, case.run("reference"), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [0, 5, 70])
def test_gradients_pass_through_the_state(make_case, layout, window):
    case = make_case(time=90, window=window, layout=layout)
    expected = case.gradients("reference")
    out, _ = case.run_in_parts("chunked", (40, 41, 80))
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape).cos()
    grads = torch.autograd.grad((out * weight).sum(), case.leaves, allow_unused=True, materialize_grads=True)
    for got, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [0, 8])
def test_size_is_constant(make_case, layout, window):
    def state(time):
        return make_case(time=time, window=window, layout=layout).run("chunked", return_state=True)[1]

    short, long = state(1), state(200)
    assert {n: x.shape for n, x in tensors(short).items()} == {n: x.shape for n, x in tensors(long).items()}
    assert short.nbytes == long.nbytes == sum(x.numel() * x.element_size() for x in tensors(long).values())


def test_dtypes(make_case):
    case = make_case(dtype=torch.bfloat16)
    _, state = case.run("chunked", return_state=True)
    _, state = case.part(0, 1).run("chunked", initial_state=state, return_state=True)
    dtypes = {name: x.dtype for name, x in tensors(state).items()}
    assert dtypes == {
        "sums": torch.float32,
        "norms": torch.float32,
        "keys": torch.bfloat16,
        "values": torch.bfloat16,
        "length": torch.int64,
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_select_batch(make_case, layout):
    case = make_case(batch=3, time=30, layout=layout, padding="left")
    index = torch.tensor([2, 0, 2, 1])
    with torch.no_grad():
        _, state = case.part(0, 20).run("chunked", return_state=True)
        after = case.part(20, 30)
        expected = after.run("chunked", initial_state=state)[index]
        after.q, after.k, after.v, after.valid = (x[index] for x in (after.q, after.k, after.v, after.valid))
        selected = state.select_batch(index)
        assert selected.batch_size == 4
        torch.testing.assert_close(after.run("chunked", initial_state=selected), expected, rtol=1e-12, atol=1e-12)


def test_a_call_leaves_its_state_alone(make_case):
    for time in (1, 7):
        case = make_case(time=30, window=4)
        with torch.no_grad():
            _, state = case.part(0, 20).run("chunked", return_state=True)
            before = {name: x.clone() for name, x in tensors(state).items()}
            case.part(20, 20 + time).run("chunked", initial_state=state, return_state=True)
        for name, x in tensors(state).items():
            assert torch.equal(x, before[name])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [0, 4])
def test_a_consumed_state_is_decoded_in_place(make_case, layout, window):
    case = make_case(time=30, window=window, layout=layout)
    _, state = case.part(0, 23).run("chunked", return_state=True)
    one = case.part(23, 24)
    # Not where autograd needs the old values, nor against inference mode's rules.
    assert one.run("chunked", initial_state=state, return_state=True, consume_state=True)[1].sums is not state.sums
    with torch.inference_mode():
        _, inferred = case.part(0, 23).run("chunked", return_state=True)
    with torch.no_grad():
        expected, after = one.run("chunked", initial_state=inferred, return_state=True, consume_state=True)
        assert after.sums is not inferred.sums
        found, same = one.run("chunked", initial_state=state, return_state=True, consume_state=True)
    assert same.sums.data_ptr() == state.sums.data_ptr() and same.keys.data_ptr() == state.keys.data_ptr()
    torch.testing.assert_close(found, expected)
    for name, x in tensors(same).items():
        torch.testing.assert_close(x, tensors(after)[name])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_follows_a_state_is_not_in_its_tensors(make_case, layout):
    """Also where a step adds nothing to the sums: later steps may overwrite what they are given."""
    case = make_case(time=30, window=4, layout=layout)
    with torch.no_grad():
        _, state = case.part(0, 17).run("chunked", return_state=True)
        before = {name: x.clone() for name, x in tensors(state).items()}
        _, after = case.part(17, 18).run("chunked", initial_state=state, return_state=True)
        for begin in range(18, 30):
            one = case.part(begin, begin + 1)
            _, after = one.run("chunked", initial_state=after, return_state=True, consume_state=True)
    for name, x in tensors(state).items():
        assert torch.equal(x, before[name])


def test_empty_state_is_the_start(make_case):
    case = make_case()
    state = KVState.empty(case.maps, 2, 2, dtype=torch.float64)
    for backend in ("reference", "chunked"):
        torch.testing.assert_close(case.run(backend, initial_state=state), case.run(backend), rtol=1e-12, atol=1e-12)
