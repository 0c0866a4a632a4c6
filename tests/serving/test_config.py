"""What vLLM is told of a student, and what is refused; vLLM itself need not be here."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import types
from types import SimpleNamespace

import pytest
from transformers import LlamaConfig, MistralConfig, MixtralConfig, Qwen3Config

from lolcats_cli.serving import config as serving
from lolcats_cli.student.export import student_config

HYBRID = {"feature_map": "hedgehog", "feature_dim": 8, "window": 4, "layout": "sliding", "linear_factor": "exp"}
KEPT = HYBRID | {"kept_heads": {"2": [1]}}
STUDENT = {"hybrid": HYBRID, "layers": [0, 2], "num_heads": 4, "head_dim": 16}


@pytest.fixture(autouse=True)
def vllm(monkeypatch) -> types.ModuleType:
    module = types.ModuleType("vllm")
    module.__version__ = "0.32.1"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    return module


def written(teacher, layers=(0, 2), **changes):
    """config.json of a student with maps in these layers of three."""
    values = teacher.to_dict() | {"dtype": "float32"}
    config = student_config(
        values, HYBRID, attentions=range(3), heads={layer: (4, 16) for layer in layers}, dtype="float32"
    )
    return config | changes


def read(config, **options):
    return serving.placeholder(config["model_type"].removeprefix("lolcats_")).from_dict(config, **options)


SIZES = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}


@pytest.mark.parametrize("teacher", [LlamaConfig(**SIZES), Qwen3Config(**SIZES), MixtralConfig(**SIZES)])
def test_the_layers_kinds_and_the_teacher_again(teacher):
    config = read(written(teacher))
    assert config.model_type == f"lolcats_{teacher.model_type}"
    assert config.layers_block_type == ["linear_attention", "attention", "linear_attention"]
    assert config.layer_types == ["linear_attention", "full_attention", "linear_attention"]
    again = config.teacher_config()
    assert type(again) is type(teacher)
    ours, its = again.to_dict(), teacher.to_dict()
    assert {name for name in its if ours[name] != its[name]} <= {"dtype", "architectures", "transformers_version"}
    assert not {"lolcats", "layers_block_type"} & set(ours)
    moe = teacher.model_type == "mixtral"
    assert config.architectures == ["LolcatsMoEForCausalLM" if moe else "LolcatsForCausalLM"]


def test_sliding_layers_that_are_kept_stay_sliding():
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    teacher = Qwen3Config(**SIZES, layer_types=kinds, sliding_window=16, use_sliding_window=True)
    config = read(written(teacher, layers=(0,)))
    assert config.layer_types == ["linear_attention", "sliding_attention", "full_attention"]
    assert config.teacher_config().layer_types == kinds
    assert [config.teacher_window(layer) for layer in range(3)] == [16, 16, None]


def test_a_window_that_is_every_layers():
    teacher = MistralConfig(**SIZES, sliding_window=16)
    assert read(written(teacher, layers=(0, 1))).layer_types == ["linear_attention"] * 2 + ["sliding_attention"]
    config = read(written(teacher))
    assert config.teacher_config().sliding_window == config.teacher_window(0) == 16


def test_what_vllm_changes_reaches_the_teacher_and_other_processes():
    config = read(written(LlamaConfig(**SIZES)))
    config.max_position_embeddings = 99
    for one in (config, copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert one.teacher_config().max_position_embeddings == 99
        assert type(one) is type(config) and one.lolcats == config.lolcats
    found, unused = read(written(LlamaConfig(**SIZES)), return_unused_kwargs=True, name_or_path="x")
    assert found.lolcats and unused == {}


def test_a_configuration_of_an_older_student():
    old = written(LlamaConfig(**SIZES))
    del old["layers_block_type"]
    assert read(old).layer_types == ["linear_attention", "full_attention", "linear_attention"]


@pytest.mark.parametrize(("version", "kind"), [("0.31.9", "older"), ("0.33.0rc1", "newer"), ("1.2.0", "newer")])
def test_other_versions_of_vllm_are_refused(vllm, version, kind):
    vllm.__version__ = version
    with pytest.raises(ValueError, match=rf"with vLLM 0\.32, and vLLM {version} is {kind}\. Install"):
        read(written(LlamaConfig(**SIZES)))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"gates": [1]}, "gates"),
        ({"hybrid": HYBRID | {"gate": 1}}, "gate"),
        ({"hybrid": HYBRID | {"feature_map": "newest"}}, "newest"),
    ],
)
def test_a_student_of_a_newer_lolcats_is_refused(changes, named):
    config = written(LlamaConfig(**SIZES))
    config["lolcats"] = config["lolcats"] | changes
    with pytest.raises(ValueError, match=rf"A newer lolcats than .* made this student\. .*{named}.*Install a newer"):
        read(config)


def test_what_is_no_student_is_refused():
    with pytest.raises(ValueError, match="does not describe a merged student"):
        read(written(LlamaConfig(**SIZES), lolcats=None))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparse_cache_size": 8}, "sparse cache"),
        ({"kv_lora_rank": 8}, "latent attention"),
        ({"lolcats": STUDENT | {"num_heads": [4, 8]}}, "differ in their heads"),
        ({"lolcats": STUDENT | {"head_dim": [16, 32]}}, "differ in their heads"),
        ({"lolcats": STUDENT | {"num_heads": [2, 2], "hybrid": KEPT}}, "differ in their heads"),
    ],
)
def test_students_that_vllm_cannot_serve_are_refused(changes, message):
    config = read(written(LlamaConfig(**SIZES)))
    serving.OptionChecks.verify_and_update_model_config(SimpleNamespace(hf_config=config))
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        serving.OptionChecks.verify_and_update_model_config(SimpleNamespace(hf_config=config))


def test_layers_may_differ_by_the_heads_that_were_kept():
    config = read(written(LlamaConfig(**SIZES), lolcats=STUDENT | {"num_heads": [4, 2], "hybrid": KEPT}))
    serving.OptionChecks.verify_and_update_model_config(SimpleNamespace(hf_config=config))
    assert serving.mapped_heads(config.lolcats) == {0: 4, 2: 2}


def options(**changes):
    cache = {"enable_prefix_caching": True, "mamba_cache_mode": "align"}
    cache |= {"mamba_cache_dtype": "auto", "mamba_ssm_cache_dtype": "auto"}
    parallel = {"decode_context_parallel_size": 1, "prefill_context_parallel_size": 1, "tensor_parallel_size": 1}
    lolcats = {"hybrid": changes.get("hybrid", HYBRID)}
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_config=SimpleNamespace(lolcats=lolcats)),
        speculative_config=changes.pop("speculative_config", None),
        cache_config=SimpleNamespace(**{name: changes.get(name, value) for name, value in cache.items()}),
        parallel_config=SimpleNamespace(**{name: changes.get(name, value) for name, value in parallel.items()}),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speculative_config": object()}, "Speculative decoding"),
        ({"mamba_cache_mode": "all"}, "align"),
        ({"mamba_ssm_cache_dtype": "bfloat16"}, "--mamba-ssm-cache-dtype"),
        ({"decode_context_parallel_size": 2}, "context"),
        ({"tensor_parallel_size": 2, "hybrid": KEPT}, "--tensor-parallel-size"),
    ],
)
def test_options_that_cannot_work_are_refused(changes, message):
    serving.OptionChecks.verify_and_update_config(options())
    serving.OptionChecks.verify_and_update_config(options(tensor_parallel_size=2))
    serving.OptionChecks.verify_and_update_config(options(hybrid=KEPT))
    with pytest.raises(ValueError, match=message):
        serving.OptionChecks.verify_and_update_config(options(**changes))


def test_importing_the_plugin_costs_nothing():
    heavy = {"torch", "transformers", "vllm", "lolcats_kernels"}
    code = f"import sys, lolcats_cli.serving; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
