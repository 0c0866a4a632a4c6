"""Generation after long contexts: a student beside the softmax model it comes from, with the bytes of their caches.

    python benchmarks/decode.py [results.csv] [--shape small|8b] [--contexts 1024 16384 102400] [--batches 1 8]

Random weights of a Llama of that shape (small: 4 layers, hidden 512; 8b: Llama 3's, for a GPU). Before anything is
timed, the student's cached logits must be those of recomputation. The student reads the whole context in parts; the
softmax model's cache is filled with random keys and values, whose number is all that its speed depends on.
"""

import argparse
import csv
import os
import statistics
import time
from collections.abc import Callable

import torch
from attention import machine
from lolcats_kernels import HybridConfig, HybridMaps
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lolcats_cli.student.build import linearize

SHAPES = {
    "small": {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}
KEY_HEADS = {"small": 2, "8b": 8}
PART, STEPS = 2048, 16
COLUMNS = ("machine", "torch", "shape", "context", "batch", "model", "tokens/s", "least", "most", "cache MB")


def build(shape: str, device: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(the softmax model, the student), with weights of their own."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        config = LlamaConfig(
            **SHAPES[shape],
            num_key_value_heads=KEY_HEADS[shape],
            vocab_size=1024,
            max_position_embeddings=2**20,
            rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        )
        with torch.device(device):
            models.append(LlamaForCausalLM(config).to(dtype).eval())
    softmax, teacher = models
    heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    hybrid = HybridConfig(window=64, linear_factor="exp")
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


def seconds_a_step(step: Callable[[], None], device: str) -> list[float]:
    times = []
    for number in range(STEPS + 3):
        _wait(device)
        started = time.perf_counter()
        step()
        _wait(device)
        if number >= 3:
            times.append(time.perf_counter() - started)
    return times


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def read(student: PreTrainedModel, batch: int, context: int):
    """The student's cache after a context of random tokens."""
    cache, left = student.new_cache(), context
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
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16384, 102400])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    where = torch.cuda.get_device_name() if device == "cuda" else f"{machine()}, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}, {args.shape}, {dtype}")
    with torch.inference_mode(), open(args.csv or os.devnull, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        softmax, student = build(args.shape, device, dtype)
        gate(student)
        print("| context | batch | model | tokens/s: median (least to most) | cache, MB |")
        print("| --- | --- | --- | --- | --- |")
        for batch in args.batches:
            for context in args.contexts:
                for name, model in (("student", student), ("softmax", softmax)):
                    cache = read(student, batch, context) if name == "student" else filled(softmax, batch, context)
                    token = torch.randint(0, 1024, (batch, 1), device=device)
                    times = seconds_a_step(lambda m=model, t=token, c=cache: m(t, past_key_values=c), device)  # type: ignore[misc]
                    size = cache.nbytes if name == "student" else sum(x.keys.nbytes * 2 for x in cache.layers)
                    rates = [batch / t for t in times]
                    row = {
                        "machine": where,
                        "torch": torch.__version__,
                        "shape": args.shape,
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
