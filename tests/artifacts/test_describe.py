"""What `inspect` knows of the kernels, which it does not import."""

from __future__ import annotations

from lolcats_kernels import spec

from lolcats_cli.artifacts import describe


def test_sizes_by_layer_are_those_of_the_kernels() -> None:
    assert describe.BY_LAYER == spec.BY_LAYER
