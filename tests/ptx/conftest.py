"""The processes in which the emulator runs, shared by all tests of this folder."""

from collections.abc import Iterator

import pytest
from ptx.child import Children


@pytest.fixture(scope="session")
def emulated() -> Iterator[Children]:
    """``emulated(arch, function, ...)`` runs function(arch, ...) where the library's kernels run in the emulator."""
    children = Children()
    yield children
    children.end()
