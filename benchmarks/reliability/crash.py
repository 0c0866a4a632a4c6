"""Kills the stages at every write point and at random times, and compares what the same command then makes.

    python benchmarks/reliability/crash.py [--stages transfer merge] [--every 3] [--random 20] [--jobs 2] [--json FILE]

A trial is real processes: one (or many, one after the other) that dies by SIGKILL, SIGTERM or a failing system call,
then the same command once more. That must exit with 0 and leave the same id and the same bytes in every file as a run
that nothing disturbed (of manifest.json all but `created` and paths). Processes are forked from one that has imported
everything, so a trial takes a second. Write points are the calls of `lolcats_formats.atomic`, through which every byte
of an artifact goes, and every chunk inside a file. Stages checkpoint at every step here, not every 30 seconds.
SIGKILL is tried at every write point (of `--every`), the gentler faults at each fourth of those.

Two kinds of trial lie below every library that writes, also those with writers of their own (safetensors, torch.save,
PEFT): a file system of a few kilobytes (tmpfs, where this process may mount one), and a limit of a file's size.
"""

from __future__ import annotations

import argparse
import errno
import itertools
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "formats")]
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}

import torch  # noqa: E402

torch.set_num_threads(1)

import peft  # noqa: E402, F401
import transformers  # noqa: E402
from lolcats_formats import atomic  # noqa: E402
from lolcats_formats.canonical import identity  # noqa: E402

import lolcats_cli.stages.join  # noqa: E402
import lolcats_cli.stages.lora  # noqa: E402
import lolcats_cli.stages.merge  # noqa: E402, F401
from lolcats_cli.main import run  # noqa: E402
from lolcats_cli.stages import checkpoints  # noqa: E402

ASSETS = ROOT / "lolcats_cli" / "assets"
POINTS = ("write", "append", "rename", "exchange", "remove", "make_directory", "fsync", "fsync_directory")
OUT = "OUT"
STAGES = {
    # With a store of its own each: on a small disk auto would choose another.
    "capture": "capture teacher text.jsonl --store attention --samples 6 --seq-len 48 -o OUT",
    "capture --store block": "capture teacher text.jsonl --store block --block-size 1 --samples 6 --seq-len 48 -o OUT",
    "capture --select": "capture teacher text.jsonl --store attention --samples 8 --select top-esl --keep 4 "
    "--seq-len 48 -o OUT",
    "transfer": "transfer capture --window 8 --feature-dim 8 --steps 3 --grad-accum 1 --eval-steps 2 -o OUT",
    "lora": "lora transfer --steps 3 --grad-accum 1 --eval-steps 2 --lr 0.01 -o OUT",
    "merge": "merge lora --max-shard-size 0.001 -o OUT",
    "join": "join maps-0 maps-1 -o OUT",
    "merge --force": "merge lora --max-shard-size 0.002 --force -o OUT",
}

Fault = Callable[[], Any]


def prepare(folder: Path) -> None:
    """A tiny teacher and one artifact of each kind, for the stages to start from."""
    teacher = folder / "teacher"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=3072,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(teacher)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / "teacher" / name, teacher)
    shutil.copy(ASSETS / "text" / "validation.jsonl", folder / "text.jsonl")
    commands = [STAGES[name].replace(OUT, name) for name in ("capture", "transfer", "lora")]
    commands += [STAGES["transfer"].replace(OUT, f"maps-{layer} --layers {layer}") for layer in range(2)]
    commands += [STAGES["merge"].replace(OUT, "student")]
    for command in commands:
        code = execute(folder, command)
        if code:
            sys.exit(f"lolcats {command}: exit {code}\n{(folder / 'log').read_text()}")


def execute(folder: Path, command: str, fault: Callable[[], None] | None = None, after: float | None = None) -> int:
    """Run one command in a process of its own; its exit code, or minus the signal that ended it.

    fault: called in that process first. after: SIGKILL it so many seconds later.
    """
    child = os.fork()
    if child == 0:
        try:
            os.chdir(folder)
            log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            os.dup2(log, 1)
            os.dup2(log, 2)
            checkpoints.SECONDS, checkpoints.COST = 0.0, math.inf
            if fault is not None:
                fault()
            code = run(command.split())
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        finally:
            os._exit(99)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)  # it is ours until it is waited for, so the number is no one else's
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def at_point(number: int, fault: Fault) -> Callable[[], None]:
    """What makes a process call `fault` at the write point of that number, the first being 0."""

    def install() -> None:
        left = itertools.count(number, -1)

        def step() -> None:
            if next(left) == 0:
                fault()

        def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                step()
                return function(*args)

            return call

        def chunks(content: Any) -> Iterator[Any]:
            for chunk in content:
                yield chunk
                step()

        for name in POINTS:
            setattr(atomic, name, wrap(getattr(atomic, name)))
        write = atomic.write
        atomic.write = lambda path, content: write(path, chunks(content))

    return install


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail(code: int) -> Fault:
    def fault() -> None:
        raise OSError(code, os.strerror(code))

    return fault


def content(folder: Path) -> dict[str, Any]:
    """All that two runs must agree in."""
    files: dict[str, Any] = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"  # what a killed process leaves, which a reader tolerates
    }
    manifest = json.loads(files["manifest.json"])
    del manifest["created"]
    return files | {"manifest.json": identity(manifest)}


class Stage:
    """One stage's command, and the folder from which each trial starts."""

    def __init__(self, name: str, base: Path) -> None:
        self.name, self.base, self.command = name, base, STAGES[name]
        fresh = self.begin("whole")
        points = fresh / "points"

        def count() -> None:
            with points.open("ab", buffering=0) as file:
                file.write(b".")

        started = time.monotonic()
        if execute(fresh, self.command):
            sys.exit(f"{name}: {(fresh / 'log').read_text()}")
        self.seconds = time.monotonic() - started
        self.expected = content(fresh / OUT)
        sizes = [path.stat().st_size for path in (fresh / OUT).rglob("*") if path.is_file()]
        self.bytes, self.largest = sum(sizes), max(sizes)
        again = self.begin("count")
        points = again / "points"

        def everywhere() -> None:
            for point in POINTS:
                setattr(atomic, point, _counted(getattr(atomic, point), count))
            write = atomic.write
            atomic.write = lambda path, chunks: write(path, _counted_chunks(chunks, count))

        execute(again, self.command, everywhere)
        self.points = points.stat().st_size
        shutil.rmtree(fresh)
        shutil.rmtree(again)

    def begin(self, name: str) -> Path:
        """A folder with the stage's inputs; with a finished artifact in the way, where that is to be replaced."""
        folder = self.base.parent / f"{self.name.replace(' ', '')}-{name}"
        folder.mkdir()
        for path in self.base.iterdir():
            (folder / path.name).symlink_to(path)
        (folder / "log").unlink()
        if "--force" in self.command:
            shutil.copytree(self.base / "student", folder / OUT)
        return folder

    def end(self, folder: Path) -> str | None:
        """Run the command to its end; what is wrong with the result, or with what lies beside it, if anything."""
        problem = self.finish(folder)
        if problem:
            return problem
        left = sorted({path.name for path in folder.iterdir()} - {path.name for path in self.base.iterdir()} - {OUT})
        shutil.rmtree(folder)
        return f"left behind: {left}" if left else None

    def finish(self, folder: Path) -> str | None:
        """The same command once more; what is wrong with the result, if anything."""
        code = execute(folder, self.command)
        log = (folder / "log").read_text()
        if code:
            return f"the same command again: exit {code}: {log[-300:]}"
        found = content(folder / OUT)
        if found != self.expected:
            names = sorted(n for n in {*found, *self.expected} if found.get(n) != self.expected.get(n))
            return f"differs in {', '.join(names)}"
        return None

    def at_every_point(self, number: int) -> str | None:
        folder = self.begin(f"kill-{number}")
        code = execute(folder, self.command, at_point(number, kill))
        return self.end(folder) if code == -signal.SIGKILL else f"was not killed: exit {code}"

    def at_many_points(self, number: int) -> str | None:
        """Killed again and again, after some write points each time, until a process comes to the end."""
        folder, draw = self.begin(f"again-{number}"), random.Random(f"{self.name} {number}")
        for _ in range(200):
            # Any point of a run: a unit of work, such as all that follows the last checkpoint, may take most of them.
            code = execute(folder, self.command, at_point(draw.randrange(5, self.points), kill))
            if code != -signal.SIGKILL:
                break
        return self.end(folder) if code in (0, -signal.SIGKILL) else f"exit {code}"

    def at_random(self, number: int) -> str | None:
        folder, draw = self.begin(f"random-{number}"), random.Random(f"{self.name} {number}")
        for _ in range(draw.randrange(1, 4)):
            execute(folder, self.command, after=draw.uniform(0, self.seconds))
        return self.end(folder)

    def by_signal(self, number: int) -> str | None:
        """SIGTERM at a write point: 75, or 0 when what is left is cheap to finish."""
        folder = self.begin(f"term-{number}")
        code = execute(folder, self.command, at_point(number, lambda: signal.raise_signal(signal.SIGTERM)))
        log = (folder / "log").read_text()
        if code not in (0, 75) or "Traceback" in log:
            return f"SIGTERM: exit {code}: {log[-300:]}"
        return self.end(folder)

    def by_error(self, number: int, error: int, expected: int) -> str | None:
        folder = self.begin(f"{error}-{number}")
        code = execute(folder, self.command, at_point(number, fail(error)))
        log = (folder / "log").read_text()
        # An exit of 0: where a failure is of no consequence.
        if code not in (expected, 0) or "Traceback" in log:
            return f"{os.strerror(error)}: exit {code}: {log[-300:]}"
        return self.end(folder)

    def full_disk(self, number: int) -> str | None:
        return self.by_error(number, errno.ENOSPC, 5)

    def read_only(self, number: int) -> str | None:
        return self.by_error(number, errno.EROFS, 3)

    def small_files(self, number: int) -> str | None:
        """No file may grow beyond a size that the artifact's largest has, or a checkpoint's."""
        folder, draw = self.begin(f"files-{number}"), random.Random(f"{self.name} {number}")
        limit = draw.randrange(4096, 2 * self.largest + 8192)  # the log of a trial is a file too
        code = execute(folder, self.command, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
        log = (folder / "log").read_text()
        if code not in (0, 5) or "Traceback" in log:
            return f"files of {limit} bytes: exit {code}: {log[-300:]}"
        return self.end(folder)

    def small_disk(self, number: int) -> str | None:
        """A file system of its own for the output, too small, or just large enough; then it is made larger."""
        folder, draw = self.begin(f"disk-{number}"), random.Random(f"{self.name} {number}")
        size = draw.randrange(16_384, 2 * self.bytes + 65_536)
        (folder / OUT).mkdir()
        _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder / OUT))
        try:
            code = execute(folder, self.command)
            log = (folder / "log").read_text()
            if code not in (0, 5) or "Traceback" in log:
                return f"a disk of {size} bytes: exit {code}: {log[-300:]}"
            _mount("-o", "remount,size=1g", str(folder / OUT))
            problem = self.finish(folder)
        finally:
            subprocess.run(["umount", str(folder / OUT)], check=True)
        shutil.rmtree(folder)
        return problem


def _mount(*args: str) -> None:
    subprocess.run(["mount", *args], check=True, capture_output=True)


def can_mount() -> bool:
    """Whether this process may mount a file system."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            _mount("-t", "tmpfs", "-o", "size=64k", "tmpfs", folder)
        except (OSError, subprocess.CalledProcessError):
            return False
        subprocess.run(["umount", folder], check=True)
        return True


def _counted(function: Callable[..., Any], count: Callable[[], None]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        count()
        return function(*args)

    return call


def _counted_chunks(chunks: Any, count: Callable[[], None]) -> Iterator[Any]:
    for chunk in chunks:
        yield chunk
        count()


KINDS = {
    "killed at a write point": Stage.at_every_point,
    "killed again and again": Stage.at_many_points,
    "killed at random times": Stage.at_random,
    "SIGTERM at a write point": Stage.by_signal,
    "disk full at a write point": Stage.full_disk,
    "read-only at a write point": Stage.read_only,
    "files may not grow": Stage.small_files,
    "small disk": Stage.small_disk,
}


def trials(stage: Stage, every: int, randoms: int, kinds: list[str]) -> Iterator[tuple[str, int]]:
    for kind in kinds:
        if kind == "small disk" and ("--force" in stage.command or not can_mount()):
            continue  # a mounted folder cannot be exchanged for another
        step = every if kind == "killed at a write point" else 4 * every
        yield from ((kind, n) for n in (range(0, stage.points, step) if kind.endswith("point") else range(randoms)))


def campaign(names: list[str], every: int, randoms: int, jobs: int, kinds: list[str]) -> dict[str, dict[str, Any]]:
    """Results by stage: write points, trials by kind, and the texts of what went wrong."""
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="lolcats-crash-") as scratch:
        base = Path(scratch) / "base"
        base.mkdir()
        prepare(base)
        for name in names:
            stage = Stage(name, base)
            tried, wrong = Counter[str](), []
            running: dict[int, tuple[str, int]] = {}
            todo = trials(stage, every, randoms, kinds)

            def collect(tried=tried, wrong=wrong, running=running, scratch=scratch) -> None:
                pid, status = os.waitpid(-1, 0)
                kind, number = running.pop(pid)
                tried[kind] += 1
                problem = Path(scratch) / f"problem-{pid}"
                if status or problem.exists():
                    text = problem.read_text() if problem.exists() else f"the trial itself ended with {status}"
                    wrong.append(f"{kind}, {number}: {text}")

            for kind, number in todo:
                if len(running) == jobs:
                    collect()
                pid = os.fork()
                if pid == 0:
                    try:
                        problem = KINDS[kind](stage, number)
                        if problem:
                            (Path(scratch) / f"problem-{os.getpid()}").write_text(problem)
                        os._exit(0)
                    finally:
                        os._exit(1)
                running[pid] = (kind, number)
            while running:
                collect()
            results[name] = {"write points": stage.points, "tried": dict(tried), "wrong": wrong}
            print(
                f"{name}: {stage.points} write points, {sum(tried.values())} trials, {len(wrong)} wrong",
                file=sys.stderr,
            )
    return results


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = [f"| stage | write points | {' | '.join(KINDS)} | ended wrong |", "| --- " * (len(KINDS) + 3) + "|"]
    for name, result in results.items():
        cells = [str(result["tried"].get(kind, 0)) for kind in KINDS]
        lines.append(f"| {name} | {result['write points']} | {' | '.join(cells)} | {len(result['wrong'])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--every", type=int, default=1, help="try every so many write points")
    parser.add_argument("--random", type=int, default=20, help="trials of each random kind, per stage")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="write the results there too")
    args = parser.parse_args()
    started = time.monotonic()
    results = campaign(args.stages, args.every, args.random, args.jobs, args.kinds)
    print(table(results))
    print(f"\n{time.monotonic() - started:.0f} seconds.", file=sys.stderr)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    wrong = [f"{name}: {text}" for name, result in results.items() for text in result["wrong"]]
    if wrong:
        sys.exit("\n".join(wrong[:20]))


if __name__ == "__main__":
    main()
