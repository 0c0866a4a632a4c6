"""What safety costs: checkpoints beside the run they belong to, and the record of progress beside its number of files.

    python benchmarks/reliability/overhead.py [--files 10000]

The runs are transfer and lora on the embedded teacher, with the program's own interval between checkpoints.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "formats")]

from lolcats_formats import ArtifactWriter  # noqa: E402

from lolcats_cli.main import run  # noqa: E402
from lolcats_cli.stages.checkpoints import Checkpoints  # noqa: E402

ASSETS = ROOT / "lolcats_cli" / "assets"
STAGES = {
    "transfer": "transfer {0}/capture -o {0}/transfer --steps 240",
    "lora": "lora {0}/transfer -o {0}/lora --steps 40 --dtype float32",
}


def checkpoint_cost(command: str) -> tuple[int, float, float]:
    """(checkpoints, seconds they took, seconds of the run) of one command."""
    spent: list[float] = []

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Checkpoints, *args: Any, **kwargs: Any) -> Any:
            try:
                return method(self, *args, **kwargs)
            finally:
                spent.append(self._cost)

        return call

    started = time.monotonic()
    with patch.object(Checkpoints, "record", timed(Checkpoints.record)):
        if run(command.split()):
            sys.exit(f"lolcats {command} failed")
    return len(spent), sum(spent), time.monotonic() - started


def file_cost(folder: Path, count: int) -> dict[int, float]:
    """Milliseconds that completing one more file of 1 KB takes once there are so many."""
    found = {}
    teacher = {"path": "nowhere", "layers": [{"num_heads": 1, "num_key_value_heads": 1, "head_dim": 1, "scaling": 1.0}]}
    with ArtifactWriter.create(folder, "student", config={}, teacher=teacher, data={}, tool="overhead") as writer:
        content = bytes(1000)
        for number in range(count):
            started = time.monotonic()
            writer.write_bytes(f"layers/{number:06d}.bin", content)
            if number + 1 in (10, 100, 1000, 5000, 10_000):
                found[number + 1] = 1000 * (time.monotonic() - started)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lolcats-overhead-") as scratch:
        print("| files in the artifact | ms to complete one more |\n| --- | --- |")
        for number, cost in file_cost(Path(scratch) / "files", args.files).items():
            print(f"| {number} | {cost:.1f} |", flush=True)
        teacher, text = ASSETS / "teacher", ASSETS / "text" / "train.jsonl"
        if run(f"capture {teacher} {text} --samples 120 --dtype float32 -o {scratch}/capture".split()):
            sys.exit("capture failed")
        print("\n| stage | seconds | checkpoints | seconds in them | share |\n| --- | --- | --- | --- | --- |")
        for name, command in STAGES.items():
            count, spent, total = checkpoint_cost(command.format(scratch))
            print(f"| {name} | {total:.0f} | {count} | {spent:.2f} | {spent / total:.2%} |", flush=True)


if __name__ == "__main__":
    main()
