"""Damages artifacts in every way it knows and looks at what readers make of them.

    python benchmarks/reliability/mutations.py ARTIFACT [ARTIFACT …] [--count 2000] [--seed 0]

Each case is a copy of an artifact with one change, given to all that reads artifacts. Right is: an error of ours,
or success; wrong is any other exception, or more than ten seconds. A change to bytes that matter must be found by
`verify`: changes whose manifest was given a right id again (a forgery rather than damage) may be a valid artifact, and
only have to be handled.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "formats")]

from lolcats_formats import Artifact, FormatError, artifact_id  # noqa: E402

from lolcats_cli.artifacts.describe import describe, describe_layer, describe_lineage  # noqa: E402
from lolcats_cli.errors import LolcatsError  # noqa: E402
from lolcats_cli.loading.student import load_student, teacher_folder  # noqa: E402
from lolcats_cli.stages.activations import StoredActivations  # noqa: E402
from lolcats_cli.stages.join import join  # noqa: E402
from lolcats_cli.stages.merge import merge  # noqa: E402
from lolcats_cli.teacher.load import LoadOptions  # noqa: E402

SECONDS = 10.0
STRANGE: tuple[Any, ...] = (
    None, True, -1, 0, 2**53, 10**400, 0.5, "", "x" * 300, "../up", "/etc/passwd", "NaN", [], [[]], {}, {"a": 1},
    "\ud800", [0] * 50, ["a", 1],
)  # fmt: skip
RAW = (b"NaN", b"1e999", b"[" * 100_000, b'{"a":1,"a":2}', b'"\\ud800"', b"\xff", b"\xef\xbb\xbf", b"")

Draw = random.Random


def files(folder: Path) -> list[Path]:
    return sorted(
        path for path in folder.rglob("*") if path.is_file() and path.name not in ("manifest.json", "README.md")
    )


def flip_a_bit(folder: Path, draw: Draw) -> None:
    path = draw.choice([path for path in files(folder) if path.stat().st_size])
    data = bytearray(path.read_bytes())
    # Half of them in the first bytes, where the header is.
    place = draw.randrange(min(len(data), 400)) if draw.random() < 0.5 else draw.randrange(len(data))
    data[place] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def truncate(folder: Path, draw: Draw) -> None:
    path = draw.choice([path for path in files(folder) if path.stat().st_size])
    os.truncate(path, draw.randrange(path.stat().st_size))


def lengthen(folder: Path, draw: Draw) -> None:
    with draw.choice(files(folder)).open("ab") as file:
        file.write(draw.randbytes(draw.randrange(1, 20)))


def remove(folder: Path, draw: Draw) -> None:
    draw.choice(files(folder)).unlink()


def swap(folder: Path, draw: Draw) -> None:
    found = files(folder)
    first = draw.choice(found)
    others = [path for path in found if path.read_bytes() != first.read_bytes()]
    second = draw.choice(others)
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def add(folder: Path, draw: Draw) -> None:
    (folder / draw.choice(["extra.bin", "maps.pt", "layers/extra.safetensors"])).parent.mkdir(exist_ok=True)
    (folder / draw.choice(["extra.bin", "maps.pt", "model.pkl"])).write_bytes(draw.randbytes(9))


def link(folder: Path, draw: Draw) -> None:
    path = draw.choice(files(folder))
    outside = folder.parent / "outside"
    shutil.copy(path, outside)
    path.unlink()
    path.symlink_to(draw.choice([outside, "/etc/passwd", "/dev/zero", "nowhere"]))


def edit_manifest_text(folder: Path, draw: Draw) -> None:
    """A change to the bytes of manifest.json between its first and last brace, other than to a date or a path."""
    path = folder / "manifest.json"
    data = path.read_bytes()
    before = artifact_id(json.loads(data))
    while True:
        start = draw.randrange(1, len(data) - 2)
        stop = draw.randrange(start, min(start + 40, len(data) - 1))
        edited = data[:start] + draw.choice(RAW) + data[stop:]
        try:
            if artifact_id(json.loads(edited)) != before:
                break
        except Exception:  # no JSON, or not as it may be
            break
    path.write_bytes(edited)


def _places(value: Any, here: tuple = ()) -> list[tuple]:
    found = []
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        found.append((*here, key))
        if isinstance(item, dict | list):
            found += _places(item, (*here, key))
    return found


def _change(document: Any, draw: Draw) -> None:
    place = draw.choice(_places(document))
    for key in place[:-1]:
        document = document[key]
    action = draw.randrange(4)
    if action == 0:
        del document[place[-1]]
    elif action == 1 and isinstance(document, dict):
        document[draw.choice(["../x", "/abs", "x", "X" * 300, "manifest.json", ".hidden", ""])] = document.pop(
            place[-1]
        )
    else:
        document[place[-1]] = draw.choice(STRANGE)


def edit_manifest(folder: Path, draw: Draw) -> None:
    """Another value, key or type somewhere in the manifest, whose id is left."""
    _rewrite(folder, draw, forge=False)


def forge_manifest(folder: Path, draw: Draw) -> None:
    """The same, and the id fits again."""
    _rewrite(folder, draw, forge=True)


def _rewrite(folder: Path, draw: Draw, *, forge: bool) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    before = artifact_id(manifest)
    for _ in range(20):  # until something changes that the id covers
        _change(manifest, draw)
        try:
            changed = artifact_id(manifest) != before
        except Exception:  # not even canonical
            changed = True
        if changed:
            break
    if forge:
        try:
            manifest["id"] = artifact_id(manifest)
        except Exception:
            return path.write_text(json.dumps(manifest)) and None
    path.write_text(json.dumps(manifest))


def forge_a_header(folder: Path, draw: Draw) -> None:
    """A shard whose header is changed, under a manifest that fits it."""
    import hashlib

    path = draw.choice([path for path in files(folder) if path.suffix == ".safetensors"])
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header, payload = json.loads(data[8 : 8 + length]), data[8 + length :]
    way = draw.randrange(4)
    if way == 0:  # a size beyond the file, or the limit
        data = struct.pack("<Q", draw.choice([2**63, 2**32, len(data), 0, 1])) + data[8:]
    elif way == 1:  # bytes that are no number, in the payload
        payload = b"\xff" * len(payload)
        data = data[: 8 + length] + payload
    else:
        _change(header, draw)
        text = json.dumps(header).encode("utf-8", "surrogatepass")
        data = struct.pack("<Q", len(text)) + text + payload
    path.write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest["files"][str(path.relative_to(folder))] = entry
    manifest["id"] = artifact_id(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


DAMAGE = (flip_a_bit, truncate, lengthen, remove, swap, add, link, edit_manifest_text, edit_manifest)
FORGERY = (forge_manifest, forge_a_header)


def readers(folder: Path, work: Path) -> list[Callable[[], object]]:
    """Everything that reads an artifact, short of computing with it."""

    def inspect() -> None:
        artifact = Artifact.open(folder)
        describe(artifact)
        describe_lineage(artifact)
        describe_layer(artifact, 0)
        artifact.metrics()

    def load() -> None:
        artifact = Artifact.open(folder)
        for name in artifact.files:
            if name.endswith(".safetensors"):
                artifact.load(name)

    def capture() -> None:
        source = StoredActivations(Artifact.open(folder, "capture"))
        for split in ("train", "validation"):
            for _ in source.batches([0], split, 4):
                pass

    def student() -> None:
        artifact = Artifact.open(folder, ("transfer", "lora"))
        load_student(artifact, teacher_folder(artifact), LoadOptions(device="cpu"))

    def written(stage: Callable[[], object]) -> Callable[[], None]:
        def call() -> None:
            try:
                stage()
            finally:
                shutil.rmtree(work, ignore_errors=True)

        return call

    kind = folder.name
    found: list[Callable[[], object]] = [inspect, load]
    if kind == "capture":
        found.append(capture)
    if kind in ("transfer", "lora"):
        found += [student, written(lambda: merge(folder, work))]
    if kind in ("capture", "transfer"):
        found.append(written(lambda: join([folder, folder], work)))
    return found


def run(artifacts: list[Path], count: int, seed: int, scratch: Path) -> dict[str, Counter[str]]:
    """Counts by mutation: tried, found (by verify), and wrong; the latter's texts are in `scratch`/wrong."""
    draw, results = random.Random(seed), {}
    work = scratch / "work"
    for number in range(count):
        source = artifacts[number % len(artifacts)]
        mutation = (*DAMAGE, *FORGERY)[number // len(artifacts) % (len(DAMAGE) + len(FORGERY))]
        counter = results.setdefault(mutation.__name__.replace("_", " "), Counter())
        folder = scratch / Artifact.open(source).kind
        shutil.copytree(source, folder)
        mutation(folder, draw)
        problems = []
        found = False

        def verify(folder=folder) -> None:
            Artifact.open(folder).verify()

        for reader in (verify, *readers(folder, work)):
            started = time.monotonic()
            try:
                reader()
            except (FormatError, LolcatsError):
                found = found or reader is verify
            except Exception as error:
                problems.append(f"{type(error).__name__}: {error}")
            if time.monotonic() - started > SECONDS:
                problems.append("too long")
        if mutation in DAMAGE and not found:
            problems.append("verify found nothing")
        counter["tried"] += 1
        counter["found"] += found
        if problems:
            counter["wrong"] += 1
            with (scratch / "wrong").open("a") as file:
                file.write(f"{number} {mutation.__name__} of {source}: {'; '.join(problems)[:500]}\n")
        shutil.rmtree(folder)
        (scratch / "outside").unlink(missing_ok=True)
    return results


def table(results: dict[str, Counter[str]]) -> str:
    lines = ["| mutation | tried | found by verify | ended wrong |", "| --- | --- | --- | --- |"]
    total: Counter[str] = Counter()
    for name, counter in results.items():
        total.update(counter)
        lines.append(f"| {name} | {counter['tried']} | {counter['found']} | {counter['wrong']} |")
    lines.append(f"| all | {total['tried']} | {total['found']} | {total['wrong']} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", nargs="+", type=Path)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lolcats-mutations-") as scratch:
        results = run(args.artifacts, args.count, args.seed, Path(scratch))
        print(table(results))
        wrong = Path(scratch) / "wrong"
        if wrong.exists():
            sys.exit(wrong.read_text())


if __name__ == "__main__":
    main()
