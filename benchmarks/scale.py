"""A teacher of Llama 3.1 8B's shape with random weights, through the four stages on a CPU under a memory limit.

    python benchmarks/scale.py WORK [--layers 32] [--limit 8] [--store block tokens] [--csv results/scale-cpu.csv]

The teacher takes 16 GB of disk, the student as much again. Each stage runs as a process of its own in a control group
whose memory is limited (version 1 or 2; as root, or with systemd-run). Beside its seconds stands the most memory that
it had to itself: not the pages of mapped files, which the kernel takes back when it needs room.
"""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
ENV = os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "formats"))}
TOKENIZER = ROOT / "lolcats_cli" / "assets" / "teacher"
TEXT = ROOT / "lolcats_cli" / "assets" / "text" / "train.jsonl"
CONFIG = {  # Llama 3.1 8B
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
ROWS = ["--seq-len", "64", "--samples", "8", "--batch-size", "4"]
FIELDS = ["stage", "seconds", "own memory, GB", "limit, GB", "layers", "bytes on disk", "processor", "torch"]


def make_teacher(folder: Path, layers: int) -> None:
    """Random weights, a file for every layer."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    hidden, inner, kv = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["num_key_value_heads"] * 128
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    parts: list[dict[str, tuple[int, ...]]] = [
        {f"model.layers.{i}.{name}.weight": shape for name, shape in shapes.items()}
        | {f"model.layers.{i}.{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
        for i in range(layers)
    ]
    parts += [{"model.embed_tokens.weight": (CONFIG["vocab_size"], hidden)}, {"model.norm.weight": (hidden,)}]
    parts += [{"lm_head.weight": (CONFIG["vocab_size"], hidden)}]
    # To draw 8 billion numbers takes longer than the stages: one matrix of each shape serves all layers.
    generator, index, drawn = torch.Generator().manual_seed(0), {}, {}
    for number, part in enumerate(parts):
        name = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        for shape in part.values():
            if shape not in drawn:
                scale = 0.02 if len(shape) > 1 else 1.0
                noise = torch.randn(shape[-2:], generator=generator) if len(shape) > 1 else torch.ones(shape)
                drawn[shape] = (noise * scale).to(torch.bfloat16)
        save_file({key: drawn[shape].clone() for key, shape in part.items()}, folder / name, {"format": "pt"})
        index |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / file, folder / file)


@contextmanager
def limited(gigabytes: float) -> Iterator[list[str]]:
    """A prefix for commands that may use so much memory, mapped files included."""
    size, name = str(int(gigabytes * 1e9)), f"lolcats-{os.getpid()}"
    for root, file in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        group = Path(root) / name
        try:
            group.mkdir()
            (group / file).write_text(size)
        except OSError:
            continue
        yield ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
        group.rmdir()
        return
    yield ["systemd-run", "--scope", "--quiet", "-p", f"MemoryMax={size}"]


def run(command: list[str], log: Path) -> tuple[float, float]:
    """Seconds, and the most gigabytes that the process had to itself."""
    started, most = time.monotonic(), 0
    with log.open("a") as out:
        process = subprocess.Popen(command, env=ENV, stdout=out, stderr=out)
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
                fields = dict(line.split(":", 1) for line in status.splitlines())
                most = max(most, int(fields["RssAnon"].split()[0]) * 1024)
            except (OSError, KeyError):  # it has just ended
                pass
            time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}; see {log}")
    return time.monotonic() - started, most / 1e9


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def stages(work: Path, store: str, last: str) -> Iterator[tuple[str, Path, list[str]]]:
    capture, maps = work / f"cap-{store}", work / f"maps-{store}"
    yield f"capture --store {store}", capture, [
        "capture", str(work / "teacher"), str(TEXT), "-o", str(capture), "--store", store, *ROWS
    ]  # fmt: skip
    yield f"transfer of {store}", maps, ["transfer", str(capture), "-o", str(maps), "--steps", "2", "--grad-accum", "2"]
    if store != last:
        return
    yield "lora", work / "lora", ["lora", str(maps), "-o", str(work / "lora"), "--steps", "2", "--grad-accum", "1"]
    yield "merge", work / "student", ["merge", str(work / "lora"), "-o", str(work / "student")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--limit", type=float, default=8.0, help="gigabytes")
    parser.add_argument("--store", nargs="+", default=["block", "tokens"])
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    if not (args.work / "teacher").exists():
        make_teacher(args.work / "teacher", args.layers)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
    results = []
    with limited(args.limit) as prefix:
        for store in args.store:
            for stage, made, command in stages(args.work, store, args.store[-1]):
                seconds, own = run([*prefix, sys.executable, "-m", "lolcats_cli", *command], args.work / "log.txt")
                row = [stage, f"{seconds:.0f}", f"{own:.2f}", args.limit, args.layers, size(made), processor]
                results.append([*row, torch.__version__])
                print(f"{stage}: {seconds:.0f} s, {own:.2f} GB of its own, {size(made):,} bytes", flush=True)
    if args.csv:
        with args.csv.open("w", newline="") as file:
            csv.writer(file).writerows([FIELDS, *results])


if __name__ == "__main__":
    main()
