import json
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lolcats_formats import Damaged, FormatError
from lolcats_formats.tensors import CHUNK, ITEM_BYTES, read_header, serialize

DTYPES = [
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.int16,
    torch.int8, torch.uint8, torch.bool, torch.uint16, torch.uint32, torch.uint64, torch.complex64,
    torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


def data(tensors, metadata=None):
    return b"".join(serialize(tensors, metadata, "x"))


def raw(header, payload=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + payload


@settings(max_examples=50)
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=6).filter(lambda n: n != "__metadata__"),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3)),
        max_size=8,
    )
)
def test_bytes_are_those_of_the_library(described):
    tensors = {
        name: torch.arange(torch.Size(shape).numel()).reshape(shape).to(torch.float32).to(dtype)
        for name, (dtype, shape) in described.items()
    }
    assert data(tensors) == safetensors.torch.save(tensors, {"format": "pt"})


def test_bytes_do_not_depend_on_memory_layout_or_order():
    matrix = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    plain = {"a": matrix.t().contiguous(), "b": matrix[::2].clone(), "c": torch.zeros(()), "d": matrix[:, 1].clone()}
    strided = {"d": matrix[:, 1], "c": torch.zeros(1)[0], "b": matrix[::2], "a": torch.nn.Parameter(matrix).t()}
    assert data(plain, {"x": "1", "a": "2"}) == data(strided, {"a": "2", "x": "1"})


def test_large_tensors_are_written_in_pieces():
    tensor = torch.arange(3 * 2**20, dtype=torch.int32)
    chunks = list(serialize({"x": tensor}, None, "x"))
    assert max(len(chunk) for chunk in chunks) == CHUNK
    assert torch.equal(safetensors.torch.load(b"".join(chunks))["x"], tensor)


@pytest.mark.parametrize(
    "tensors",
    [
        {"x": torch.zeros(2, device="meta")},
        {"x": torch.zeros(2, 2).to_sparse()},
        {"x": torch.zeros(2, dtype=torch.complex128)},
        {"x": [1.0]},
        {"__metadata__": torch.zeros(1)},
    ],
)
def test_what_cannot_be_stored_is_refused_by_name(tensors):
    with pytest.raises(FormatError, match=next(iter(tensors))):
        data(tensors)


def test_header_is_read_without_data(tmp_path: Path):
    file = tmp_path / "x"
    file.write_bytes(data({"a": torch.zeros(2, 3, dtype=torch.bfloat16), "b": torch.zeros(0)}))
    assert read_header(file, "x") == {"a": ("BF16", (2, 3), 12), "b": ("F32", (0,), 0)}


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        raw(b"{}", length=2**63),
        raw(b"{}", length=17 * 2**20),
        raw(b"{}", length=3),
        raw(b"[]"),
        raw(b'{"a": 1, "a": 1}'),
        raw({"a": 1}, b"0000"),
        raw({"a": entry() | {"more": 1}}, b"0000"),
        raw({"a": entry(dtype="F31")}, b"0000"),
        raw({"a": entry(dtype=["F32"])}, b"0000"),
        raw({"a": entry(shape=(-1,), offsets=(0, -4))}),
        raw({"a": entry(shape=(True,))}, b"0000"),
        raw({"a": entry(shape=(1.0,))}, b"0000"),
        raw({"a": entry(shape=(1,) * 17)}, b"0000"),
        raw({"a": entry(shape=(2,))}, b"0000"),
        raw({"a": entry(shape=(2**52, 2**52, 0), offsets=(0, 4))}, b"0000"),
        raw({"a": entry(offsets=(0, 4, 8))}, b"0000"),
        raw({"a": entry(), "b": entry()}, b"0000"),
        raw({"a": entry(), "b": entry(offsets=(8, 12))}, b"0" * 12),
        raw({"a": entry()}, b"000"),
        raw({"a": entry()}, b"00000"),
        raw({"__metadata__": {"a": 1}}),
        raw({"__metadata__": []}),
    ],
)
def test_malformed_files_are_refused(tmp_path: Path, content: bytes):
    file = tmp_path / "x"
    file.write_bytes(content)
    with pytest.raises(Damaged, match="shard"):
        read_header(file, "shard")


def test_item_sizes_are_torch_s():
    for dtype in DTYPES:
        (info,) = safetensors.torch.load(data({"x": torch.zeros(1).to(dtype)})).values()
        name = json.loads(data({"x": torch.zeros(1).to(dtype)})[8:].split(b"}}")[0] + b"}}")["x"]["dtype"]
        assert ITEM_BYTES[name] == info.element_size()
