"""Merging a large model: seconds beside `cp` of the teacher's weights, and the most memory that it takes.

    python benchmarks/merge.py [--gigabytes 7] [--rounds 3] [--folder DIR]

A Llama of that size in bf16 with random weights, random maps and a LoRA adapter on q, k, v and o of every layer. After
each round the copy's and the student's weights that no adapter touches must be the teacher's, byte for byte. `cp` is
timed with and without `sync`: merge returns when all is on the disk, hashes every byte, and computes golden logits.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "formats")]

from lolcats_formats import ArtifactWriter  # noqa: E402
from lolcats_kernels import HybridConfig, HybridMaps  # noqa: E402
from peft import LoraConfig  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig  # noqa: E402

from lolcats_cli.teacher.identity import identify  # noqa: E402

SHARD = 10**9
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def make_teacher(folder: Path, gigabytes: float) -> None:
    """Random bf16 weights, in shards of 1 GB."""
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_key_value_heads=8, vocab_size=32000
    )
    layer_bytes = 2 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 11008)
    config.num_hidden_layers = max(1, round((gigabytes * 1e9 - 4 * 32000 * 4096) / layer_bytes))
    config.dtype = "bfloat16"
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in AutoModelForCausalLM.from_config(config).state_dict().items()}
    config.save_pretrained(folder)
    generator, shard, where = torch.Generator().manual_seed(0), {}, {}
    for name, shape in shapes.items():
        shard[name] = (0.02 * torch.randn(shape, generator=generator)).bfloat16()
        if sum(tensor.nbytes for tensor in shard.values()) >= SHARD or name == list(shapes)[-1]:
            file = f"model-{len(set(where.values())):05d}.safetensors"
            save_file(shard, folder / file, {"format": "pt"})
            where |= dict.fromkeys(shard, file)
            shard = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def make_lora(folder: Path, teacher: Path) -> None:
    """A LoRA artifact of random maps and a random adapter."""
    config = LlamaConfig.from_pretrained(teacher)
    hybrid = HybridConfig(linear_factor="exp")
    head = {"num_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "scaling": 128**-0.5}
    sizes = {"q_proj": 4096, "k_proj": 1024, "v_proj": 1024, "o_proj": 4096}
    with ArtifactWriter.create(
        folder,
        "lora",
        config={"hybrid": hybrid.to_dict()},
        teacher={"path": str(teacher), "layers": [head] * config.num_hidden_layers, **identify(teacher)},
        data={"tokens": 0},
        tool="benchmark",
    ) as writer:
        tensors = {}
        for layer in range(config.num_hidden_layers):
            writer.save(f"maps/layer-{layer:03d}.safetensors", HybridMaps(hybrid, 32, 128).state_dict())
            for name, size in sizes.items():
                module = f"base_model.model.model.layers.{layer}.self_attn.{name}"
                tensors[f"{module}.lora_A.weight"] = torch.randn(8, 4096) / 64
                tensors[f"{module}.lora_B.weight"] = torch.randn(size, 8) / 64
        writer.save("adapter/adapter_model.safetensors", tensors)
        made = LoraConfig(r=8, lora_alpha=16, target_modules=list(sizes), task_type="CAUSAL_LM")
        made.inference_mode = True
        plain = {key: getattr(value, "value", value) for key, value in made.to_dict().items()}
        writer.write_json("adapter/adapter_config.json", {**plain, "target_modules": sorted(sizes)})
        writer.finish({"layers": {}})


def check(student: Path, teacher: Path) -> None:
    """Weights without an adapter are the teacher's to the bit, the others are not."""
    there = {}
    for file in sorted(student.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            there |= dict.fromkeys(opened.keys(), file)
    for file in sorted(teacher.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                with safe_open(there[name], framework="pt") as other:
                    same = torch.equal(other.get_tensor(name), opened.get_tensor(name))
                if same == any(f".{part}." in name for part in PROJECTIONS):
                    sys.exit(f"{name} {'was not folded' if same else 'was changed'}")


def apart(function: Callable[..., object], *args: object) -> None:
    """Call it in a process of its own: one that is started later counts the memory of who started it as its own."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=args)
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(process.exitcode)


def timed(command: list[str]) -> tuple[float, float, int]:
    """(seconds, seconds of processor time, peak memory in MB) of a process."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "formats")])
    started = time.perf_counter()
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": paths}, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed")
    return time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=7.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work; three times the size is needed")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lolcats-merge-", dir=args.folder) as scratch:
        root = Path(scratch)
        teacher, lora, copy, student = (root / name for name in ("teacher", "lora", "copy", "student"))
        teacher.mkdir()
        apart(make_teacher, teacher, args.gigabytes)
        apart(make_lora, lora, teacher)
        size = sum(file.stat().st_size for file in teacher.glob("*.safetensors"))
        shell = f"mkdir {copy} && cp {teacher}/*.safetensors {copy}"
        merge = [sys.executable, "-m", "lolcats_cli", "merge", str(lora), "-o", str(student), "--max-shard-size", "1"]
        commands = {"cp": ["sh", "-c", shell], "cp and sync": ["sh", "-c", f"{shell} && sync {copy}/*"], "merge": merge}
        found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in commands}
        for _ in range(args.rounds):
            for name, command in commands.items():
                found[name].append(timed(command))
                if name == "merge":
                    apart(check, student, teacher)
                shutil.rmtree(student if name == "merge" else copy)
                os.sync()
        print(f"{size / 1e9:.2f} GB, shards of 1 GB, {args.rounds} rounds\n")
        print("| | seconds: median (least to most) | MB/s | processor seconds | peak memory, MB |")
        print("| --- " * 5 + "|")
        for name, runs in found.items():
            times, work, memory = zip(*runs, strict=True)
            median, peak = statistics.median(times), max(memory)
            spread = f"{median:.1f} ({min(times):.1f} to {max(times):.1f})"
            print(f"| {name} | {spread} | {size / median / 1e6:.0f} | {statistics.median(work):.1f} | {peak} |")


if __name__ == "__main__":
    main()
