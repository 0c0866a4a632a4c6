"""Times `lolcats verify` beside sha256sum on the same files.

    python benchmarks/reliability/verify.py [--megabytes 512] [--files 8] [--rounds 5]

The floor is SHA-256 itself: every byte is hashed once, on as many cores as there are. Each round runs every command
once, as a process of its own, from the page cache; a verify that does not find a flipped bit is not timed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PATHS = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "formats")]
sys.path[:0] = PATHS

import torch  # noqa: E402
from lolcats_formats import ArtifactWriter  # noqa: E402

LAYERS = [{"num_heads": 1, "num_key_value_heads": 1, "head_dim": 1, "scaling": 1.0}]


def make(folder: Path, megabytes: int, files: int) -> list[str]:
    """An artifact of random bytes; its files' names."""
    generator = torch.Generator().manual_seed(0)
    teacher = {"path": "nowhere", "layers": LAYERS}
    with ArtifactWriter.create(folder, "student", config={}, teacher=teacher, data={}, tool="benchmark") as writer:
        for i in range(files):
            numbers = torch.randint(0, 256, (megabytes * 10**6 // files,), dtype=torch.uint8, generator=generator)
            writer.save(f"model-{i:05d}.safetensors", {"x": numbers})
        return sorted(writer.finish({}).files)


def check(folder: Path, verify: list[str], name: str) -> None:
    """Exits unless verify finds a flipped bit, and nothing once it is flipped back."""
    for expected in (3, 0):
        with (folder / name).open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_END)
            file.write(bytes([byte ^ 1]))
        code = subprocess.run(verify, env=environment(), capture_output=True).returncode
        if code != expected:
            sys.exit(f"verify exits with {code} where {expected} is right")


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(PATHS)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory(prefix="lolcats-verify-") as scratch:
        folder = Path(scratch) / "artifact"
        names = make(folder, args.megabytes, args.files)
        verify = [sys.executable, "-m", "lolcats_cli", "verify", str(folder)]
        check(folder, verify, names[0])
        many = f"printf '%s\\n' {' '.join(names)} | xargs -P {cores} -n 1 sha256sum"
        commands = {
            "lolcats verify": verify,
            "sha256sum": ["sha256sum", *names],
            f"sha256sum, {cores} at a time": ["bash", "-c", many],
            "lolcats --help (the start alone)": [*verify[:3], "--help"],
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(args.rounds):
            for name, command in commands.items():
                started = time.perf_counter()
                subprocess.run(command, cwd=folder, env=environment(), check=True, capture_output=True)
                seconds[name].append(time.perf_counter() - started)
    print(f"{args.megabytes} MB in {args.files} files, {cores} cores, {args.rounds} rounds\n")
    print("| | seconds: median (least to most) | MB/s |\n| --- | --- | --- |")
    for name, times in seconds.items():
        median = statistics.median(times)
        rate = "" if "--help" in name else f"{args.megabytes / median:.0f}"
        print(f"| {name} | {median:.2f} ({min(times):.2f} to {max(times):.2f}) | {rate} |")


if __name__ == "__main__":
    main()
