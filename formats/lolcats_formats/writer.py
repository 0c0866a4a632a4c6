"""Writing an artifact file by file. Writing can be resumed at any moment, and the manifest alone finishes it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from . import atomic, schema
from .artifact import AGAIN, Artifact, check_names, hash_file, lineage, read_small, unlisted, walk
from .canonical import artifact_id, canonical, parse, plain, plain_metrics, pretty
from .errors import ConfigMismatch, Damaged, FormatError, NotAnArtifact
from .limits import (
    FORMAT,
    KINDS,
    LOCK,
    MANIFEST,
    MAX_FILES,
    MAX_JSON_BYTES,
    MAX_METRICS_LINE,
    METRICS,
    PART_PREFIX,
    PROGRESS,
    README,
    REPLACEMENT_SUFFIX,
    SCRATCH,
    TEMPORARY_SUFFIX,
    VERSION,
    check_name,
)
from .lock import DirectoryLock
from .place import Resume, Say, by_field, check_kind, check_place, check_same
from .tensors import CHUNK, serialize

if TYPE_CHECKING:
    import torch

# What must agree for a directory to be continued.
_IDENTITY = ("kind", "config", "teacher", "data", "parents")


class ArtifactWriter:
    """Writes one artifact directory. It is made by `create` and used as a context manager.

    A call that writes a file returns when the file is on the disk and recorded in progress.json. An exception, a signal
    or a crash at any moment leaves an unfinished directory, and `create` with the same settings continues it.

    Several threads may write files at the same time. Everything else is for one thread.

    finished: the artifact, when `create` found a finished one in the directory; nothing can be written then.
    """

    def __init__(self, path: Path, record: dict[str, Any], tool: str, say: Say) -> None:
        self.path = path
        self.finished: Artifact | None = None
        self._record = record  # the content of progress.json
        self._by_lower: dict[str, str] = {}  # lower-case name -> name of the recorded files
        self._tool, self._say = tool, say
        self._lock: DirectoryLock | None = None
        self._recording = threading.RLock()  # held while the record changes
        self._log: int | None = None
        self._replaces: Path | None = None  # the directory whose place this one takes when it is finished

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        kind: str,
        *,
        config: Mapping[str, Any],
        teacher: Mapping[str, Any],
        data: Mapping[str, Any],
        parents: Sequence[Artifact | Mapping[str, Any]] = (),
        tool: str,
        resume: Resume = "auto",
        force: bool = False,
        say: Say = by_field,
    ) -> Self:
        """Starts the artifact in `path`, or continues it, or finds it finished there (`.finished`).

        tool: name and version of the program, such as "lolcats 0.1.0". It is recorded, but the id does not cover it.
        resume: "required" demands an artifact of these settings there, "never" refuses an unfinished one.
        force: the artifact in `path` is replaced. A finished artifact stays until `finish`, which exchanges the two in
        one step. Until then the new one is written, and continued, beside it in `.NAME.lolcats-new`.
        say: puts into words how the settings of an artifact that is there differ, by field (there, here).
        Raises ConfigMismatch when the directory holds an artifact with other settings, NotAnArtifact when it holds
        something else, Locked when another process writes into it, and FormatError for settings that JSON cannot hold
        or that `resume` forbids.
        """
        if kind not in KINDS:
            raise FormatError(f"The kind {kind!r} is not one of {', '.join(KINDS)}.")
        record: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "kind": kind,
            "config": plain(config, "config"),
            "teacher": plain(teacher, "teacher"),
            "data": plain(data, "data"),
            "parents": plain(lineage(parents), "parents"),
            "files": {},
            "metrics": 0,
        }
        writer = cls(Path(path), record, tool, say)
        try:
            schema.check(writer._manifest({}, {}), kind, f"The new {kind} artifact")
        except Damaged as error:
            raise FormatError(str(error)) from None
        writer._start(resume, force)
        return writer

    def has(self, name: str) -> bool:
        """True when the file is complete: written in this run or in the one that is continued."""
        return name in (self.finished.files if self.finished else self._record["files"])

    @property
    def files(self) -> list[str]:
        """The names of the files that are complete."""
        return list(self.finished.files if self.finished else self._record["files"])

    def restart(self) -> Path | None:
        """Goes back to the checkpoint, in a stage that writes all its files after its last one. Forgets all files, and
        the events since the checkpoint. Returns `checkpointed`."""
        self._assert_open()
        folder = self.checkpointed
        if self._log is not None:
            os.close(self._log)
            self._log = None
        self._record["files"], self._by_lower = {}, {}
        self._record["metrics"] = self._record["checkpoint"]["metrics"] if folder else 0
        self._write_progress()  # first: were it last, a crash before it would leave recorded events missing
        self._cut_metrics()
        return folder

    def checkpoint(self, folder: Path) -> None:
        """Records the files in `folder`, a folder in `scratch`, and the events so far, as the state to resume from.

        The state before it is removed. The files must be complete.
        """
        self._assert_open()
        files = {}
        for name in sorted(walk(folder)):
            atomic.fsync_file(folder / name)
            files[name] = _entry(_hashed(folder / name))
        atomic.fsync_directory(folder)
        atomic.fsync_directory(folder.parent)
        self._mark_metrics()
        self._record["checkpoint"] = {"folder": folder.name, "files": files, "metrics": self._record["metrics"]}
        self._write_progress()
        self._clear_scratch()

    @property
    def checkpointed(self) -> Path | None:
        """The folder of the last checkpoint, its bytes checked; None when there was none. Raises Damaged."""
        state = self._record.get("checkpoint")
        if state is None:
            return None
        folder: Path = self.path / SCRATCH / state["folder"]
        found = {} if not folder.is_dir() else {name: _entry(_hashed(folder / name)) for name in walk(folder)}
        if found != state["files"]:
            raise Damaged(
                f"{folder} changed after it was saved: {self.path} cannot be resumed. Start again with --force."
            )
        return folder

    @property
    def scratch(self) -> Path:
        """A folder for resume state, such as a trainer's checkpoints; `finish` removes it."""
        self._assert_open()
        atomic.make_directory(self.path / SCRATCH)
        return self.path / SCRATCH

    def save(
        self,
        name: str,
        tensors: Mapping[str, torch.Tensor],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Writes a safetensors file. The same tensors give the same bytes; one tensor at a time is copied.

        metadata: text by name for the file's header; {"format": "pt"} by default.
        """
        self._write(name, serialize(tensors, metadata, str(self.path / name)))

    def write_bytes(self, name: str, content: bytes) -> None:
        """Writes a file."""
        self._write(name, [content])

    def write_text(self, name: str, text: str) -> None:
        """Writes a text file in UTF-8, line ends as they are."""
        self._write(name, [text.encode("utf-8")])

    def write_json(self, name: str, value: Any) -> None:
        """Writes a JSON file with sorted keys; other programs' files may hold integers of any size, but no NaN."""
        try:
            content = pretty(value)
        except (TypeError, ValueError) as error:
            raise FormatError(f"{self.path / name} cannot be written as JSON: {error}.") from None
        self._write(name, [content])

    def copy(self, name: str, source: Path | tuple[Artifact, str]) -> None:
        """Copies a file: a path, or (artifact, name), whose SHA-256 is then checked."""
        if isinstance(source, tuple):
            artifact, other = source
            self._write(name, _chunks(artifact.file(other), artifact.files[other]["sha256"]))
        else:
            self._write(name, _chunks(source))

    def parts(self) -> list[Path]:
        """The directories `.part-*` that lie here, in which other processes write parts of this artifact."""
        return sorted(path for path in self.path.glob(f"{PART_PREFIX}*") if path.is_dir())

    def absorb(self, part: Path) -> None:
        """Takes over the completed files of a part: an unfinished artifact in one of `parts`, whose writer is closed.

        The files are renamed into this directory, their events are appended, and the rest of the part is removed. A
        part with other settings, which `force` left behind, is removed as a whole.
        """
        self._assert_open()
        with DirectoryLock(part):
            found: dict[str, Any] = {"files": {}, "metrics": 0}
            if (part / PROGRESS).exists():
                with contextlib.suppress(ConfigMismatch):
                    found = self._read_progress(part)
            new = [name for name in found["files"] if not self.has(name)]
            for name, entry in ((name, found["files"][name]) for name in new):
                self._check_new(name)
                if (part / name).exists():
                    atomic.make_directory((self.path / name).parent)
                    atomic.rename(part / name, self.path / name)
                elif not (self.path / name).is_file() or _entry(_hashed(self.path / name)) != entry:
                    raise Damaged(f"{part / name} is missing. Remove {part}, and run the same command again.")
                self._record["files"][name] = entry  # recorded below: a crash before that finds it renamed
                self._by_lower[name.lower()] = name
            if new and found["metrics"]:
                atomic.append(self._open_log(), (part / METRICS).read_bytes()[: found["metrics"]])
                self._mark_metrics()
            self._write_progress()
            shutil.rmtree(part)

    def order_metrics(self, key: Callable[[dict[str, Any]], Any]) -> None:
        """Sorts the events by `key`. Events with equal keys stay in their order."""
        self._assert_open()
        path = self.path / METRICS
        if not path.exists():
            return
        self._mark_metrics()
        if self._log is not None:
            os.close(self._log)
            self._log = None
        lines = sorted(path.read_bytes().splitlines(keepends=True), key=lambda line: key(json.loads(line)))
        atomic.write(path, lines)  # as long as before: what progress.json says of it stays true

    def adopt(self, name: str) -> None:
        """Records a complete file that a library wrote into the directory: fsyncs and hashes it, sets its permissions.

        README.md may be written but is never recorded (SPEC.md, "Other files").
        """
        self._assert_open()
        path = self.path / name
        if name == README:
            return
        self._check_new(name)
        if path.is_symlink() or not path.is_file():
            raise FormatError(f"{path} cannot be added to the artifact: it is not a regular file.")
        # Libraries leave other modes behind (safetensors 0600); progress.json got the umask's.
        os.chmod(path, os.stat(self.path / PROGRESS).st_mode & 0o777)
        atomic.fsync_file(path)
        for folder in path.relative_to(self.path).parents:
            atomic.fsync_directory(self.path / folder)
        self._add(name, _hashed(path))

    def log(self, **event: Any) -> None:
        """Appends one event to metrics.jsonl. The event belongs to the file that is completed next.

        After a crash, events since the last completed file are dropped, because the work since then is done again. An
        event carries measured values, but no times or durations: those would differ between two runs.
        """
        self._assert_open()
        line = canonical(plain_metrics(event, "a metrics event")) + b"\n"
        if len(line) > MAX_METRICS_LINE:
            raise FormatError(f"A metrics event of {len(line)} bytes is longer than the limit of {MAX_METRICS_LINE}.")
        atomic.append(self._open_log(), line)

    def finish(self, summary: Mapping[str, Any]) -> Artifact:
        """Writes manifest.json, which alone makes the artifact complete, and returns the artifact.

        summary: results for people and scripts, without times. Raises FormatError when a file lies in the
        directory that was not written through this object.
        """
        if self.finished is not None:
            return self.finished
        self._assert_open()
        summary = plain_metrics(summary, "summary")
        if self._log is not None or (self.path / METRICS).exists():
            self._mark_metrics()
            self._record["files"][METRICS] = _entry(_hashed(self.path / METRICS))
        files = self._record["files"]
        extra = unlisted(self.path, files)
        if extra:
            raise FormatError(
                f"{self.path / extra[0]} is not part of the artifact. Move it away, and run the same command again."
            )
        manifest = self._manifest(files, summary)
        schema.check(manifest, manifest["kind"], str(self.path / MANIFEST))
        self._publish(MANIFEST, pretty(manifest))
        self._take_place()
        self.close()
        return Artifact.open(self.path)

    def close(self) -> None:
        """Frees the directory. Without `finish` before, it stays unfinished and can be continued."""
        if self._log is not None:
            os.close(self._log)
            self._log = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, resume: Resume, force: bool) -> None:
        if force:
            self._aim_beside()
        if self._replaces is None and self._find_finished():
            return
        path = self.path
        check_place(path, self._record["kind"], resume, force)
        unfinished = (path / PROGRESS).exists()
        atomic.make_directory(path)
        self._lock = DirectoryLock(path)
        try:
            if force and unfinished and (resume == "never" or not self._can_continue()):
                self._clear()
            if not self._find_finished():  # its writer may have finished between our look and our lock
                self._continue()
            else:
                self._take_place()
        except BaseException:
            self.close()
            raise
        if self.finished is not None:
            self.close()

    def _aim_beside(self) -> None:
        """Chooses the directory beside `path` as the place to write, if a finished artifact is to be replaced."""
        target = Path(os.path.realpath(self.path))
        beside = target.with_name(f".{target.name}{REPLACEMENT_SUFFIX}")
        aside = atomic.temporary(target)  # of an exchange that the system could not do at once
        replaced = [d for d in (aside, beside) if target.exists() and d.is_dir() and not (d / PROGRESS).exists()]
        for folder in replaced:
            with DirectoryLock(folder):  # else another writer is about to begin there
                shutil.rmtree(folder)
        finished = os.path.lexists(target / MANIFEST)
        if replaced and finished and (target / PROGRESS).exists():  # of a run that died tidying up
            with DirectoryLock(target):
                atomic.remove(target / PROGRESS)
            with contextlib.suppress(ConfigMismatch):
                if self._find_finished():
                    return
        if finished:
            where = str(target / MANIFEST)
            if parse(read_small(target / MANIFEST), where).get("format") != FORMAT:
                raise NotAnArtifact(f"{where} does not belong to a lolcats artifact. Choose another output directory.")
        elif not beside.is_dir():
            return
        self.path, self._replaces = beside, target

    def _take_place(self) -> None:
        """Exchanges the finished directory with the one it replaces. Until then, its progress.json marks it as the
        newer of the two."""
        if self._replaces is not None:
            beside, self.path = self.path, self._replaces
            if (self.path / MANIFEST).exists():
                atomic.exchange(beside, self.path)
            elif self.path.exists():  # what was to be replaced is gone, and maybe another writer has begun there
                with DirectoryLock(self.path):
                    atomic.exchange(beside, self.path)
            else:
                atomic.rename(beside, self.path)
            if self._lock is not None:
                self._lock.path = self.path / LOCK
            for folder in (beside, atomic.temporary(self.path)):
                shutil.rmtree(folder, ignore_errors=True)
        self._tidy()
        if self.finished is not None:
            self.finished = Artifact.open(self.path)

    def _can_continue(self) -> bool:
        try:
            self._read_progress(self.path)
        except FormatError:
            return False
        return True

    def _clear(self) -> None:
        """Removes an unfinished artifact. Its progress.json goes last, so that after a crash it still is one."""
        for entry in list(os.scandir(self.path)):
            if not entry.name.startswith(".") and entry.name != PROGRESS:
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path)
                else:
                    os.unlink(entry.path)
        atomic.remove(self.path / PROGRESS)

    def _find_finished(self) -> bool:
        if not os.path.lexists(self.path / MANIFEST):
            return False
        artifact = Artifact.open(self.path)
        self._compare(artifact.manifest, "a finished")
        self.finished = artifact
        if self._replaces is None:
            with contextlib.suppress(OSError):  # what a writer left that died tidying up
                self._tidy()
        return True

    def _tidy(self) -> None:
        """Removes what a finished artifact no longer needs. Until then, a stage may go back to its checkpoint."""
        shutil.rmtree(self.path / SCRATCH, ignore_errors=True)
        atomic.remove(self.path / PROGRESS)

    def _continue(self) -> None:
        """Takes over the files that an earlier writer completed, and removes those it had half written."""
        if (self.path / PROGRESS).exists():
            found = self._read_progress(self.path)
            for name, entry in found["files"].items():
                file = self.path / name
                if not file.is_file() or file.stat().st_size != entry["size"]:
                    raise Damaged(f"{file} has changed since it was completed. Remove {self.path}, and start again.")
            self._record["files"], self._record["metrics"] = found["files"], found["metrics"]
            if "checkpoint" in found:
                self._record["checkpoint"] = found["checkpoint"]
            self._by_lower = {name.lower(): name for name in found["files"]}
        for name in list(walk(self.path)):
            if (self.path / name).is_symlink():
                raise Damaged(f"{self.path / name} is a link, which could lead out of the artifact. Remove it.")
            if name.endswith(TEMPORARY_SUFFIX):
                os.unlink(self.path / name)
        self._clear_scratch()
        self._cut_metrics()
        self._write_progress()

    def _read_progress(self, folder: Path) -> dict[str, Any]:
        where = str(folder / PROGRESS)
        found = parse(read_small(folder / PROGRESS), where)
        schema.check_version(found, where)
        schema.check(found, "progress", where)
        check_names(found["files"], where)
        self._compare(found, "an unfinished")
        return found

    def _clear_scratch(self) -> None:
        """Removes all resume state except the recorded one."""
        scratch, keep = self.path / SCRATCH, self._record.get("checkpoint", {}).get("folder")
        for entry in os.scandir(scratch) if scratch.is_dir() else ():
            if entry.name != keep and entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            elif entry.name != keep:
                os.unlink(entry.path)

    def _cut_metrics(self) -> None:
        path, length = self.path / METRICS, self._record["metrics"]
        size = path.stat().st_size if path.exists() else 0
        if size < length:
            raise Damaged(f"{path} is shorter than it was. Remove {self.path}, and start again.")
        if length == 0:
            atomic.remove(path)
        elif size > length:
            os.truncate(path, length)

    def _compare(self, found: Mapping[str, Any], state: str) -> None:
        check_kind(self.path, found["kind"], self._record["kind"])
        there, here = ({name: record[name] for name in _IDENTITY} for record in (found, self._record))
        check_same(self.path, state, found["kind"], there, here, self._say)

    def _write(self, name: str, chunks: Any) -> None:
        self._assert_open()
        path = self.path / name
        if name == README:  # for people, who may edit it: not recorded
            atomic.write(path, chunks)
            return
        with self._recording:
            self._check_new(name)
            if self._record["files"].pop(name, None):  # written again: unrecorded while its bytes change
                self._write_progress()
            atomic.make_directory(path.parent)
        self._add(name, atomic.write(path, chunks))

    def _check_new(self, name: str) -> None:
        try:
            check_name(name)
        except Damaged as error:
            raise FormatError(str(error)) from None
        if name == METRICS or len(self._record["files"]) >= MAX_FILES - 1:
            raise FormatError(
                f"{name!r} cannot be added. Metrics are written by log(), and {MAX_FILES} files is the limit."
            )
        other = self._by_lower.get(name.lower(), name)
        if other != name:
            raise FormatError(f"The names {other!r} and {name!r} differ only in upper and lower case.")

    def _add(self, name: str, written: atomic.Written) -> None:
        with self._recording:
            self._record["files"][name] = _entry(written)
            self._by_lower[name.lower()] = name
            self._mark_metrics()
            self._write_progress()

    def _open_log(self) -> int:
        if self._log is None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
            self._log = os.open(self.path / METRICS, flags, 0o666)
        return self._log

    def _mark_metrics(self) -> None:
        if self._log is not None:
            atomic.fsync(self._log)
            self._record["metrics"] = os.fstat(self._log).st_size

    def _write_progress(self) -> None:
        # For every file, so in one line: to indent ten thousand entries takes several times as long.
        self._publish(PROGRESS, json.dumps(self._record, sort_keys=True, allow_nan=False).encode("utf-8"))

    def _publish(self, name: str, content: bytes) -> None:
        if len(content) > MAX_JSON_BYTES:
            raise FormatError(f"{self.path / name} would be larger than the limit of {MAX_JSON_BYTES} bytes.")
        atomic.write(self.path / name, [content])

    def _manifest(self, files: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Any]:
        manifest = {k: self._record[k] for k in ("format", "version", *_IDENTITY)}
        manifest |= {"files": files, "summary": summary, "id": "0" * 64}
        time = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        manifest["created"] = {"time": time, "tool": self._tool}
        manifest["id"] = artifact_id(manifest)
        plain(manifest, "")  # also bounds the depth
        return manifest

    def _assert_open(self) -> None:
        if self.finished is not None:
            raise FormatError(f"{self.path} is a finished {self.finished.kind} artifact. Nothing can be added to it.")
        assert self._lock is not None, "the writer is closed"


def _hashed(path: Path) -> atomic.Written:
    return atomic.Written(*hash_file(path))


def _entry(written: atomic.Written) -> dict[str, Any]:
    return {"size": written.size, "sha256": written.sha256}


def _chunks(path: Path, sha256: str | None = None) -> Iterator[bytes]:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            yield chunk
    if sha256 is not None and digest.hexdigest() != sha256:
        raise Damaged(f"{path} is damaged: its bytes do not have the SHA-256 of its manifest. {AGAIN}")
