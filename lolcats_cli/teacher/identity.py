"""The identity of a teacher: its configuration, weights and tokenizer, and never its path."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from lolcats_cli.errors import BadInput, IdentityMismatch

# The files of a tokenizer, in two parts, because the first artifacts hashed the first part alone.
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")
SETTINGS_FILES = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "spiece.model", "sentencepiece.bpe.model", "sentencepiece.model", "spm.model",
    "tiktoken.model", "tekken.json",
)  # fmt: skip
CHAT_TEMPLATES = "additional_chat_templates"  # a folder of *.jinja

VOLATILE_CONFIG = ("_name_or_path", "transformers_version")
REMEMBERED_BYTES = 16 * 2**20  # files from this size on are hashed once
# File systems on which every write, also through a mapping of a file that was synced before, changes the file's ctime.
# On tmpfs a mapped write changes nothing; of others it is not known here.
TIMED_FILE_SYSTEMS = {"ext3", "ext4", "xfs", "f2fs"}
SETTINGS = "tokenizer_settings_sha256"
PARTS = {  # the fields of an identity, and what each is of
    "config_sha256": "configuration",
    "weights_sha256": "weights",
    "tokenizer_sha256": "tokenizer",
    SETTINGS: "tokenizer settings",
}
FIELDS = tuple(PARTS)
MAX_CONFIG_BYTES = 2**24
MAX_INDEX_BYTES = 2**28
# Sizes in a configuration, by the names that models have for them, and the most that is believed. A billion layers
# would take for ever to build.
MAX_LAYERS, MAX_SIZE = 4096, 2**31 - 1
LAYER_NAMES = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
SIZE_NAMES = (
    "hidden_size", "n_embd", "num_attention_heads", "n_head", "n_heads", "num_key_value_heads", "head_dim",
    "vocab_size",
)  # fmt: skip
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
# Models of the hub that are older than its organisations, and still found by these names.
OLD_HUB_IDS = {"gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2", "openai-gpt"}
_SHARD = re.compile(r"[^/\\\x00-\x1f]+\.safetensors")


def identify(folder: Path | str) -> dict[str, str]:
    """Hashes a local model folder. It reads every byte of the weights once, and not again until the files change.

    Returns the `FIELDS` as SHA-256 hex digests. Raises `BadInput` if the folder has no readable configuration or no
    safetensors weights, or if it is not clear which weights transformers would load from it.
    """
    folder = Path(folder)
    config = read_config(folder)
    stable = {key: value for key, value in config.items() if key not in VOLATILE_CONFIG}
    return {
        "config_sha256": hashlib.sha256(json.dumps(stable, sort_keys=True).encode()).hexdigest(),
        "weights_sha256": _hash_files(folder, [file.name for file in weight_files(folder)]),
        "tokenizer_sha256": _hash_files(folder, [name for name in tokenizer_files(folder) if name in VOCABULARY_FILES]),
        SETTINGS: _hash_files(folder, [name for name in tokenizer_files(folder) if name not in VOCABULARY_FILES]),
    }


def tokenizer_files(folder: Path) -> list[str]:
    """The names of the tokenizer's files in a model folder. They are part of its identity, and merge copies them."""
    templates = sorted(f"{CHAT_TEMPLATES}/{path.name}" for path in (folder / CHAT_TEMPLATES).glob("*.jinja"))
    return [name for name in (*VOCABULARY_FILES, *SETTINGS_FILES, *templates) if (folder / name).is_file()]


def check(expected: dict[str, Any], folder: Path | str) -> None:
    """Raises `IdentityMismatch`, with the differing fields, unless `folder` holds the `expected` teacher.

    The first artifacts do not record the tokenizer's settings. For these, the settings are not compared.
    """
    found = identify(folder)
    fields = FIELDS if SETTINGS in expected else FIELDS[:-1]
    differing = ", ".join(PARTS[field] for field in fields if found[field] != expected.get(field))
    if differing:
        raise IdentityMismatch(
            f"{folder} is not the teacher that was captured: It differs in its {differing}. Pass the original model "
            "with --teacher, or capture this one again."
        )


def local_folder(teacher: str) -> Path | None:
    """The folder that `teacher` names, after a check of its configuration and weights; None for a hub model's id.

    Raises `BadInput` if it is neither.
    """
    folder = find_folder(teacher)
    if folder is not None:
        weight_files(folder)
    return folder


def find_folder(teacher: str) -> Path | None:
    """The folder that `teacher` names, unchecked; None for a hub model's id. Raises `BadInput` if it is neither."""
    folder = Path(os.path.expanduser(teacher))
    if folder.is_dir():
        return folder.resolve()
    if folder.exists() or not (_HUB_ID.fullmatch(teacher) or teacher in OLD_HUB_IDS):
        raise BadInput(f"{teacher} is not a folder. Pass a model folder, or a hub id such as org/name.")
    return None


def recorded_folder(expected: dict[str, Any], artifact: Path) -> Path:
    """The recorded folder of an artifact's teacher. Raises `BadInput` if it is no longer there."""
    folder = Path(expected["path"])
    if not folder.is_dir():
        raise BadInput(f"The teacher of {artifact} is no longer at {folder}. Pass its folder with --teacher.")
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json. Raises `BadInput` if it is missing, not a JSON object, or has impossible sizes."""
    path = folder / "config.json"
    if not path.is_file():
        raise BadInput(f"{folder} is not a model folder: it has no config.json. Pass a folder saved by transformers.")
    config = read_object(path)
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            _check_sizes(part, path)
    return config


def _check_sizes(config: dict[str, Any], path: Path) -> None:
    for name in (*LAYER_NAMES, *SIZE_NAMES):
        size, most = config.get(name), MAX_LAYERS if name in LAYER_NAMES else MAX_SIZE
        if isinstance(size, int) and not 1 <= size <= most:  # else what it means is the model's own matter
            raise BadInput(f"{path} has {name}: {str(size)[:40]}. It must be from 1 to {most}.")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers loads from the folder: `model.safetensors`, or those of its index.

    Raises `BadInput` if some or all are missing, or if transformers would load other weights: those of an adapter, of
    another file that the configuration names, or of a second set that it prefers.
    """
    adapter, named = folder / "adapter_config.json", read_config(folder).get("transformers_weights")
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if adapter.exists():
        raise BadInput(
            f"{folder} holds an adapter ({adapter.name}), which transformers would load together with the model or "
            "instead of it. Merge the adapter into the weights, or move its files away."
        )
    if named is not None:
        raise BadInput(
            f"{folder}/config.json names the weights {str(named)[:80]!r} (transformers_weights). Give a folder whose "
            f"weights are {single.name}, or the files of {index.name}."
        )
    names = [single.name]
    if index.is_file():
        listed = read_object(index, MAX_INDEX_BYTES).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise BadInput(f"{index} has no weight_map. Download or save the model again.")
        names = sorted(set(map(str, listed.values())))
        strange = [name for name in names if not _SHARD.fullmatch(name)]
        if strange:
            raise BadInput(f"{index} lists {strange[0][:80]!r}, which is not the name of a safetensors file beside it.")
        if single.exists() and names != [single.name]:
            raise BadInput(
                f"{folder} holds two sets of weights: {single.name}, and those of {index.name}. Move one of them away."
            )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        pickled = any(folder.glob("pytorch_model*.bin"))
        advice = (
            "It has .bin files. AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW) writes safetensors. "
            "Copy the tokenizer's files there too."
            if pickled
            else "Save the model with save_pretrained(), or download it again."
        )
        raise BadInput(f"{folder} lacks the weights {', '.join(missing[:5])}. lolcats reads safetensors only. {advice}")
    return [folder / name for name in names]


def read_object(path: Path, limit: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """The JSON object in a file of a model folder. Raises `BadInput` if it holds none, or more than `limit` bytes."""
    try:
        if path.stat().st_size > limit:
            raise ValueError(f"It is larger than the limit of {limit} bytes.")
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_constant)
    except RecursionError as error:
        raise BadInput(f"{path} is not valid JSON: it is nested too deep. Download or save the model again.") from error
    except ValueError as error:  # UnicodeDecodeError too
        reason = str(error).rstrip(".")
        raise BadInput(f"{path} is not valid JSON ({reason}). Download or save the model again.") from error
    if not isinstance(content, dict):
        raise BadInput(f"{path} does not hold a JSON object. Download or save the model again.")
    return content


def _constant(text: str) -> float:
    """Infinity, which some configurations have as a limit. Raises ValueError for NaN, which no configuration needs."""
    if text == "NaN":
        raise ValueError("It holds NaN.")
    return float(text)


def _hash_files(folder: Path, names: list[str]) -> str:
    total = hashlib.sha256()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for name, digest in zip(names, pool.map(_digest, [folder / name for name in names]), strict=True):
            total.update(f"{name} {digest}\n".encode())
    return total.hexdigest()


def _digest(file: Path) -> str:
    """A file's SHA-256. The hash of a large file is remembered until the file changes."""
    if file.stat().st_size < REMEMBERED_BYTES or _file_system(file) not in TIMED_FILE_SYSTEMS:
        return _read_digest(file)
    _sync(file)
    before, started = _stamp(file), time.time()
    place = _cache_folder() / hashlib.sha256(str(before).encode()).hexdigest()
    with suppress(OSError, ValueError):
        digest = place.read_text(encoding="ascii")
        if re.fullmatch("[0-9a-f]{64}", digest):
            return digest
    digest = _read_digest(file)
    # A file that had just been written may be written again within one tick of its clock, or through a mapping.
    if _stamp(file) == before and started - file.stat().st_ctime > 2:
        with suppress(OSError):  # without a cache it is slower
            place.parent.mkdir(parents=True, exist_ok=True)
            beside = place.with_suffix(f".{os.getpid()}")
            beside.write_text(digest, encoding="ascii")
            beside.replace(place)
    return digest


def _file_system(file: Path) -> str:
    """The type of the file system that a file lies on, such as "ext4"; "" if the system does not say."""
    device = file.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            fields, _, rest = line.partition(" - ")
            if fields.split()[2] == wanted:
                return rest.split()[0]
    return ""


def _sync(file: Path) -> None:
    """Writes the changes of a memory mapping to the disk. Only then will its next write change the file's times."""
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _stamp(file: Path) -> tuple[str | int, ...]:
    """The values that change when a file is replaced or written. No program can set the last of them."""
    status = file.stat()
    return os.path.realpath(file), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lolcats" / "sha256"
