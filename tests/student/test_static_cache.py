"""Decoding at fixed addresses: `cache_implementation="static"` gives the tokens of the cache that grows."""

from __future__ import annotations

import pytest
import torch
from lolcats_kernels import HybridConfig, hf_graph
from lolcats_kernels.hf_cache import CACHE_NAME, LolcatsCacheLayer
from torch.utils import _pytree as pytree
from transformers import CompileConfig, Gemma2Config, Gemma2ForCausalLM, MistralConfig, MistralForCausalLM

from lolcats_cli.student.build import linearize

CONFIGS = [
    HybridConfig(window=6, feature_dim=8, linear_factor="exp"),
    HybridConfig(window=4, feature_dim=8, layout="terraced"),
    HybridConfig(window=0, feature_map="t2r"),
    HybridConfig(window=6, feature_dim=8, linear_factor="exp", decay=True),
    HybridConfig(window=6, feature_dim=8, linear_factor="exp", kept_heads=(0,)),
]
KEPT = [[0], [1]]


@pytest.fixture(params=[*CONFIGS, *KEPT, "mistral", "gemma2"], ids=str, scope="module")
def any_student(request, make_student, make_maps, sizes):
    """Of every kind; with a layer that was kept softmax; with one whose attention slides, or is capped."""
    kind = request.param
    if isinstance(kind, HybridConfig):
        return make_student(kind)
    if isinstance(kind, list):
        return make_student(keep_softmax=kind)
    torch.manual_seed(0)
    if kind == "mistral":
        teacher = MistralForCausalLM(MistralConfig(**sizes, head_dim=16, sliding_window=8)).eval()
    else:
        kinds = ["full_attention", "sliding_attention"]
        config = Gemma2Config(**sizes, head_dim=16, sliding_window=8, layer_types=kinds, attn_logit_softcapping=0.5)
        teacher = Gemma2ForCausalLM(config).eval()
    hybrid = CONFIGS[0]
    return linearize(teacher, hybrid, {0: make_maps(hybrid)[0]}, keep_softmax=[1])


def padded(tokens: torch.Tensor, *left: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows with that much padding on their left: (tokens, mask)."""
    rows = tokens[torch.arange(len(left)) % len(tokens)].clone()
    mask = (torch.arange(rows.shape[1]) >= torch.tensor(left)[:, None]).long()
    return rows * mask, mask


def held(cache) -> list[torch.Tensor]:
    """What the layers hold, and their kept heads."""
    layers = [layer for layer in cache.layers if isinstance(layer, LolcatsCacheLayer)]
    layers += [layer.kept for layer in layers if layer.kept is not None]
    return [x for layer in layers for x in (layer.tokens, *layer.state.tensors())]


def addresses(cache) -> list[int]:
    return [x.data_ptr() for x in held(cache)]


@pytest.mark.parametrize("left", [(0,), (5, 0, 12), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("new", [1, 17])
def test_the_tokens_are_those_of_the_other_cache(any_student, tokens, left, new):
    ids, mask = padded(tokens, *left)
    common = {"attention_mask": mask, "max_new_tokens": new, "do_sample": False}
    expected = any_student.generate(ids, **common)
    assert torch.equal(any_student.generate(ids, cache_implementation="static", **common), expected)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prefill_chunk_size": 5}, {"num_return_sequences": 2}], ids=str)
def test_beams_and_prompts_in_parts(any_student, tokens, options):
    ids, mask = padded(tokens, 0, 4)

    def run(**more):
        torch.manual_seed(0)
        sample = "num_return_sequences" in options
        return any_student.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=sample, **options, **more)

    assert torch.equal(run(cache_implementation="static"), run())


@torch.no_grad()
def test_nothing_moves(any_student, tokens):
    """The state stays where it is through steps, prompts, other orders of the rows, and another sequence."""
    cache, plain = any_student.new_cache(64), any_student.new_cache()
    assert cache.is_compileable and not plain.is_compileable
    places = []
    for part in (tokens[:, :9], tokens[:, 9:10], tokens[:, 10:14], tokens[:, 14:15]):
        expected = any_student(part, past_key_values=plain).logits
        torch.testing.assert_close(any_student(part, past_key_values=cache).logits, expected, atol=1e-4, rtol=1e-4)
        places.append(addresses(cache))
    for each in (plain, cache):
        each.reorder_cache(torch.tensor([1, 1]))
    places.append(addresses(cache))
    expected = any_student(tokens[:, :1], past_key_values=plain).logits
    torch.testing.assert_close(any_student(tokens[:, :1], past_key_values=cache).logits, expected, atol=1e-4, rtol=1e-4)
    cache.reset()
    assert cache.get_seq_length() == 0
    logits = any_student(tokens, past_key_values=cache).logits
    places.append(addresses(cache))
    torch.testing.assert_close(logits, any_student(tokens).logits, atol=1e-4, rtol=1e-4)
    assert all(place == places[0] for place in places)


@torch.no_grad()
def test_rows_are_repeated(any_student, tokens):
    cache, plain = any_student.new_cache(64), any_student.new_cache()
    for each in (cache, plain):
        any_student(tokens, past_key_values=each)
        each.batch_repeat_interleave(2)
    step = tokens[:, :1].repeat_interleave(2, 0)
    logits, expected = (any_student(step, past_key_values=each).logits for each in (cache, plain))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_step_in_padding_changes_nothing(any_student, tokens):
    mask = torch.ones(2, 14, dtype=torch.long)
    mask[1, 12] = 0
    caches = any_student.new_cache(64), any_student.new_cache()
    for begin, end, places in ((0, 12, None), (12, 13, [[12], [12]]), (13, 14, [[13], [12]])):
        options = {"attention_mask": mask[:, :end], "position_ids": None if places is None else torch.tensor(places)}
        found, expected = (any_student(tokens[:, begin:end], past_key_values=x, **options).logits for x in caches)
        real = mask[:, begin:end].bool()
        torch.testing.assert_close(found[real], expected[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("left", [(0,), (5, 0, 12)], ids=str)
def test_generation_compiles_one_step(any_student, tokens, left):
    """As on CUDA, where transformers compiles it: without a break, and not again for another prompt or length."""
    ids, mask = padded(tokens, *left)
    options = CompileConfig(backend="eager", fullgraph=True, mode=None)
    options._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    any_student.__dict__.pop("_compiled_call", None)
    any_student.__dict__.pop("_longest", None)
    for begin, new in ((0, 12), (0, 9), (2, 5)):
        common = {"attention_mask": mask[:, begin:], "max_new_tokens": new, "do_sample": False}
        expected = any_student.generate(ids[:, begin:], **common)
        found = any_student.generate(ids[:, begin:], cache_implementation="static", compile_config=options, **common)
        assert torch.equal(found, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.fixture
def recording(monkeypatch):
    """Stands in for a CUDA graph: recording changes nothing, and replaying fills the results. Counts the replays."""
    replays = []

    def record(run):
        cache = run.__closure__[0].cell_contents[CACHE_NAME]
        before = [x.clone() for x in held(cache)]
        out = run()
        for x, y in zip(held(cache), before, strict=True):
            x.copy_(y)

        def replay():
            replays.append(1)
            pairs = zip(pytree.tree_leaves(out), pytree.tree_leaves(run()), strict=True)
            for x, y in pairs:
                if isinstance(x, torch.Tensor):
                    x.copy_(y)

        return replay, out

    monkeypatch.setattr(hf_graph, "record", record)
    return replays


@pytest.mark.parametrize("left", [(0,), (5, 0, 12)], ids=str)
def test_a_graph_is_recorded_once_and_replayed(any_student, tokens, left, recording, monkeypatch):
    monkeypatch.setattr(type(any_student), "_valid_auto_compile_criteria", lambda *_: True)
    monkeypatch.setattr(
        type(any_student), "get_compiled_call", lambda self, _: hf_graph.GraphedStep(self.__call__), raising=False
    )
    ids, mask = padded(tokens, *left)
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}
    options |= {"output_hidden_states": True, "output_logits": True}
    with monkeypatch.context() as patch:
        patch.setattr(type(any_student), "_valid_auto_compile_criteria", lambda *_: False)
        expected = any_student.generate(ids, **options)
    assert not recording
    found = any_student.generate(ids, cache_implementation="static", **options)
    assert len(recording) == 10  # one token comes from the prompt, one before the recording
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.hidden_states, expected.hidden_states, atol=1e-4, rtol=1e-4)


def test_other_calls_are_not_replayed(student, tokens, recording):
    """Of more rows, of more tokens, or after another cache; and none where nothing can be recorded."""
    step, plain = hf_graph.GraphedStep(student.__call__), student.__call__
    with torch.no_grad():
        caches = [student.new_cache(64) for _ in range(3)]
        for cache in caches:
            student(tokens, past_key_values=cache)
        calls = [(0, 1), (0, 1), (0, 1), (1, 1), (0, 3), (0, 1)]
        for number, count in calls:
            same = plain(input_ids=tokens[:, :count], past_key_values=caches[2]).logits if number == 0 else None
            found = step(input_ids=tokens[:, :count], **{CACHE_NAME: caches[number]}).logits
            if same is not None:
                torch.testing.assert_close(found, same, atol=1e-5, rtol=1e-5)
    assert len(recording) == 3


def test_what_cannot_be_recorded_runs_as_it_is(student, tokens, monkeypatch):
    def refuse(run):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(hf_graph, "record", refuse)
    step = hf_graph.GraphedStep(student.__call__)
    with torch.no_grad():
        cache = student.new_cache(64)
        student(tokens[:, :10], past_key_values=cache)
        steps = [step(input_ids=tokens[:, i : i + 1], past_key_values=cache).logits for i in range(10, 14)]
        expected = student(tokens[:, :14]).logits[:, 10:]
    torch.testing.assert_close(torch.cat(steps, 1), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
@torch.no_grad()
def test_on_a_gpu_a_graph_gives_the_same_tokens(gpu, make_student, tokens):
    if gpu.type != "cuda":
        pytest.skip("needs CUDA graphs")
    for config in CONFIGS:
        student = make_student(config).to(gpu)
        for left in ((0,), (5, 0, 12)):
            ids, mask = (x.to(gpu) for x in padded(tokens, *left))
            common = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
            found = student.generate(ids, cache_implementation="static", **common)
            assert torch.equal(found, student.generate(ids, **common))
