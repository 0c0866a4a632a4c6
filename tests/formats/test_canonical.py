import hashlib
import json
import math
import shutil
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lolcats_formats import Damaged, FormatError, artifact_id, canonical, differences
from lolcats_formats.canonical import parse, plain, plain_metrics, pretty

numbers = st.one_of(st.integers(-(2**53) + 1, 2**53 - 1), st.floats(allow_nan=False, allow_infinity=False))
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, text),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=20,
)
configs = st.dictionaries(text, values, max_size=6)


def reorder(value):
    """The same JSON value with its keys in another order."""
    if isinstance(value, dict):
        return {k: reorder(v) for k, v in reversed(value.items())}
    return [reorder(v) for v in value] if isinstance(value, list) else value


@settings(max_examples=40)
@given(configs)
def test_id_depends_on_the_value_and_not_on_how_it_is_written(config):
    expected = artifact_id({"config": config})
    assert artifact_id({"config": reorder(config)}) == expected
    assert artifact_id(json.loads(pretty({"config": config}))) == expected
    assert artifact_id(parse(canonical({"config": config}), "x")) == expected
    assert artifact_id({"config": config, "id": "1", "created": {"time": "now"}}) == expected


@settings(max_examples=40)
@given(configs, configs, st.booleans())
def test_ids_differ_exactly_when_there_are_differences(a, b, same):
    b = reorder(a) if same else b
    assert (artifact_id({"c": a}) == artifact_id({"c": b})) == (not differences(a, b))


@settings(max_examples=40)
@given(configs, text)
def test_paths_are_not_part_of_the_id_at_any_depth(config, path):
    with_paths = {"config": config | {"deep": [{"path": path}]}, "teacher": {"path": path}}
    without = {"config": config | {"deep": [{}]}, "teacher": {}}
    assert artifact_id(with_paths) == artifact_id(without)


@settings(max_examples=40)
@given(configs)
def test_strict_parsing_keeps_what_pretty_wrote(config):
    assert parse(pretty(config), "x") == config


def test_canonical_form_is_what_the_specification_says():
    value = {"b": [1000.0, 1e-05, -0.0, 0.1, True, None], "a": "é\n\U0001f600"}
    assert canonical(value) == '{"a":"é\\n\U0001f600","b":[1000,1e-05,0,0.1,true,null]}'.encode()
    assert artifact_id({"config": value}) == hashlib.sha256(b'{"config":' + canonical(value) + b"}").hexdigest()


@pytest.mark.skipif(not shutil.which("jq"), reason="jq is not installed")
@settings(max_examples=10)
@given(st.lists(numbers.filter(lambda x: abs(x) < 2**53), min_size=1, max_size=200))
def test_jq_writes_numbers_in_canonical_form(values):
    out = subprocess.run(
        ["jq", "-cS", "map(. + 0)"], input=json.dumps(values).encode(), capture_output=True, check=True
    )
    # 0 and -0 are equal numbers; jq keeps the sign.
    assert out.stdout.strip().replace(b"-0,", b"0,").replace(b"-0]", b"0]") == canonical(values)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'{"a": 1, "a": 2}', "given twice"),
        (b'{"a": {"b": 1, "b": 1}}', "given twice"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "Infinity"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": 9007199254740992}', "2^53"),
        (b'{"a": ' + b"[" * 40 + b"]" * 40 + b"}", "deeper than 32"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "deeper than 32"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"\\ud800": 1}', "surrogate"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "JSON"),
        (b"[1]", "no JSON object"),
        (b'{"a": 1', "not valid JSON"),
        (b'\xef\xbb\xbf{"a": 1}', "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"", "not valid JSON"),
        (b" " * (32 * 2**20 + 1), "larger than"),
    ],
)
def test_parse_refuses(data, reason):
    with pytest.raises(Damaged, match=r"manifest\.json") as error:
        parse(data, "manifest.json")
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"a": {"lr": math.nan}}, "config.a.lr"),
        ({"a": [1, {2: 3}]}, "config.a[1]"),
        ({"a": object()}, "config.a"),
        ({"seed": 2**60}, "config.seed"),
        ({"a": b"bytes"}, "config.a"),
    ],
)
def test_settings_that_json_cannot_hold_are_refused_by_name(value, place):
    with pytest.raises(FormatError) as error:
        plain(value, "config")
    assert str(error.value).startswith(place + ":")


def test_measurements_name_what_is_not_a_number():
    assert plain_metrics({"loss": math.nan, "all": (math.inf, -math.inf, 1.5)}, "x") == {
        "loss": "NaN",
        "all": ["Infinity", "-Infinity", 1.5],
    }


def test_differences_name_the_fields():
    a = {"window": 64, "hybrid": {"map": "hedgehog", "dim": 1}, "flag": True, "path": "/a", "n": 1}
    b = {"window": 32, "hybrid": {"map": "hedgehog"}, "flag": 1, "path": "/b", "n": 1.0}
    assert differences(a, b, "config") == {
        "config.window": (64, 32),
        "config.hybrid.dim": (1, None),
        "config.flag": (True, 1),
    }
