"""How long it takes until a usual mistake is told: real processes, from the start to the exit.

    python benchmarks/reliability/latency.py [--rounds 5]

Prints a table: the mistake, exit code, message, the least and the median time, and the processor's time, which a busy
machine hardly lengthens. Fails if a code is not the expected one, or the least time is over half a second.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEACHER = ROOT / "lolcats_cli" / "assets" / "teacher"
FIXTURES = ROOT / "tests" / "formats" / "fixtures" / "v1"
LIMIT = 0.5  # seconds
MISTAKES = {
    "lolcats capture nowhere x -o y": 3,
    f"lolcats capture {TEACHER} data.jsonl -o y": 3,
    f"lolcats transfer {FIXTURES / 'lora'} -o y": 3,
    f"lolcats lora {FIXTURES / 'transfer'} -o y --teacher nowhere": 3,
    f"lolcats merge {FIXTURES / 'lora'} -o {TEACHER}": 3,
    "lolcats transfer cap -o y --lr 1e38": 2,
}


def tell(command: str, folder: str) -> tuple[int, str, float, float]:
    """Exit code, the last line on stderr, seconds by the clock and of the processor."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "lolcats_cli", *command.split()[1:]],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "formats")))},
        capture_output=True,
        text=True,
    )
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.returncode, done.stderr.splitlines()[-1], seconds, used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    wrong = []
    print("| command | exit | message | seconds: least (median) | processor |")
    print("| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory(prefix="lolcats-latency-") as folder:
        for command, expected in MISTAKES.items():
            told = [tell(command, folder) for _ in range(rounds)]
            code, message = told[0][:2]
            seconds = [one[2] for one in told]
            shown = [text.replace(f"{TEACHER}", "TEACHER").replace(f"{FIXTURES}/", "") for text in (command, message)]
            print(
                f"| `{shown[0]}` | {code} | {shown[1]} | {min(seconds):.2f} ({statistics.median(seconds):.2f}) "
                f"| {min(one[3] for one in told):.2f} |"
            )
            if code != expected or min(seconds) > LIMIT:
                wrong.append(f"{command}: exit {code}, {min(seconds):.2f} seconds")
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
