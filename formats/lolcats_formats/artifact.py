"""Reading an artifact. Opening is cheap, and every byte is checked before it is used."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import schema, tensors
from .canonical import artifact_id, parse
from .errors import Damaged, FormatError, NotAnArtifact, Unfinished, WrongKind
from .limits import (
    COMMANDS,
    KINDS,
    MANIFEST,
    MAX_JSON_BYTES,
    MAX_METRICS_LINE,
    METRICS,
    PROGRESS,
    check_name,
    is_ignored,
)

if TYPE_CHECKING:
    import torch

AGAIN = "Copy the artifact again, or make it again."
GIVE = "Give the directory that a lolcats command wrote."
NO_LINKS = "Links are not followed in an artifact. Copy it again with `cp -rL`."

# Files whose SHA-256 was found right in this process: (path, device, inode, size, mtime and ctime in ns, SHA-256).
_verified: set[tuple[Any, ...]] = set()


class Artifact:
    """A finished artifact directory. Made by `Artifact.open` and by `ArtifactWriter.finish`.

    path: the directory. manifest: manifest.json as a dict. Its fields: kind, id, config, teacher, data,
    parents (dicts with id, kind, path, parents), files (name -> {"size", "sha256"}) and summary.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.kind: str = manifest["kind"]
        self.id: str = manifest["id"]
        self.config: dict[str, Any] = manifest["config"]
        self.teacher: dict[str, Any] = manifest["teacher"]
        self.data: dict[str, Any] = manifest["data"]
        self.parents: list[dict[str, Any]] = manifest["parents"]
        self.files: dict[str, dict[str, Any]] = manifest["files"]
        self.summary: dict[str, Any] = manifest["summary"]

    def __repr__(self) -> str:
        return f"Artifact({str(self.path)!r}, kind={self.kind!r}, id={self.id[:12]!r})"

    @classmethod
    def open(cls, path: str | os.PathLike[str], kind: str | tuple[str, ...] | None = None) -> Artifact:
        """Opens the artifact in the directory `path`: reads the manifest, and compares the sizes of all files.

        kind: the kind, or the kinds, that the artifact may have; None for all.
        Raises NotAnArtifact (Unfinished while its writer has not finished), UnsupportedVersion, WrongKind,
        Damaged.
        """
        path = Path(path)
        manifest = read_manifest(path)
        expected = (kind,) if isinstance(kind, str) else kind
        if expected is not None and manifest["kind"] not in expected:
            made_by = _either([f"`{COMMANDS[k]}`" for k in expected])
            raise WrongKind(
                f"{path} is a {manifest['kind']} artifact, but a {_either(expected)} artifact is "
                f"needed here. {made_by} makes one."
            )
        checked: set[Path] = set()
        for name, entry in manifest["files"].items():
            size = _regular_size(path, name, checked)
            if size != entry["size"]:
                raise Damaged(
                    f"{path / name} is damaged: it has {size} bytes, and the manifest says {entry['size']}. {AGAIN}"
                )
        return cls(path, manifest)

    def file(self, name: str) -> Path:
        """The path of one of the artifact's files, unchecked; raises FormatError for an unknown name."""
        if name not in self.files:
            raise FormatError(f"{self.path} (a {self.kind} artifact) has no file {name!r}.")
        return self.path / name

    def header(self, name: str) -> dict[str, tensors.TensorInfo]:
        """The tensors of a safetensors shard by name: (dtype, shape, nbytes), without torch."""
        return tensors.read_header(self.file(name), str(self.path / name))

    def load(self, name: str, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
        """The tensors of a safetensors shard, or only those in `names`, on the CPU.

        The shard's SHA-256 is checked on its first read in this process. Tensors are mapped from the file.
        """
        self.check(name)
        header = self.header(name)
        wanted = list(header if names is None else names)
        for tensor in wanted:
            if tensor not in header:
                raise FormatError(f"{self.path / name} has no tensor {tensor!r}.")
        return tensors.load(self.path / name, wanted)

    def read(self, name: str) -> bytes:
        """A small file's bytes, checked."""
        self.check(name)
        return (self.path / name).read_bytes()

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON object's file, checked and read strictly (no duplicate keys, no NaN)."""
        return parse(self.read(name), str(self.path / name))

    def metrics(self) -> list[dict[str, Any]]:
        """The events of metrics.jsonl, in order; empty when the artifact has none."""
        if METRICS not in self.files:
            return []
        where = str(self.path / METRICS)
        events = []
        for number, line in enumerate(self.read(METRICS).splitlines(), 1):
            if len(line) > MAX_METRICS_LINE:
                raise Damaged(f"{where}, line {number}, is longer than {MAX_METRICS_LINE} bytes. {AGAIN}")
            events.append(parse(line, f"{where}, line {number}"))
        return events

    def ancestor(self, kind: str) -> Artifact:
        """The nearest artifact of that kind in the lineage.

        It is looked for at the path that the manifest records, then beside this artifact. Its id must be the recorded
        one. Raises FormatError when the lineage has no such artifact, NotAnArtifact when it is in neither place.
        """
        level = self.parents
        while level and not any(p["kind"] == kind for p in level):
            level = [grand for parent in level for grand in parent["parents"]]
        entry = next((p for p in level if p["kind"] == kind), None)
        if entry is None:
            raise FormatError(f"{self.path} (a {self.kind} artifact) was not made from a {kind} artifact.")
        recorded = Path(entry["path"])
        for place in (recorded, self.path.absolute().parent / recorded.name):
            with contextlib.suppress(OSError, ValueError):  # nothing there, or no path at all
                artifact = Artifact.open(place, kind)
                if artifact.id == entry["id"]:
                    return artifact
        raise NotAnArtifact(
            f"{self.path} was made from the {kind} artifact {entry['id'][:12]}. That artifact is not at {recorded}, "
            f"and not beside {self.path}. Put it in one of these places."
        )

    def check(self, name: str) -> None:
        """Compares one file's SHA-256 with the manifest's, once per process; raises Damaged."""
        path, entry = self.file(name), self.files[name]
        _regular_size(self.path, name, set())
        key = (os.path.realpath(path), *_stamp(path), entry["sha256"])
        if key not in _verified:
            _check_hash(path, entry, lambda count: None)
            _verified.add(key)

    def verify(self, progress: Callable[[int], None] | None = None) -> None:
        """Reads every byte; raises Damaged naming the files that differ, are missing or do not belong here.

        `progress` is called with the number of bytes just read, one call at a time.
        """
        problems = self._problems(progress)
        problems += [
            f"{self.path / name} is not part of the artifact. Move it away." for name in unlisted(self.path, self.files)
        ]
        _raise(problems)

    def check_all(self) -> None:
        """Reads every byte of the listed files; raises Damaged naming those that differ. Other files are ignored."""
        _raise(self._problems(None))

    def _problems(self, progress: Callable[[int], None] | None) -> list[str]:
        """What is wrong with the listed files, one sentence each."""
        mutex, stop = threading.Lock(), threading.Event()

        def advance(count: int) -> None:
            if stop.is_set():
                raise InterruptedError
            if progress is not None:
                with mutex:
                    progress(count)

        def problem(name: str) -> str | None:
            try:
                _regular_size(self.path, name, set())
                _check_hash(self.path / name, self.files[name], advance)
                self._check_content(name)
            except Damaged as error:
                return str(error)
            return None

        manifest = read_manifest(self.path)
        if manifest["id"] != self.id:
            raise Damaged(f"{self.path} was replaced by another artifact while it was read. Open it again.")
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            try:
                # Largest first, so that no thread is left alone with a large file at the end.
                names = sorted(self.files, key=lambda n: -self.files[n]["size"])
                found = dict(zip(names, pool.map(problem, names), strict=True))
            except BaseException:
                stop.set()
                pool.shutdown(cancel_futures=True)
                raise
        return [text for name in sorted(found) if (text := found[name])]

    def _check_content(self, name: str) -> None:
        if name.endswith(".safetensors"):
            self.header(name)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the artifact in `path`, with all that can be checked without its files."""
    file = path / MANIFEST
    try:
        data = read_small(file)
    except (FileNotFoundError, NotADirectoryError):
        raise _no_manifest(path) from None
    manifest = parse(data, str(file))
    schema.check_version(manifest, str(file))
    kind = manifest.get("kind")
    if kind not in KINDS:
        raise Damaged(f"{file}: The kind {str(kind)[:40]!r} is not one of {', '.join(KINDS)}.")
    schema.check(manifest, kind, str(file))
    check_names(manifest["files"], str(file))
    if artifact_id(manifest) != manifest["id"]:
        raise Damaged(f"{file} was edited or damaged: its content does not give its id. {AGAIN}")
    return manifest


def check_names(names: Iterable[str], where: str) -> None:
    """Raises Damaged for names that break the rules, or that a file system without case would mix up."""
    seen: dict[str, str] = {}
    for name in names:
        try:
            check_name(name)
        except Damaged as error:
            raise Damaged(f"{where}: {error}") from None
        if (other := seen.setdefault(name.lower(), name)) != name:
            raise Damaged(f"{where}: The names {other!r} and {name!r} differ only in upper and lower case.")


def read_small(file: Path) -> bytes:
    """The bytes of manifest.json or progress.json: a regular file, no link, not larger than the limit."""
    status = os.lstat(file)
    if not stat.S_ISREG(status.st_mode):
        raise Damaged(f"{file} is not a regular file. {AGAIN}")
    if status.st_size > MAX_JSON_BYTES:
        raise Damaged(f"{file} is larger than the limit of {MAX_JSON_BYTES} bytes. {AGAIN}")
    return file.read_bytes()


def recorded_kind(path: Path) -> str | None:
    """The kind of the artifact in `path`, finished or not. None if there is none, or its file cannot be read."""
    for name in (MANIFEST, PROGRESS):
        with contextlib.suppress(FormatError, OSError):
            return str(parse(read_small(path / name), name).get("kind"))
    return None


def unlisted(path: Path, listed: Iterable[str]) -> list[str]:
    """What lies in the directory and is neither listed nor tolerated (SPEC.md, "Other files"), sorted."""
    known = {*listed, MANIFEST}
    return sorted(n for n in walk(path) if n not in known and not is_ignored(n))


def walk(path: Path, prefix: str = "") -> Iterator[str]:
    """Names of all files below `path`, links to folders included; skips folders that start with a dot."""
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                if not entry.name.startswith("."):
                    yield from walk(Path(entry.path), f"{prefix}{entry.name}/")
            else:
                yield prefix + entry.name


def hash_file(path: Path, advance: Callable[[int], None] | None = None) -> tuple[int, str]:
    """Size and SHA-256 (hexadecimal) of a file; `advance` is called with each number of bytes read."""
    digest, size, buffer = hashlib.sha256(), 0, memoryview(bytearray(tensors.CHUNK))
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(descriptor, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
            if advance is not None:
                advance(count)
    return size, digest.hexdigest()


def lineage(parents: Sequence[Artifact | Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The "parents" field of an artifact made from these: the whole chain, which can be shown without the parents.

    parents: artifacts, or entries of such a field.
    """
    return [
        {"id": p.id, "kind": p.kind, "path": os.path.abspath(p.path), "parents": p.parents}
        if isinstance(p, Artifact)
        else dict(p)
        for p in parents
    ]


def _regular_size(root: Path, name: str, checked: set[Path]) -> int:
    """The size of a listed file, all of whose folders are real ones (`checked` remembers those)."""
    path = root / name
    try:
        for folder in reversed(path.relative_to(root).parents[:-1]):
            if folder not in checked:
                if not stat.S_ISDIR(os.lstat(root / folder).st_mode):
                    raise Damaged(f"{root / folder} is not a real folder. {NO_LINKS}")
                checked.add(folder)
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise Damaged(f"{path} is missing. {AGAIN}") from None
    if stat.S_ISLNK(status.st_mode):
        raise Damaged(f"{path} is a symbolic link. {NO_LINKS}")
    if not stat.S_ISREG(status.st_mode):
        raise Damaged(f"{path} is not a regular file. {AGAIN}")
    return status.st_size


def _either(names: Sequence[str]) -> str:
    """The names as words: "a", "a or b", "a, b or c"."""
    return " or ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


def _raise(problems: list[str]) -> None:
    if problems:
        more = [f"There are {len(problems) - 3} more problems."] if len(problems) > 3 else []
        raise Damaged(" ".join([*problems[:3], *more]))


def _check_hash(path: Path, entry: dict[str, Any], advance: Callable[[int], None]) -> None:
    if hash_file(path, advance) != (entry["size"], entry["sha256"]):
        raise Damaged(f"{path} is damaged: its bytes do not have the size and SHA-256 of the manifest. {AGAIN}")


def _stamp(path: Path) -> tuple[int, ...]:
    status = os.stat(path)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _no_manifest(path: Path) -> NotAnArtifact:
    if not path.exists():
        return NotAnArtifact(f"{path} does not exist. {GIVE}")
    if not path.is_dir():
        return NotAnArtifact(f"{path} is a file, and an artifact is a directory. {GIVE}")
    if (path / PROGRESS).exists():
        command = COMMANDS.get(recorded_kind(path) or "")
        command = f" (`{command}`)" if command else ""
        return Unfinished(f"{path} is not finished. Run the same command{command} again to resume.")
    if (path / "config.json").exists():
        return NotAnArtifact(f"{path} is a model folder and not an artifact: it has no {MANIFEST}. {GIVE}")
    return NotAnArtifact(f"{path} is not an artifact: it has no {MANIFEST}. {GIVE}")
