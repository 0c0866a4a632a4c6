"""JSON without ambiguity: strict reading, one canonical way of writing, ids, and differences between settings."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from .errors import Damaged, FormatError
from .limits import MAX_INTEGER, MAX_JSON_BYTES, MAX_JSON_DEPTH

# Keys that the id does not cover. "path" is left out at every depth: the same artifact may lie anywhere.
NOT_IN_ID = ("id", "created")


def parse(data: bytes, where: str) -> dict[str, Any]:
    """One JSON object from UTF-8 bytes; `where` names the file in messages.

    Raises Damaged for everything that JSON readers treat differently or fail on: a key given twice, NaN, infinities,
    integers beyond 2^53 - 1, more than MAX_JSON_DEPTH levels, lone surrogates, more than MAX_JSON_BYTES bytes.
    """
    if len(data) > MAX_JSON_BYTES:
        raise Damaged(f"{where} is larger than the limit of {MAX_JSON_BYTES} bytes.")
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_no_duplicates,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
        return _plain_object(value)
    except FormatError as error:
        raise Damaged(f"{where}: {error}") from None
    except RecursionError:
        raise Damaged(f"{where} is nested deeper than {MAX_JSON_DEPTH} levels.") from None
    except ValueError as error:
        raise Damaged(f"{where} is not valid JSON: {error}.") from None


def plain(value: Any, where: str) -> Any:
    """A deep copy made of JSON's own types (tuples become lists); raises FormatError naming the place.

    For settings: NaN and infinities are refused.
    """
    return _plain(value, where, 1)


def plain_metrics(value: Any, where: str) -> Any:
    """Like `plain`, for measurements: NaN and infinities become "NaN", "Infinity", "-Infinity"."""
    return _plain(_name_non_finite(value), where, 1)


def canonical(value: Any) -> bytes:
    """The one way to write a JSON value (SPEC.md, "Canonical form").

    Sorted keys, no white space, UTF-8; a number without fraction below 2^53 as an integer, so that 1000.0 and
    1000, which JSON does not tell apart, give the same bytes.
    """
    text = json.dumps(_integers(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def identity(value: Any) -> Any:
    """The value without every "path" key, at any depth: a path is not part of an identity."""
    if isinstance(value, dict):
        return {k: identity(v) for k, v in value.items() if k != "path"}
    if isinstance(value, list):
        return [identity(v) for v in value]
    return value


def artifact_id(manifest: Mapping[str, Any]) -> str:
    """SHA-256, in hexadecimal, of the manifest's canonical form without "id", "created" and every "path"."""
    covered = {k: v for k, v in manifest.items() if k not in NOT_IN_ID}
    return hashlib.sha256(canonical(identity(covered))).hexdigest()


def pretty(value: Any) -> bytes:
    """JSON for people and jq: sorted keys, two spaces, a newline at the end. Same value, same bytes."""
    return (json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")


def differences(expected: Any, found: Any, where: str = "") -> dict[str, tuple[Any, Any]]:
    """Where two JSON values differ, as {"config.hybrid.window": (expected, found)}.

    Keys named "path" do not count. A key that only one side has is None on the other side, and differs
    even from an explicit null.
    """
    expected, found = identity(expected), identity(found)
    if isinstance(expected, dict) and isinstance(found, dict):
        result: dict[str, tuple[Any, Any]] = {}
        for key in sorted({*expected, *found}):
            name = f"{where}.{key}" if where else key
            if key in expected and key in found:
                result |= differences(expected[key], found[key], name)
            else:
                result[name] = (expected.get(key), found.get(key))
        return result
    return {} if canonical(expected) == canonical(found) else {where: (expected, found)}


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise FormatError(f"The key {key[:80]!r} is given twice.")
        result[key] = value
    return result


def _no_constant(text: str) -> Any:
    raise FormatError(f"{text} is not a JSON number.")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise FormatError(f"The number {text[:40]} is too large.")
    return value


def _plain_object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise FormatError("The file holds no JSON object.")
    result: dict[str, Any] = _plain(value, "", 1)
    return result


def _plain(value: Any, where: str, depth: int) -> Any:
    place = where or "The top level"
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise FormatError(f"{place}: Text with a lone surrogate cannot be written as UTF-8.") from None
        return str(value)
    if isinstance(value, int):
        if abs(value) > MAX_INTEGER:
            raise FormatError(f"{place}: The integer is beyond 2^53 - 1, the largest that every JSON reader keeps.")
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise FormatError(f"{place}: {value} is not a JSON number.")
        return float(value)
    if not isinstance(value, (Mapping, list, tuple)):
        raise FormatError(f"{place}: A value of the type {type(value).__name__} cannot be stored in JSON.")
    if depth > MAX_JSON_DEPTH:
        raise FormatError(f"{place[:80]} is nested deeper than {MAX_JSON_DEPTH} levels.")
    if isinstance(value, Mapping):
        result = {}
        for key, item in value.items():
            if not isinstance(key, str):
                raise FormatError(f"{place}: The key {key!r} is not text.")
            _plain(key, f"{place}, a key", depth)
            result[str(key)] = _plain(item, f"{where}.{key}" if where else str(key), depth + 1)
        return result
    return [_plain(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]


def _name_non_finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _name_non_finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_name_non_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _integers(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer() and abs(value) <= MAX_INTEGER:
        return int(value)
    if isinstance(value, dict):
        return {k: _integers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_integers(v) for v in value]
    return value
