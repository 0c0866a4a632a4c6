"""Who a teacher is: its configuration, weights and tokenizer, never the path it was read from."""

from __future__ import annotations

import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from lolcats_cli.errors import BadInput, IdentityMismatch

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")
VOLATILE_CONFIG = ("_name_or_path", "transformers_version")
REMEMBERED_BYTES = 16 * 2**20  # files from this size on are hashed once
FIELDS = ("config_sha256", "weights_sha256", "tokenizer_sha256")


def identify(folder: Path | str) -> dict[str, str]:
    """Hash a local model folder; reads every weight byte once, and not again while the files stay untouched.

    Returns the three `FIELDS` as SHA-256 hex digests. Raises `BadInput` if the folder has no readable
    configuration or no safetensors weights.
    """
    folder = Path(folder)
    config = read_config(folder)
    stable = {key: value for key, value in config.items() if key not in VOLATILE_CONFIG}
    return {
        "config_sha256": hashlib.sha256(json.dumps(stable, sort_keys=True).encode()).hexdigest(),
        "weights_sha256": _hash_files(weight_files(folder)),
        "tokenizer_sha256": _hash_files([folder / f for f in TOKENIZER_FILES if (folder / f).is_file()]),
    }


def check(expected: dict, folder: Path | str) -> None:
    """Raise `IdentityMismatch`, naming the differing fields, unless `folder` holds the `expected` teacher."""
    found = identify(folder)
    differing = [field for field in FIELDS if found[field] != expected.get(field)]
    if differing:
        raise IdentityMismatch(
            f"{folder} is not the teacher that was captured: {', '.join(differing)} "
            f"{'differs' if len(differing) == 1 else 'differ'}. Pass the original model with --teacher, "
            "or capture this one anew."
        )


def read_config(folder: Path) -> dict:
    """The folder's config.json. Raises `BadInput` if it is missing or not a JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        raise BadInput(f"{folder} is not a model folder: it has no config.json. Pass a folder saved by transformers.")
    return _read_object(path)


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors files as its index lists them. Raises `BadInput` if some, or all, are missing."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        listed = _read_object(index).get("weight_map")
        if not isinstance(listed, dict):
            raise BadInput(f"{index} has no weight_map. Download or save the model again.")
        names = sorted(set(map(str, listed.values())))
        files = [folder / name for name in names]
    else:
        files = [folder / "model.safetensors"]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise BadInput(
            f"{folder} lacks the weights {', '.join(missing)}. lolcats reads safetensors only: "
            "save the model with save_pretrained(), or download it again."
        )
    return files


def _read_object(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError too
        raise BadInput(f"{path} is not valid JSON ({error}). Download or save the model again.") from error
    if not isinstance(content, dict):
        raise BadInput(f"{path} is not valid JSON of an object. Download or save the model again.")
    return content


def _hash_files(files: list[Path]) -> str:
    total = hashlib.sha256()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for file, digest in zip(files, pool.map(_digest, files), strict=True):
            total.update(f"{file.name} {digest}\n".encode())
    return total.hexdigest()


def _digest(file: Path) -> str:
    """A file's SHA-256. That of a large one is remembered for as long as the file stays untouched."""
    before = _stamp(file)
    if file.stat().st_size < REMEMBERED_BYTES:
        return _read_digest(file)
    place = _cache_folder() / hashlib.sha256(str(before).encode()).hexdigest()
    with suppress(OSError):
        digest = place.read_text(encoding="ascii")
        if len(digest) == 64:
            return digest
    digest = _read_digest(file)
    # A file that was written just now may be written again within one tick of its clock.
    if _stamp(file) == before and time.time() - file.stat().st_ctime > 2:
        with suppress(OSError):  # without a cache it is slower
            place.parent.mkdir(parents=True, exist_ok=True)
            beside = place.with_suffix(f".{os.getpid()}")
            beside.write_text(digest, encoding="ascii")
            beside.replace(place)
    return digest


def _read_digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _stamp(file: Path) -> tuple[str | int, ...]:
    """What changes when a file is replaced or written. The last of them no program can set."""
    status = file.stat()
    return os.path.realpath(file), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lolcats" / "sha256"
