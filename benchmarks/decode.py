"""Generation after long contexts: a student beside the softmax model it comes from, with the bytes of their caches.

    python benchmarks/decode.py [results.csv] [--contexts 1024 16384 102400] [--batches 1 8]

On a CPU; on a GPU: `gpu`. Random weights of a Llama of 4 layers, hidden size 512. Before anything is timed, the
student's cached logits must be those of recomputation. The student reads the whole context in parts; the softmax
model's cache is filled with random keys and values, whose number is all that its speed depends on.
"""

import argparse
import csv
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from attention import machine
from lolcats_kernels import HybridConfig, HybridMaps
from lolcats_kernels.hf_cache import LolcatsCache
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lolcats_cli.student.build import linearize

SMALL = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
PART, STEPS = 2048, 16
COLUMNS = ("machine", "torch", "shape", "context", "batch", "model", "tokens/s", "least", "most", "cache MB")


def build(
    sizes: dict[str, int], device: str, dtype: torch.dtype, hybrid: HybridConfig
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(the softmax model, the student), with weights of their own."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        config = LlamaConfig(
            **sizes,
            vocab_size=1024,
            max_position_embeddings=2**20,
            rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        )
        with torch.device(device):
            models.append(LlamaForCausalLM(config).to(dtype).eval())
    softmax, teacher = models
    heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    maps = {layer: HybridMaps(hybrid, heads, size) for layer in range(config.num_hidden_layers)}
    return softmax, linearize(teacher, hybrid, maps)


def gate(student: PreTrainedModel) -> None:
    """Logits from the cache are those of recomputation, within the dtype's rounding."""
    tokens = torch.randint(0, 1024, (2, 300), device=student.device)
    whole = student(tokens, use_cache=False).logits.float()
    cache = student.new_cache()
    parts = [student(part, past_key_values=cache).logits.float() for part in tokens.split([200, 1, 99], 1)]
    tolerance = 1e-3 if student.dtype == torch.float32 else 0.1
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=tolerance, atol=tolerance * whole.abs().max().item())


def seconds_a_step(step: Callable[[], None]) -> list[float]:
    times = []
    for number in range(STEPS + 3):
        started = time.perf_counter()
        step()
        if number >= 3:
            times.append(time.perf_counter() - started)
    return times


def read(student: PreTrainedModel, batch: int, context: int, cache: LolcatsCache) -> LolcatsCache:
    """The student's cache, empty before, after a context of random tokens."""
    left = context
    while left:
        tokens = torch.randint(0, 1024, (batch, min(PART, left)), device=student.device)
        student(tokens, past_key_values=cache, logits_to_keep=1)
        left -= tokens.shape[1]
    return cache


def filled(model: PreTrainedModel, batch: int, context: int) -> DynamicCache:
    cache, config = DynamicCache(), model.config
    shape = (batch, config.num_key_value_heads, context, config.hidden_size // config.num_attention_heads)
    for layer in range(config.num_hidden_layers):
        cache.update(*(torch.randn(shape, device=model.device, dtype=model.dtype) for _ in range(2)), layer)
    return cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", nargs="?")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16384, 102400])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    args = parser.parse_args()
    where = f"{machine()}, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}, fp32")
    with torch.inference_mode(), open(args.csv or os.devnull, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        softmax, student = build(SMALL, "cpu", torch.float32, HybridConfig(window=64, linear_factor="exp"))
        gate(student)
        print("| context | batch | model | tokens/s: median (least to most) | cache, MB |")
        print("| --- | --- | --- | --- | --- |")
        for batch in args.batches:
            for context in args.contexts:
                for name, model in (("student", student), ("softmax", softmax)):
                    cache: Any = student.new_cache() if name == "student" else filled(softmax, batch, context)
                    if name == "student":
                        read(student, batch, context, cache)
                    token = torch.randint(0, 1024, (batch, 1))
                    times = seconds_a_step(lambda m=model, t=token, c=cache: m(t, past_key_values=c))  # type: ignore[misc]
                    size = cache.nbytes if name == "student" else sum(x.keys.nbytes * 2 for x in cache.layers)
                    rates = [batch / t for t in times]
                    row = {
                        "machine": where,
                        "torch": torch.__version__,
                        "shape": "small",
                        "context": context,
                        "batch": batch,
                        "model": name,
                        "tokens/s": statistics.median(rates),
                        "least": min(rates),
                        "most": max(rates),
                        "cache MB": size / 1e6,
                    }
                    table.writerow(row)
                    file.flush()
                    spread = f"{row['tokens/s']:.0f} ({row['least']:.0f} to {row['most']:.0f})"
                    cells = (context, batch, name, spread, f"{row['cache MB']:.1f}")
                    print("| " + " | ".join(map(str, cells)) + " |", flush=True)
                    del cache


if __name__ == "__main__":
    main()
