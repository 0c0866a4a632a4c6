"""Triton where it is installed, for files that hold PyTorch and Triton code beside each other."""

from __future__ import annotations

from typing import Any

try:  # transformers asks for every module that it finds imported outside of such a block
    import triton.language as tl
    from triton import jit
except ImportError:
    tl = None

    def jit(function: Any) -> Any:
        """Leaves the function as it is: nothing will call it."""
        return function


def constexpr(value: float) -> Any:
    """A number that Triton functions may read as a global."""
    return value if tl is None else tl.constexpr(value)
