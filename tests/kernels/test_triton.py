"""The Triton kernels, under Triton's interpreter, are the definition; and they compile for GPUs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from lolcats_kernels import FEATURE_MAPS, LAYOUTS, hybrid

pytest.importorskip("triton")

import triton
from lolcats_kernels import triton_attention, triton_launches, triton_parts
from torch.utils._pytree import tree_map_only

pytestmark = pytest.mark.usefixtures("numbers_of_gpus")
ROOT = Path(__file__).resolve().parents[2]
# No shrinking: under the interpreter it takes many minutes, and the cases are small already.
PHASES = (Phase.explicit, Phase.generate)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Short rows are several chunks in several segments, and values several parts."""
    for name in ("BF16_TILES", "FP32_TILES"):
        monkeypatch.setattr(triton_launches, name, {90: {256: ((32, 4), (16, 4))}})
    monkeypatch.setattr(triton_launches, "SUMS_BYTES", 1024)
    monkeypatch.setattr(triton_launches, "PROGRAMS", 8)


@settings(max_examples=15, deadline=None, derandomize=True, phases=PHASES)
@given(data=st.data())
def test_output_is_the_references(small_cases, data):
    case = data.draw(small_cases).to(torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(case.run("triton"), case.run("reference"), rtol=1e-4, atol=1e-5)


@settings(max_examples=10, deadline=None, derandomize=True, phases=PHASES)
@given(data=st.data())
def test_parts_are_the_whole(small_cases, data):
    case = data.draw(small_cases).to(torch.float32)
    with torch.no_grad():
        whole, state = case.run("reference", return_state=True, waiting=case.maps.config.waiting)
        parts, after = case.run_in_parts("triton", case.cuts)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    # Slots of keys that are in the sums may hold anything.
    live = state.live_slots(case.maps.config)[1][:, None, :, None]
    for name in ("sums", "norms", "keys", "values", "length"):
        x, y = getattr(after, name), getattr(state, name)
        if name in ("keys", "values"):
            x, y = torch.where(live, x, 0), torch.where(live, y, 0)
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@settings(max_examples=7, deadline=None, derandomize=True, phases=PHASES)
@given(data=st.data())
def test_gradients_are_the_references(small_cases, data):
    case = data.draw(small_cases)
    expected = case.gradients("reference")
    for found, exact in zip(case.to(torch.float32).gradients("triton"), expected, strict=True):
        size = exact.abs().max().item() if exact.numel() else 0
        torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-4 * (1 + size))


@pytest.mark.parametrize(
    "config",
    [{"linear_factor": "affine"}, {"linear_factor": "exp"}, {"decay": True}, {"decay": True, "window": 0}],
    ids=str,
)
def test_gradients_through_the_state(make_case, config):
    """Truncated backpropagation hands states on with their gradients."""

    def gradients(backend):
        case = make_case(batch=1, time=50, dtype=torch.float32, **config)
        leaves = [leaf.requires_grad_() for leaf in case.leaves]
        out, state = case.run_in_parts(backend, [30])
        found = (out, state.sums, state.norms, state.values)
        # Linear in what is large: the sine of a sum of thousands would turn its rounding into another gradient.
        weights = [torch.linspace(-1, 1, x.numel()).view(x.shape).cos() for x in found]
        total = sum((x * w).sum() for x, w in zip(found, weights, strict=True))
        return torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)

    for found, exact in zip(gradients("triton"), gradients("reference"), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-4 * (1 + exact.abs().max().item()))


@pytest.mark.parametrize(
    "wanted",
    [
        ("q",),
        ("k",),
        ("v",),
        ("linear_logit",),
        ("q_weight", "k_weight"),
        ("k_slope",),
        ("decay_slope",),
        ("decay_bias",),
    ],
)
def test_only_the_gradients_asked_for(make_case, wanted):
    case = make_case(batch=1, key_heads=1, time=40, linear_factor="exp", decay=True, dtype=torch.float32)
    named = {"q": case.q, "k": case.k, "v": case.v, **dict(case.maps.named_parameters())}
    everything = dict(zip(named, case.gradients("reference"), strict=True))
    for name, leaf in named.items():
        leaf.requires_grad_(name in wanted)
    out = case.run("triton")
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).cos().float()
    (out * weight).sum().backward()
    for name, leaf in named.items():
        if name in wanted:
            size = everything[name].abs().max().item()
            torch.testing.assert_close(leaf.grad, everything[name], rtol=1e-3, atol=1e-4 * (1 + size))
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", ["one", "exp"])
def test_as_exact_as_the_reference_in_the_same_dtype(make_case, dtype, factor):
    sizes = {"batch": 1, "time": 60, "head_dim": 24, "feature_dim": 20, "window": 16, "linear_factor": factor}
    case = make_case(dtype=dtype, **sizes)
    double = make_case(**sizes)
    with torch.no_grad():
        for a, b in zip(double.leaves, case.leaves, strict=True):
            a.copy_(b)
        exact = double.run("reference")
        error = {name: (case.run(name) - exact).square().mean().sqrt() for name in ("reference", "triton")}
    assert error["triton"] < (2 if dtype == torch.bfloat16 else 1.5) * error["reference"]


@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("factor", ["one", "exp"])
def test_gradients_of_bf16(make_case, factor, decay):
    """Near the reference's in bf16, which computes all but the inputs and the output in fp32."""
    sizes = {"batch": 1, "key_heads": 1, "time": 60, "head_dim": 24, "feature_dim": 20, "window": 16, "decay": decay}
    case = make_case(dtype=torch.bfloat16, linear_factor=factor, **sizes)
    double = make_case(linear_factor=factor, **sizes)
    with torch.no_grad():
        if decay:  # of keys that forget most there is little gradient, and it is not exact
            case.maps.decay_bias.sub_(3)
            case.maps.decay_slope.mul_(0.2)
        for a, b in zip(double.leaves, case.leaves, strict=True):
            a.copy_(b)
    gradients = (case.gradients("triton"), case.gradients("reference"), double.gradients("reference"))
    for number, (found, plain, exact) in enumerate(zip(*gradients, strict=True)):
        allowed = 2 * (plain - exact).norm() + (1e-2 if number < 3 else 5e-2) * exact.norm()
        assert (found - exact).norm() < allowed, number


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_decay_over_many_chunks(make_case, layout):
    """Sums shrink from chunk to chunk and from segment to segment, also where each key forgets little."""
    case = make_case(batch=1, key_heads=1, time=150, window=20, layout=layout, decay=True)
    with torch.no_grad():
        case.maps.decay_bias.fill_(-4.0)
        case.maps.decay_slope.mul_(0.3)
    expected = [case.run("reference").detach(), *case.gradients("reference")]
    case = case.to(torch.float32)
    for found, exact in zip([case.run("triton"), *case.gradients("triton")], expected, strict=True):
        assert (found - exact).norm() < 1e-5 * exact.norm()


@pytest.mark.parametrize(
    "config",
    [
        *({"feature_map": name, "layout": layout} for name in FEATURE_MAPS for layout in LAYOUTS),
        *({"window": window, "layout": layout} for window in (0, 70) for layout in LAYOUTS),
    ],
    ids=lambda config: "-".join(map(str, config.values())),
)
def test_heads_over_one_tile(make_case, config):
    """More than one part of the values, and blocks shorter and longer than the window."""
    sizes = {"batch": 1, "key_heads": 1, "group": 1, "time": 40, "head_dim": 20, "value_dim": 35, "feature_dim": 20}
    case = make_case(dtype=torch.float32, **sizes, **config)
    for found, exact in zip(case.gradients("triton"), case.gradients("reference"), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-4 * (1 + exact.abs().max().item()))


def test_fp64_is_refused(make_case):
    with pytest.raises(ValueError, match=r"triton takes torch.float32, .*got torch.float64"):
        make_case().run("triton")


@pytest.mark.parametrize(
    "options",
    [{"linear_factor": "exp"}, {"feature_map": "t2r"}, {"feature_map": "elu"}, {"decay": True, "window": 3}],
    ids=str,
)
def test_registered_ops(make_case, options, note_calls):
    """Schemas, fake kernels, autograd and compilation, as torch checks them."""
    forward, backward = triton_attention._forward, triton_attention._backward
    case = make_case(batch=1, key_heads=1, time=9, dtype=torch.float32, **options)
    calls = note_calls((triton_attention, "_forward"), (triton_attention, "_backward"))
    case.gradients("triton")
    assert [op for op, _ in calls] == [forward, backward]
    checks = ["test_schema", "test_faketensor"]
    if "linear_factor" in options:  # takes long
        checks += ["test_autograd_registration", "test_aot_dispatch_dynamic"]
    for op, arguments in calls:
        # Leaves, as opcheck differentiates more than once; backward has no derivative of its own.
        leaf = [lambda x: x.detach(), lambda x: x.detach().requires_grad_(x.requires_grad)][op is forward]
        torch.library.opcheck(op, tree_map_only(torch.Tensor, leaf, arguments), test_utils=checks)


@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_compiles_as_one_graph(make_case, backend, monkeypatch):
    monkeypatch.setattr(hybrid, "backend_for", lambda *_: "triton")
    case = make_case(batch=1, time=20, dtype=torch.float32)
    with torch.no_grad():
        compiled = torch.compile(lambda c: c.run(backend), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(case), case.run("triton"))


@pytest.fixture
def small_gpu(monkeypatch):
    """A GPU that has room for chunks of so many tokens, as Triton tells of it; -> the chunks that were tried."""
    tried = []

    def start(room):
        class Kernel:
            def __init__(self, kernel):
                self.kernel, self.arg_names = kernel, kernel.arg_names

            def __getitem__(self, grid):
                def run(**arguments):
                    if "L" in arguments:
                        tried.append(arguments["L"])
                    if arguments.get("L", 0) > room:
                        raise triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory")
                    self.kernel[grid](**arguments)

                return run

        def launch(kernel, *rest):
            return triton_parts.launch(Kernel(kernel), *rest)

        monkeypatch.setattr(triton_launches, "launch", launch)
        monkeypatch.setattr(triton_launches, "_FITTING", {})
        monkeypatch.setattr(hybrid, "_TOO_LARGE", set())
        monkeypatch.setattr(triton_launches, "FP32_TILES", {90: {256: ((64, 4), (32, 4))}})
        return tried

    return start


def test_chunks_shrink_until_there_is_room(make_case, small_gpu):
    case = make_case(batch=1, key_heads=1, time=40, dtype=torch.float32)
    expected = case.gradients("reference")
    tried = small_gpu(16)
    for found, exact in zip(case.gradients("triton"), expected, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-4 * (1 + exact.abs().max().item()))
    assert tried[:3] == [64, 32, 16]
    tried.clear()
    case.gradients("triton")
    assert set(tried) == {16}


def test_what_cannot_fit_is_known_before_a_launch(make_case, monkeypatch):
    """W of 64 rows and columns takes 16,384 bytes, and a chunk of 32 keys half as much."""
    monkeypatch.setattr(triton_launches, "launch", None)
    monkeypatch.setattr(triton_launches, "shared_memory", lambda device: 16_000)
    case = make_case(batch=1, key_heads=1, time=20, head_dim=64, feature_dim=64, dtype=torch.float32)
    with torch.no_grad(), pytest.raises(ValueError, match=r"need 16,384 of shared memory .* has 16,000"):
        case.run("triton")


def test_where_nothing_fits(make_case, small_gpu, monkeypatch):
    """The backend triton refuses in a sentence; auto takes chunked, and says so once."""
    small_gpu(8)
    case = make_case(batch=1, key_heads=1, time=20, dtype=torch.float32)
    with torch.no_grad(), pytest.raises(ValueError, match=r"need 300,000 of shared memory .* the backend chunked"):
        case.run("triton")
    monkeypatch.setattr(hybrid, "backend_for", lambda *_: "triton")
    with torch.no_grad():
        with pytest.warns(UserWarning, match="Use the backend chunked. It is used here"):
            found = case.run("auto")
        torch.testing.assert_close(found, case.run("reference"), rtol=1e-4, atol=1e-5)
        monkeypatch.setattr(triton_launches, "launch", None)
        assert torch.equal(case.run("auto"), found)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 89, 90, 100])
def test_kernels_compile_for_gpus(capability):
    """No GPU is needed to compile: every kernel must, within the shared memory that there is."""
    script = [sys.executable, ROOT / "benchmarks" / "kernel_resources.py", "--heads", "128"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*script, "--capabilities", str(capability)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "attend" in done.stdout and "backward_values" in done.stdout
