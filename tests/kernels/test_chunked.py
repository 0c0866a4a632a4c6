"""The chunked path is the definition: outputs and gradients, over shapes and options."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lolcats_kernels import FEATURE_MAPS, LAYOUTS, LINEAR_FACTORS, torch_attention, torch_chunks
from lolcats_kernels.equation import repeat_heads
from lolcats_kernels.spec import CallSpec
from lolcats_kernels.torch_chunks import Inputs, chunked_forward
from lolcats_kernels.torch_tiles import Plan
from torch.utils._pytree import tree_map_only


@settings(max_examples=240, deadline=None, derandomize=True)
@given(data=st.data())
def test_output_is_the_references(cases, data):
    case = data.draw(cases)
    with torch.no_grad():
        torch.testing.assert_close(case.run("chunked"), case.run("reference"), rtol=1e-10, atol=1e-10)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(data=st.data())
def test_gradients_are_the_references(cases, data):
    case = data.draw(cases)
    for got, reference in zip(case.gradients("chunked"), case.gradients("reference"), strict=True):
        # t2r's denominators can be small: an error counts beside the gradient's own size.
        torch.testing.assert_close(got, reference, rtol=1e-9, atol=1e-10 * (1 + reference.abs().max().item()))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [0, 3, 70])
@pytest.mark.parametrize("factor", ["affine", "exp"])
def test_gradcheck(make_case, layout, window, factor):
    case = make_case(
        batch=1, key_heads=1, time=150 if window == 3 else 75, head_dim=2, value_dim=1, feature_dim=2,
        window=window, layout=layout, linear_factor=factor,
    )  # fmt: skip
    names = [name for name, _ in case.maps.named_parameters()]

    def call(q, k, v, *parameters):
        values = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(_Call(case), {f"maps.{n}": p for n, p in values.items()}, (q, k, v))

    leaves = [x.detach().requires_grad_() for x in case.leaves]
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


class _Call(torch.nn.Module):
    def __init__(self, case):
        super().__init__()
        self.case, self.maps = case, case.maps

    def forward(self, q, k, v):
        return replace(self.case, q=q, k=k, v=v).run("chunked")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("factor", "wanted"),
    [
        *(("affine", wanted) for wanted in [("q",), ("k",), ("v",), ("window_logit",), ("q_weight", "k_weight")]),
        *(("exp", wanted) for wanted in [("q",), ("k",), ("linear_logit",), ("q_slope",), ("k_slope",), ("k_weight",)]),
    ],
)
def test_only_the_gradients_asked_for(make_case, layout, factor, wanted):
    case = make_case(time=150, layout=layout, linear_factor=factor)
    named = {"q": case.q, "k": case.k, "v": case.v, **dict(case.maps.named_parameters())}
    everything = dict(zip(named, case.gradients("reference"), strict=True))
    for name, leaf in named.items():
        leaf.requires_grad_(name in wanted)
    out = case.run("chunked")
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape).cos()
    (out * weight).sum().backward()
    for name, leaf in named.items():
        if name in wanted:
            torch.testing.assert_close(leaf.grad, everything[name], rtol=1e-9, atol=1e-10)
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("factor", ["one", "exp"])
def test_fp32_is_as_exact_as_the_reference_in_fp32(make_case, layout, feature_map, factor):
    sizes = {"time": 300, "head_dim": 32, "feature_dim": 32, "window": 16, "linear_factor": factor}
    case = make_case(layout=layout, feature_map=feature_map, dtype=torch.float32, **sizes)
    double = make_case(layout=layout, feature_map=feature_map, **sizes)
    with torch.no_grad():
        for a, b in zip(double.leaves, case.leaves, strict=True):
            a.copy_(b)
        exact = double.run("reference")
        error = {name: (case.run(name) - exact).square().mean().sqrt() for name in ("reference", "chunked")}
    assert error["reference"] < 1e-6
    assert error["chunked"] < 1.5 * error["reference"]


@pytest.mark.parametrize("terms", ["both", "linear"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("factor", LINEAR_FACTORS)
@pytest.mark.parametrize("tiles", [(1, 1), (1, 2), (2, 4)])
def test_tiling_changes_nothing(make_case, monkeypatch, terms, layout, factor, tiles):
    """CPU computes a row at a time, other devices a sequence at a time."""
    case = make_case(batch=3, key_heads=1, time=250, layout=layout, linear_factor=factor, value_dim=4, sinks=1.0)
    maps = case.maps

    def run():
        generator = torch.Generator().manual_seed(1)
        start = [torch.rand(3, 2, maps.num_features, size, dtype=torch.float64, generator=generator) for size in (4, 1)]
        of_q, of_k = maps.q_parameters(torch.float64), maps.k_parameters(torch.float64)
        inputs = Inputs(
            case.q, repeat_heads(case.k, 2), repeat_heads(case.v, 2), *maps.term_weights(torch.float64),
            maps.query_logits(case.q) if terms == "both" else None,  # no window, nothing to weigh against
            start[0], start[1][..., 0], *of_q[:2], *of_k, case.sinks if terms == "both" else None,
        )  # fmt: skip
        inputs = Inputs(*(x if x is None else x.detach().clone().requires_grad_() for x in inputs))
        spec = CallSpec(maps.config, 0.4, None, terms)
        out, sums, norms, *_ = chunked_forward(*inputs, torch.tensor([100, 250, 7]), True, *spec.encode())
        leaves = [x for x in inputs if x is not None]
        grads = torch.autograd.grad(out.sin().sum(), leaves, allow_unused=True)
        return [out, sums, norms, *(g for g in grads if g is not None)]

    expected = run()
    monkeypatch.setattr(Plan, "tile_rows", tiles[0])
    monkeypatch.setattr(Plan, "tile_chunks", tiles[1])
    for got, whole in zip(run(), expected, strict=True):
        torch.testing.assert_close(got, whole, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    "options", [{"linear_factor": "exp"}, {"feature_map": "t2r", "window": 0}, {"layout": "terraced"}]
)
def test_registered_ops(make_case, options, note_calls):
    """Schemas, fake kernels, autograd and compilation, as torch checks them."""
    forward, backward = torch_chunks.chunked_forward, torch_chunks._chunked_backward
    case = make_case(batch=1, time=150, dtype=torch.float32, **options)
    calls = note_calls((torch_attention, "chunked_forward"), (torch_chunks, "_chunked_backward"))
    case.gradients("chunked")
    with torch.no_grad():
        case.run("chunked", return_state=True)
    assert [op for op, _ in calls] == [forward, backward, forward]
    for op, arguments in calls:
        # Leaves, as opcheck differentiates more than once. Backward has no derivative, nor what keeps nothing for it.
        keep = op is forward and arguments[len(Inputs._fields) + 1]
        leaf = [lambda x: x.detach(), lambda x: x.detach().requires_grad_(x.requires_grad)][keep]
        torch.library.opcheck(op, tree_map_only(torch.Tensor, leaf, arguments))


def test_compiles_as_one_graph(make_case):
    """Forward and backward, without a break."""
    case = make_case(batch=2, time=150, dtype=torch.float32)
    for leaf in case.leaves:
        leaf.requires_grad_()
    compiled = torch.compile(case.run, backend="aot_eager", fullgraph=True)
    out, expected = compiled("chunked"), case.run("chunked")
    found, wanted = (torch.autograd.grad(y.sin().sum(), case.leaves) for y in (out, expected))
    torch.testing.assert_close([out, *found], [expected, *wanted])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [0, 64])
def test_memory_kept_for_backward_grows_linearly(make_case, layout, window):
    def kept(time):
        case = make_case(batch=1, time=time, window=window, layout=layout, dtype=torch.float32)
        storages = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: storages.setdefault(x.untyped_storage().data_ptr(), x), lambda x: x
        ):
            case.run("chunked")
        return sum(x.untyped_storage().nbytes() for x in storages.values())

    assert kept(2048) < 2.2 * kept(1024)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("factor", ["one", "exp"])
def test_large_inputs(make_case, layout, factor):
    """Features at their floor, scores so far below the largest that their terms vanish, and weights at their bounds."""
    case = make_case(time=150, layout=layout, linear_factor=factor)
    with torch.no_grad():
        case.q *= 50
        case.k *= 50
    assert (case.maps.q_features(case.q) == 1e-12).any()
    torch.testing.assert_close(case.run("chunked"), case.run("reference"), rtol=1e-10, atol=1e-10)
    for got, reference in zip(case.gradients("chunked"), case.gradients("reference"), strict=True):
        torch.testing.assert_close(got, reference, rtol=1e-8, atol=1e-9 * (1 + reference.abs().max().item()))
