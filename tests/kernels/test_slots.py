"""A flat batch of many sequences, whose states lie in slots, gets what each sequence gets alone by the definition."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from lolcats_kernels import FEATURE_MAPS, LAYOUTS, LINEAR_FACTORS
from lolcats_kernels.slots import attend_in_slots, decode_in_slots, pad_rows
from lolcats_kernels.state import KVState, SlotStates

SCALING = 0.4


def empty_slots(case, number, waits, fill=torch.nan):
    """States whose slots hold what must not matter; with a gap after each, as in a server's pages. waits: keys may."""
    waiting = case.maps.config.waiting if waits else 0
    shapes = KVState.shapes(case.maps, number, case.k.shape[1], case.v.shape[3], waiting)
    found = []
    for name in SlotStates._fields:
        shape = shapes[name]
        size = torch.Size(shape[1:]).numel()
        dtype = torch.promote_types(case.k.dtype, torch.float32) if name in ("sums", "norms") else case.k.dtype
        pages = torch.full((number, size + 3), fill, dtype=dtype)
        found.append(pages[:, :size].view(shape))
    return SlotStates(*found)


@pytest.mark.parametrize("slots", [0, 3])
def test_states_in_slots_that_have_room_for_larger_ones(slots: int) -> None:
    shapes = [(4, 6, 5), (4, 6), (2, slots, 8), (2, slots, 5)]
    rooms = [(4, 8, 5), (4, 8), (2, 4, 8), (2, 4, 5)]
    pages = [torch.zeros(7, 3 + torch.Size(room).numel())[:, 3:].view(7, *room) for room in rooms]
    states = SlotStates.within(pages, shapes)
    for shape, page, state in zip(shapes, pages, states, strict=True):
        assert state.shape == (7, *shape) and state[0].is_contiguous()
        state[2] = 1  # a view of its own slot
        assert (page.flatten(1).sum(1) == torch.arange(7).eq(2) * state[2].numel()).all()


class Server:
    """Serves the rows of a case as sequences, some tokens of some of them at a time."""

    def __init__(self, case, slots, backend, waits):
        self.case, self.backend = case, backend
        self.options = {"scaling": SCALING, "softcap": case.softcap, "sinks": case.sinks, "backend": backend}
        self.states = empty_slots(case, int(max(slots)) + 2, waits)
        self.slots = torch.tensor(slots)
        self.seen = torch.zeros(len(slots), dtype=torch.int64)
        self.out = torch.full_like(case.q, torch.nan).new_full((*case.q.shape[:3], case.v.shape[3]), torch.nan)

    def flat(self, rows, counts):
        parts = []
        for x in (self.case.q, self.case.k, self.case.v):
            pieces = [
                x[r, :, self.seen[r] : self.seen[r] + n].transpose(0, 1) for r, n in zip(rows, counts, strict=True)
            ]
            parts.append(torch.cat(pieces))
        return parts

    def step(self, rows, counts):
        """counts[i] new tokens of sequence rows[i]."""
        q, k, v = self.flat(rows, counts)
        out = q.new_full((len(q), q.shape[1], v.shape[2]), torch.nan)
        starts = torch.tensor([0, *counts]).cumsum(0)
        groups = pad_rows(starts, self.seen[rows], self.slots[rows])
        for group in groups:
            attend_in_slots(q, k, v, self.case.maps, self.states, group, out, **self.options)
        self.take(rows, counts, out)
        return groups

    def decode(self, rows, padding=0):
        q, k, v = (
            torch.cat([x, x.new_full((padding, *x.shape[1:]), torch.nan)]) for x in self.flat(rows, [1] * len(rows))
        )
        slots = torch.cat([self.slots[rows], self.slots.new_full((padding,), -1)]).int()
        length = torch.cat([self.seen[rows], self.seen.new_zeros(padding)]).int()
        out = decode_in_slots(q, k, v, self.case.maps, self.states, slots, length, **self.options)
        assert (out[len(rows) :] == 0).all()
        self.take(rows, [1] * len(rows), out[: len(rows)])

    def take(self, rows, counts, out):
        for r, n, part in zip(rows, counts, out.split(counts), strict=True):
            self.out[r, :, self.seen[r] : self.seen[r] + n] = part.transpose(0, 1)
            self.seen[r] += n


def definition(case):
    case.valid, case.terms = None, "both"
    return case.run("reference")


@settings(max_examples=60, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))
@given(data=st.data())
def test_any_schedule_gives_what_the_definition_gives(cases, data):
    """Sequences join, are read in parts, go on token by token, and leave their slot to others."""
    case = data.draw(cases)
    batch, _, time, _ = case.q.shape
    slots = data.draw(st.permutations(range(5)))[:batch]
    server = Server(case, slots, "chunked", waits=data.draw(st.booleans()))
    expected = definition(case)
    for _ in range(data.draw(st.integers(1, 6))):
        open_ = [r for r in range(batch) if server.seen[r] < time]
        if not open_:
            break
        rows = data.draw(st.lists(st.sampled_from(open_), min_size=1, unique=True))
        if data.draw(st.booleans()):
            server.decode(rows, padding=data.draw(st.integers(0, 2)))
        else:
            server.step(rows, [data.draw(st.integers(1, time - int(server.seen[r]))) for r in rows])
        if data.draw(st.integers(0, 4)) == 0:  # preempted: its slot is taken away, and it begins again elsewhere
            row = data.draw(st.sampled_from(rows))
            server.seen[row] = 0
            free = [slot for slot in range(int(max(slots)) + 2) if slot not in server.slots]
            server.slots[row] = data.draw(st.sampled_from(free))
    for r in range(batch):
        seen = int(server.seen[r])
        torch.testing.assert_close(server.out[r, :, :seen], expected[r, :, :seen], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("factor", LINEAR_FACTORS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [0, 1, 4])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_decoding_from_the_first_token_in_a_slot_that_another_left(make_case, layout, window, feature_map, factor):
    case = make_case(time=14, window=window, layout=layout, feature_map=feature_map, linear_factor=factor)
    server = Server(case, [3, 1], "chunked", waits=False)
    for _ in range(14):
        server.decode([0, 1], padding=1)
    torch.testing.assert_close(server.out, definition(case), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("window", [0, 3])
def test_slots_of_the_triton_kernel_go_to_other_sequences(make_case, numbers_of_gpus, window):
    """Prompts, many steps, prompts again, while other sequences come, go, and take the slots that these leave."""
    pytest.importorskip("triton")
    sizes = {"batch": 3, "key_heads": 1, "group": 1, "time": 47, "head_dim": 4}
    case = make_case(window=window, linear_factor="exp", decay=True, dtype=torch.float32, **sizes)
    server = Server(case, [2, 0, 2], "triton", waits=True)
    with torch.no_grad():
        server.step([0], [9])
        for _ in range(20):
            server.decode([1, 0])
        server.step([1, 0], [2, 6])
        for _ in range(12):
            server.decode([0, 1], padding=1)
        for _ in range(6):
            server.decode([2, 1])
        server.step([2], [24])
        for _ in range(17):
            server.decode([2])
        expected = definition(case)
    for row, seen in enumerate((47, 40, 47)):
        assert server.seen[row] == seen
        torch.testing.assert_close(server.out[row, :, :seen], expected[row, :, :seen], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("begin", [0, 1, 5, 8])
def test_by_the_triton_kernel(make_case, numbers_of_gpus, layout, window, begin, decay):
    """A prompt of `begin` tokens, then token by token; with a padded row; then the rest at once after the kernel's
    states."""
    pytest.importorskip("triton")
    case = make_case(
        time=14,
        window=window,
        layout=layout,
        linear_factor="exp",
        decay=decay,
        softcap=2.0,
        sinks=1.0,
        dtype=torch.float32,
        value_dim=5,
    )
    server = Server(case, [3, 1], "triton", waits=True)
    with torch.no_grad():
        if begin:
            server.step([0], [begin])
        for _ in range(4):
            server.decode([1, 0], padding=1)
        server.step([1, 0], [14 - int(server.seen[r]) for r in (1, 0)])
        expected = definition(case)
    torch.testing.assert_close(server.out, expected, rtol=1e-4, atol=1e-5)


def test_padding_touches_no_slot(make_case, numbers_of_gpus):
    pytest.importorskip("triton")
    for backend in ("chunked", "triton"):
        case = make_case(batch=2, time=1, window=2, dtype=torch.float32)
        states = empty_slots(case, 3, waits=True, fill=7.0)
        q, k, v = (x[:, :, 0] for x in (case.q, case.k, case.v))
        slots, length = torch.tensor([-1, -1], dtype=torch.int32), torch.tensor([0, 9], dtype=torch.int32)
        with torch.no_grad():
            out = decode_in_slots(q, k, v, case.maps, states, slots, length, scaling=SCALING, backend=backend)
        assert (out == 0).all()
        assert all((x == 7.0).all() for x in states)
        assert length.tolist() == [0, 9]


def test_groups_waste_less_than_half():
    counts = torch.tensor([1, 3, 900, 5, 2, 700, 4, 4])
    length = torch.tensor([4, 0, 0, 1, 1, 3, 0, 0])
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    groups = pad_rows(starts, length, torch.arange(8))
    assert sorted(group.slots.tolist() for group in groups) == [[0], [1], [2], [3], [4], [5], [6, 7]]
    assert all(group.fresh == bool((group.length == 0).all()) for group in groups)
    same = next(group for group in groups if len(group.slots) == 2)
    assert same.valid is None and same.index.tolist() == [list(range(1611, 1615)), list(range(1615, 1619))]
    counts = torch.tensor([4, 7, 6])
    (group,) = pad_rows(torch.tensor([0, 4, 11, 17]), torch.zeros(3, dtype=torch.int64), torch.arange(3))
    assert group.valid is not None and group.valid.sum(1).tolist() == [4, 7, 6]
    assert group.index[0].tolist() == [0, 1, 2, 3, 3, 3, 3]
