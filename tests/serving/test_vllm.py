"""vLLM gives the greedy tokens that transformers gives, in fp32, however it schedules them. By `make test-vllm`."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM: make test-vllm"),
]
TOKENS = 24
OPTIONS = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 2**28}
WINDOW = {"window": 64, "linear_factor": "exp"}
WINDOWS = (16, 0, 160, 48, 16, 32)
ENGINE = Path(__file__).with_name("engine.py")
# One process where there is one rank: vLLM's own take a minute to start.
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING", "OMP_NUM_THREADS": "1"}


def serve(folder: Path, jobs: list[dict[str, Any]], **environment: str) -> list[dict[str, Any]]:
    """The results of `engine.py`, which runs in `folder`."""
    request, result = folder / "request.json", folder / "result.json"
    request.write_text(json.dumps(jobs, default=str))
    command = [sys.executable, str(ENGINE), str(request), str(result)]
    env = os.environ | ENVIRONMENT | environment
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(result.read_text())


def job(student: Path, *runs: dict[str, Any], **options: Any) -> dict[str, Any]:
    return {
        "folder": str(student),
        "options": OPTIONS | options,
        "runs": [{"max_tokens": TOKENS} | run for run in runs],
    }


@pytest.fixture(scope="module")
def served(students, prompts, tmp_path_factory) -> dict[str, dict[str, Any]]:
    """By name what vLLM did with the prompts, in one process."""
    plain, kept = students.make("plain", **WINDOW), students.make("kept", (1, 4), **WINDOW)
    # A whole layer, two heads of four, and three; the windows differ too.
    some = (1, *((2, head) for head in (0, 3)), *((4, head) for head in (1, 2, 3)))
    heads = students.make("heads", some, WINDOWS, **WINDOW)
    every = {"prompts": prompts}
    terraced = students.make("terraced", feature_map="t2r", layout="terraced", window=16, linear_factor="affine")
    jobs = {
        "together": job(plain, every, every, enable_prefix_caching=True),
        "in chunks": job(plain, every, max_num_batched_tokens=16, max_num_seqs=16),
        "preempted": job(plain, every | {"reset": 12}, enable_prefix_caching=False),
        "aborted": job(plain, every | {"abort": list(range(0, 64, 3))}, every, max_num_seqs=40),
        "kept": job(kept, every),
        # Less memory than the sequences need: vLLM takes some of them back.
        "kept, preempted": job(kept, every, num_gpu_blocks_override=24, enable_prefix_caching=False),
        "heads": job(heads, every, every, enable_prefix_caching=True),
        "heads, in chunks": job(heads, every, max_num_batched_tokens=16, max_num_seqs=16),
        "heads, preempted": job(heads, every | {"reset": 12}, enable_prefix_caching=False),
        "terraced": job(terraced, every),
        "sizes by layer": job(
            students.make("sizes", windows=WINDOWS, feature_dims=(16, 64, 24, 8, 64, 32), **WINDOW), every
        ),
        "linear": job(students.make("linear", window=0, linear_factor="exp", decay=True), every),
        "elu": job(students.make("elu", feature_map="elu", window=8), every),
    }
    found = serve(tmp_path_factory.mktemp("vllm"), list(jobs.values()))
    return {name: result | {"folder": jobs[name]["folder"]} for name, result in zip(jobs, found, strict=True)}


@pytest.mark.parametrize(
    "name",
    [
        *("together", "in chunks", "preempted", "kept", "kept, preempted", "heads", "heads, in chunks"),
        *("heads, preempted", "terraced", "sizes by layer", "linear", "elu"),
    ],
)
def test_the_tokens_are_those_of_transformers(served, answers, name):
    expected = answers(Path(served[name]["folder"]), TOKENS)
    assert all(tokens == expected for tokens in served[name]["tokens"])


def test_after_an_abort_the_others_go_on(served, answers):
    expected = answers(Path(served["aborted"]["folder"]), TOKENS)
    first, second = served["aborted"]["tokens"]
    assert [tokens is None for tokens in first] == [number % 3 == 0 for number in range(64)]
    assert all(tokens in (None, right) for tokens, right in zip(first, expected, strict=True))
    assert second == expected


def test_sequences_were_preempted_and_prefixes_found(served):
    """So that the tests above tested it."""
    for name in ("preempted", "kept, preempted", "heads, preempted"):
        assert served[name]["counters"]["vllm:num_preemptions"] > 0
    assert served["together"]["counters"]["vllm:prefix_cache_hits"] > 0
    assert served["preempted"]["counters"]["vllm:prefix_cache_hits"] == 0


def test_two_processes_share_the_heads(students, prompts, answers, tmp_path):
    kept = students.make("kept", (1, 4), **WINDOW)
    two = job(kept, {"prompts": prompts}, tensor_parallel_size=2)
    # Two cores are enough: vLLM would leave one to itself.
    found = serve(tmp_path, [two], VLLM_ENABLE_V1_MULTIPROCESSING="1", VLLM_CPU_OMP_THREADS_BIND="nobind")
    assert found[0]["tokens"] == [answers(kept, TOKENS)]


def test_the_server_by_curl(students, prompts, answers, tmp_path):
    """As a user starts it: compiled, without trust_remote_code."""
    student = students.make("plain", **WINDOW)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    # What `vllm serve` runs: the command itself asks for a package of the name vllm, and vllm-cpu is another.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(student), "--port", str(port)]
    command += ["--dtype", "float32", "--served-model-name", "student", "--kv-cache-memory-bytes", str(2**28)]
    log = tmp_path / "log"
    with log.open("w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        while subprocess.run(["curl", "-sf", f"localhost:{port}/health"], capture_output=True).returncode:
            assert server.poll() is None, log.read_text()[-6000:]
            time.sleep(1)
        asked = {"model": "student", "prompt": prompts, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        (tmp_path / "asked.json").write_text(json.dumps(asked | {"return_token_ids": True}))
        answer = subprocess.run(
            ["curl", "-sf", f"localhost:{port}/v1/completions", "--json", f"@{tmp_path / 'asked.json'}"],
            capture_output=True,
            check=True,
        )
    finally:
        server.terminate()
        server.wait(60)
    choices = sorted(json.loads(answer.stdout)["choices"], key=lambda choice: choice["index"])
    assert [choice["token_ids"] for choice in choices] == answers(student, TOKENS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hf_overrides": {"sparse_cache_size": 8}}, "vLLM does not serve the sparse cache"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "Speculative decoding removes tokens",
        ),
        ({"mamba_ssm_cache_dtype": "bfloat16"}, "state is kept in float32"),
    ],
)
def test_what_cannot_work_is_told_before_anything_is_loaded(students, options, message):
    from vllm.engine.arg_utils import EngineArgs

    with pytest.raises(ValueError, match=message):
        EngineArgs(model=str(students.make("plain", **WINDOW)), **OPTIONS | options).create_engine_config()


def test_fifty_times_the_sequences_of_the_softmax_model():
    """As vLLM plans its pages, for the shape of Llama 3 8B and 32,768 tokens."""
    path = Path(__file__).parents[2] / "benchmarks" / "serving_memory.py"
    spec = importlib.util.spec_from_file_location("serving_memory", path)
    memory = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(memory)
    softmax, _ = memory.sequences(None, prefix_caching=False)
    student, _ = memory.sequences(0, prefix_caching=False)
    assert student > 50 * softmax > 500
