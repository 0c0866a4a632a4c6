"""Forges what is read besides manifests and shards, and looks at how commands end.

    python benchmarks/reliability/forgeries.py [--count 200] [--seed 0] [--jobs 2]

Each case is one change to a file, whose size, hash and id are put right again, and a real process of each command that
reads it: a student's config.json, generation_config.json, tokenizer and golden logits (`verify`, `generate`), an
adapter's configuration (`merge`, `generate`), a teacher's config.json, index and tokenizer (`capture`), and checkpoints
(`import`). Wrong is an exit code of 1, an end by a signal, and a process that takes over half a minute of the processor
or 16 GB, which is ended.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import crash
import torch
from lolcats_formats import artifact_id
from mutations import STRANGE, _places

SECONDS, BYTES = 30, 16 * 2**30
NUMBERS = (10**9, 2**62, -7, 1e308, 1e-320, 3, "3", float("nan"), float("inf"))
TEXTS = (b"", b"{", b"[]", b"null", b"\xff\xfe{}", b'{"a":' + b"[" * 100_000, b'{"a": 1, "a": 2}', b"9" * 5000)
CAPTURE = "capture teacher text.jsonl --samples 4 --seq-len 32 -o new"
ADAPTED = ("merge lora -o new", "generate lora --prompt x")
# What is changed, in which folder, and the commands that read it.
TARGETS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "a student's config.json": ("student", "config.json", ("verify student", "generate student --prompt x")),
    "a student's generation_config.json": ("student", "generation_config.json", ("generate student --prompt x",)),
    "a student's tokenizer_config.json": ("student", "tokenizer_config.json", ("generate student --prompt x",)),
    "a student's tokenizer.json": ("student", "tokenizer.json", ("generate student --prompt x",)),
    "a student's golden logits": ("student", "golden.safetensors", ("verify student",)),
    "an adapter's configuration": ("lora", "adapter/adapter_config.json", ADAPTED),
    "a teacher's config.json": ("teacher", "config.json", (CAPTURE,)),
    "a teacher's tokenizer_config.json": ("teacher", "tokenizer_config.json", (CAPTURE,)),
    "a teacher's index": ("teacher", "model.safetensors.index.json", (CAPTURE,)),
    "a checkpoint": (".", "maps.pt", ("import maps.pt --teacher teacher --window 8 -o new",)),
}  # fmt: skip


def change(content: bytes, draw: random.Random) -> bytes:
    """The file with another value, key or type at one or two places; now and then another text."""
    if draw.random() < 0.1:
        return draw.choice(TEXTS)
    document = json.loads(content)
    for _ in range(draw.randrange(1, 3)):
        places = _places(document)
        if not places:
            break
        place = draw.choice([p for p in places if len(p) == 1] if draw.random() < 0.5 else places)
        inner: Any = document
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = draw.choice(NUMBERS if draw.random() < 0.5 else STRANGE)
    return json.dumps(document).encode("utf-8", "surrogatepass")


def damage(content: bytes, draw: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(draw.randrange(1, 4)):
        place = draw.randrange(len(data)) if draw.random() < 0.3 else draw.randrange(min(len(data), 700))
        data[place] = draw.randrange(256)
    return bytes(data[: draw.randrange(len(data))] if draw.random() < 0.1 else data)


def golden(content: bytes, draw: random.Random) -> bytes:
    """Other tensors, under a right header."""
    from safetensors.torch import save

    shape = draw.choice(((0,), (1, 1), (2, 0), (2, 8), (3, 3072), (1, 3072), (2, 3, 4)))
    dtype = draw.choice((torch.int64, torch.float32, torch.int32, torch.bool, torch.bfloat16))
    fill = draw.choice((0, 1, -1, 10**6, 2**40) if dtype == torch.int64 else (0, 1))
    other = torch.full(draw.choice(((2, 3072), (1, 3072), (2, 5), (0, 0))), draw.choice((0.0, 1.0, float("nan"), 1e30)))
    return save({"input_ids": torch.full(shape, fill, dtype=dtype), draw.choice(("logits", "logit")): other})


def forge(folder: Path) -> None:
    """Put the sizes, hashes and the id of an artifact right again."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for name, entry in manifest["files"].items():
        data = (folder / name).read_bytes()
        entry |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest["id"] = artifact_id(manifest)
    path.write_text(json.dumps(manifest))


def prepare(base: Path) -> None:
    """Inputs of every command: what the crash campaign begins from, a teacher in shards, and a checkpoint."""
    crash.prepare(base)
    teacher = base / "teacher"
    (teacher / "model.safetensors").rename(teacher / "model-1.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": {"model.embed_tokens.weight": "model-1.safetensors"}}
    (teacher / "model.safetensors.index.json").write_text(json.dumps(index))
    name = "model.layers.{}.self_attn.{}"
    weights = {}
    for layer in range(2):
        weights |= {name.format(layer, f"feature_map_{x}.mlp.layer"): torch.randn(4, 16, 8) for x in "qk"}
        weights[name.format(layer, "window_factors")] = torch.randn(1, 4, 1, 1)
    torch.save({"model_state_dict": weights}, base / "maps.pt")


def limited() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))


def case(base: Path, target: str, number: int, seed: int) -> str | None:
    """One forgery and its commands; what ended wrong, if anything."""
    draw = random.Random(f"{seed} {target} {number}")
    place, name, commands = TARGETS[target]
    folder = base.parent / f"case-{os.getpid()}"
    folder.mkdir()
    for path in base.iterdir():
        (folder / path.name).symlink_to(path)
    if place != ".":
        (folder / place).unlink()
        shutil.copytree(base / place, folder / place, symlinks=True)
    (folder / "log").unlink()
    how: Callable[[bytes, random.Random], bytes] = {".pt": damage, ".safetensors": golden}.get(
        Path(name).suffix, change
    )
    file = folder / place / name
    content = how(file.read_bytes(), draw)
    file.unlink()
    file.write_bytes(content)
    if (folder / place / "manifest.json").exists():
        forge(folder / place)
    problem = None
    for command in commands:
        code = crash.execute(folder, command, limited)
        if code not in (0, 2, 3, 4, 5):
            said = (folder / "log").read_text(errors="replace").strip().splitlines()[-1:] or [""]
            problem = f"lolcats {command}: exit {code}: {said[0][:300]} [{content[:200]!r}]"
    shutil.rmtree(folder)
    return problem


def campaign(count: int, seed: int, jobs: int, targets: list[str]) -> dict[str, tuple[int, list[str]]]:
    """Per target, how many were tried, and what ended wrong."""
    results: dict[str, tuple[int, list[str]]] = {target: (0, []) for target in targets}
    with tempfile.TemporaryDirectory(prefix="lolcats-forgeries-") as scratch:
        base = Path(scratch) / "base"
        base.mkdir()
        prepare(base)
        todo: Iterator[tuple[str, int]] = ((target, number) for target in targets for number in range(count))
        running: dict[int, tuple[str, int]] = {}

        def collect() -> None:
            pid, status = os.wait()
            target, number = running.pop(pid)
            said = Path(scratch) / f"problem-{pid}"
            tried, wrong = results[target]
            if status or said.exists():
                text = said.read_text() if said.exists() else f"the case itself ended with {status}"
                wrong.append(f"{target}, {number}: {text}")
            results[target] = (tried + 1, wrong)

        for target, number in todo:
            if len(running) == jobs:
                collect()
            pid = os.fork()
            if pid == 0:
                try:
                    problem = case(base, target, number, seed)
                    if problem:
                        (Path(scratch) / f"problem-{os.getpid()}").write_text(problem)
                    os._exit(0)
                finally:
                    os._exit(1)
            running[pid] = (target, number)
        while running:
            collect()
    return results


def table(results: dict[str, tuple[int, list[str]]]) -> str:
    rows = [f"| {target} | {tried} | {len(wrong)} |" for target, (tried, wrong) in results.items()]
    total = Counter(tried=sum(tried for tried, _ in results.values()), wrong=sum(len(w) for _, w in results.values()))
    return "\n".join(
        [
            "| forged | tried | ended wrong |",
            "| --- | --- | --- |",
            *rows,
            f"| all | {total['tried']} | {total['wrong']} |",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="forgeries of each sort")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    args = parser.parse_args()
    results = campaign(args.count, args.seed, args.jobs, args.targets)
    print(table(results))
    wrong = [text for _, texts in results.values() for text in texts]
    if wrong:
        sys.exit("\n".join(wrong[:60]))


if __name__ == "__main__":
    main()
