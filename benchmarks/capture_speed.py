"""Tokens a second of `lolcats capture`, store by store, beside the teacher's plain forward pass and the disk.

    python benchmarks/capture_speed.py WORK [--device cuda --layers 8 --hidden 4096] [--csv results/capture-cpu.csv]

The teacher has random weights in the shape of Llama 3 8B, narrower by default so that a CPU does it. A capture's
seconds are those of its work on rows: loading, hashing and the probe come once, whatever the number of rows. The plain
pass takes the same batches through the same layers with transformers' own attention.
Before anything is timed, what the store "attention" holds is compared with the plain pass's attention outputs.
"""

import argparse
import csv
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "formats")]

from lolcats_formats import Artifact  # noqa: E402
from lolcats_kernels.softmax import softmax_attention  # noqa: E402

from lolcats_cli.progress import Advance, Progress  # noqa: E402
from lolcats_cli.stages.capture import capture  # noqa: E402
from lolcats_cli.teacher.data import DataOptions  # noqa: E402
from lolcats_cli.teacher.load import LoadOptions  # noqa: E402
from lolcats_cli.teacher.record import LayerInfo  # noqa: E402

TOKENIZER = ROOT / "lolcats_cli" / "assets" / "teacher"
TEXT = ROOT / "lolcats_cli" / "assets" / "text" / "train.jsonl"
STORES: dict[str, dict] = {
    "tokens": {"store": "tokens"},
    "block": {"store": "block"},
    "attention": {"store": "attention"},
    "attention, all rows measured": {"store": "attention", "statistics": "all"},
}


class Clock(Progress):
    """Notes the seconds of the task `capture`."""

    seconds = 0.0

    @contextmanager
    def task(self, name: str, total: int, unit: str = "it") -> Iterator[Advance]:
        started = time.perf_counter()
        yield lambda done=1, **figures: None
        self.seconds = time.perf_counter() - started


def make_teacher(folder: Path, layers: int, hidden: int, dtype: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=max(1, hidden // 512),
        head_dim=128,
        vocab_size=8192,
        max_position_embeddings=8192,
        dtype=dtype,
    )
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / file, folder / file)


def check(artifact: Artifact, folder: Path) -> None:
    """The stored q, k and v give the attention outputs of transformers' own eager attention."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    ids, seen = artifact.load("tokens/validation.safetensors")["input_ids"][:1].long(), []
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=ids)
    stored = artifact.load("layers/000/validation-00000.safetensors")
    q, k, v = (stored[name][:1].float() for name in "qkv")
    found = softmax_attention(q, k, v, LayerInfo.from_dict(artifact.teacher["layers"][0]).spec)
    torch.testing.assert_close(
        found.transpose(1, 2).flatten(2), seen[0], rtol=5e-2, atol=2e-2 * float(seen[0].abs().max())
    )


def plain(folder: Path, artifact: Artifact, device: str, batch_size: int) -> float:
    """Seconds of the forward pass over all rows."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval().to(device)
    rows = torch.cat([artifact.load(f"tokens/{split}.safetensors")["input_ids"] for split in ("train", "validation")])
    with torch.no_grad():
        model.base_model(input_ids=rows[:1].long().to(device), use_cache=False)  # warm
        started = time.perf_counter()
        for batch in rows.split(batch_size):
            hidden = model.base_model(input_ids=batch.long().to(device), use_cache=False).last_hidden_state
        hidden.flatten()[0].item()  # waits for the device
    return time.perf_counter() - started


def disk(folder: Path, size: int = 2**30) -> float:
    """Bytes a second that are written and synced, as `dd conv=fsync` does."""
    import os

    chunk, started = memoryview(os.urandom(2**24)), time.perf_counter()
    with (folder / "probe").open("wb", buffering=0) as file:
        for _ in range(size // len(chunk)):
            file.write(chunk)
        os.fsync(file.fileno())
    (folder / "probe").unlink()
    return size / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    teacher, tokens = args.work / "teacher", args.rows * args.seq_len
    if not teacher.exists():
        make_teacher(teacher, args.layers, args.hidden, args.dtype)
    options = DataOptions(seq_len=args.seq_len, samples=args.rows)
    found: dict[str, list[float]] = {name: [] for name in ("plain forward pass", *STORES)}
    sizes, written = dict.fromkeys(found, 0), []
    for number in range(args.rounds):
        for name, store in STORES.items():
            clock, out = Clock(), args.work / "capture"
            artifact = capture(
                str(teacher),
                str(TEXT),
                out,
                options=options,
                load=LoadOptions(device=args.device),
                batch_size=args.batch_size,
                block_size=4,
                progress=clock,
                **store,
            )
            if name == "attention":
                if number == 0:
                    check(artifact, teacher)
                found["plain forward pass"].append(plain(teacher, artifact, args.device, args.batch_size))
                written.append(disk(args.work))
            found[name].append(clock.seconds)
            sizes[name] = artifact.summary["bytes"]
            shutil.rmtree(out)
    rate = {name: tokens / sorted(seconds)[len(seconds) // 2] for name, seconds in found.items()}
    where = torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.processor() or "cpu"
    fields = ["what", "tokens a second", "of the plain pass", "bytes a second", "of the disk's", "where", "torch"]
    table = []
    for name, value in rate.items():
        speed = sizes[name] / tokens * value
        share = f"{speed / max(written):.2f}" if speed else ""
        table.append(
            [
                name,
                f"{value:.0f}",
                f"{value / rate['plain forward pass']:.2f}",
                f"{speed:.3g}",
                share,
                where,
                torch.__version__,
            ]
        )
    print(f"the disk writes {max(written) / 1e6:.0f} MB/s")
    for row in [fields, *table]:
        print("| " + " | ".join(row[:5]) + " |")
    if args.csv:
        with args.csv.open("w", newline="") as file:
            csv.writer(file).writerows([fields, *table])


if __name__ == "__main__":
    main()
