"""Compiles every Triton kernel as it would be launched, without a GPU, and prints what the compiler made of it.

    python benchmarks/kernel_resources.py [--capabilities 80 89 90 100] [--heads 64 128] [--dtypes bfloat16] [--decay]

Columns: registers of a thread, bytes a thread spills, shared memory of a program (the most that the GPU has beside it).
Exits with 1 if a kernel does not compile or does not fit.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.pop("TRITON_INTERPRET", None)
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "kernels")]

import torch  # noqa: E402
import triton  # noqa: E402
from lolcats_kernels import (  # noqa: E402
    HybridConfig,
    HybridMaps,
    KVState,
    hybrid_attention,
    sparse,
    triton_decoding,
    triton_launches,
    triton_sparse,
)
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

# Bytes of shared memory that a program can have (CUDA C programming guide, table of technical specifications).
SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}
CUOBJDUMP = next(Path(triton.__file__).parent.rglob("cuobjdump"))


def compiled(kernel: Any, given: dict[str, Any], warps: int, capability: int) -> dict[str, int]:
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    unread = next(x for x in given.values() if isinstance(x, torch.Tensor))
    for index, parameter in enumerate(kernel.params):
        value = unread if given[parameter.name] is None else given[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[(index,)] = "constexpr", value
            continue
        tensor = isinstance(value, torch.Tensor)
        signature[parameter.name] = TYPES[value.dtype] if tensor else "fp32" if isinstance(value, float) else "i32"
        if tensor or (isinstance(value, int) and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": warps, "num_stages": 1}
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    registers, spilled = re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0]
    return {"registers": int(registers), "spilled": int(spilled), "shared": result.metadata.shared}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capabilities", type=int, nargs="+", default=[80, 89, 90, 100])
    parser.add_argument("--heads", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--linear-factors", nargs="+", default=["exp"])
    parser.add_argument("--decay", action="store_true")
    args = parser.parse_args()
    print("| capability | head | dtype | kernel | chunk | warps | registers | spilled | shared memory | of |")
    print("| --- " * 10 + "|")
    too_large = False
    for capability in args.capabilities:
        for head in args.heads:
            for dtype in args.dtypes:
                for factor in args.linear_factors:
                    for row in launched(capability, head, getattr(torch, dtype), factor, args.decay):
                        print(
                            f"| {capability} | {head} | {dtype} |",
                            " | ".join(map(str, row)),
                            f"| {SHARED[capability]} |",
                        )
                        too_large |= row[-1] > SHARED[capability]
    sys.exit(too_large)


def launched(capability: int, head: int, dtype: torch.dtype, factor: str, decay: bool) -> list[tuple[Any, ...]]:
    """What calls in the shape of Llama 3 8B (of this head) launch: forward, backward with all gradients, decoding,
    the choices of a sparse cache."""
    rows = []

    def compile_it(kernel: Any, grid: object, warps: int, given: dict[str, Any]) -> None:
        made = compiled(kernel, given, warps, capability)
        rows.append((kernel.__name__, given.get("L", "-"), warps, *made.values()))

    maps = HybridMaps(HybridConfig(linear_factor=factor, decay=decay), 32, head)
    q, k, v = (torch.zeros(1, heads, 256, head, dtype=dtype, requires_grad=True) for heads in (32, 8, 8))
    options: Any = {"scaling": head**-0.5, "backend": "triton"}
    with (
        patch.object(triton_launches, "capability", lambda device: capability),
        patch.object(triton_launches, "launch", compile_it),
        patch.object(triton_decoding, "launch", compile_it),
        patch.object(triton_sparse, "launch", compile_it),
        patch.object(sparse, "backend_for", lambda *_: "triton"),
    ):
        hybrid_attention(q, k, v, maps, **options).sum().backward()
        with torch.no_grad():
            state = KVState.empty(maps, 1, 8, waiting=maps.config.waiting, dtype=dtype)
            hybrid_attention(*(x[:, :, :1] for x in (q, k, v)), maps, initial_state=state, return_state=True, **options)
        if not decay:
            sparse.sparse_attention(q, k, v, maps, size=64, scaling=options["scaling"])
    return list(dict.fromkeys(rows))


if __name__ == "__main__":
    main()
