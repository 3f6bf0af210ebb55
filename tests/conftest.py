"""Settings of every test: offline, one thread, GPU tests only where there is a GPU, elsewhere Triton's interpreter."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before torch and transformers are imported. The models of the tests are tiny: further threads only cost time, the more
# so when pytest-xdist runs a test on every core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
# transformers looks for a public package of this name. The folders kernels/ of this repository and of its tests, which
# Python would find, are not that package.
sys.modules.setdefault("kernels", None)

# Triton reads this once, at import. A device file tells whether there is a GPU without importing torch.
HAS_GPU_DEVICE = any(Path(name).exists() for name in ("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd", "/dev/dxg"))
if not HAS_GPU_DEVICE:
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Files named so take the GPU by themselves where there is one, and Triton's interpreter elsewhere.
KERNEL_TESTS = "test_triton_"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_configure() -> None:
    """Mend the interpreter's bfloat16 before any test can run a kernel."""
    if INTERPRETED:
        cure_interpreter()


def cure_interpreter() -> None:
    """Let Triton's interpreter multiply bfloat16 values, and round to them as every GPU does.

    It keeps bfloat16 as bits in uint16 arrays: tl.dot (Triton 3.4 to 3.9) multiplies those integers, and a cast from
    float32 cuts the lower bits off, which doubles the error. Other arithmetic on bfloat16 stays wrong; kernels compute
    in float32.
    """
    try:
        import numpy as np
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:  # no triton on this platform: its tests skip themselves
        return
    builder, handle_of = interpreter.InterpreterBuilder, interpreter.TensorHandle
    flawed_dot, flawed_cast = builder.create_dot, builder.cast_impl

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << np.uint32(16)
        return handle_of(bits.view(np.float32), tl.float32)

    def create_dot(self, a, b, *rest):
        return flawed_dot(self, widened(a), widened(b), *rest)

    def cast_impl(self, source, target):
        if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
            return flawed_cast(self, source, target)
        bits = np.asarray(source.data, np.float32).view(np.uint32)
        nearest_even = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        rounded = np.where(np.isnan(source.data), np.uint32(0x7FC00000), nearest_even)
        return handle_of((rounded >> np.uint32(16)).astype(np.uint16), tl.bfloat16)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what :func:`tiny.write_tiny` writes, for all tests together: nobody changes it."""
    from tiny import write_tiny

    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN: whatever a kernel leaves unwritten, or reads beyond what was written, shows."""
    import torch

    def poisoned(allocate):
        def wrapper(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return wrapper

    for owner, names in ((torch, ("empty", "empty_like", "empty_strided")), (torch.Tensor, ("new_empty",))):
        for name in names:
            monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.hookimpl(tryfirst=True, hookwrapper=True)  # the first part is before pytest selects by -m
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Iterator[None]:
    """Mark the tests of ``reliability/``, and the kernels' as ``gpu`` where they will run on one; skip those marked so
    where there is no CUDA device. Of what was selected keep the share that ROUTINGVL_TEST_SHARD names, such as 3/16:
    the fourth of sixteen processes.

    torch is imported only if there are such tests.
    """
    if not INTERPRETED:
        for item in items:
            if item.path.name.startswith(KERNEL_TESTS):
                item.add_marker(pytest.mark.gpu)
    for item in items:
        if "reliability" in item.path.parts:
            item.add_marker(pytest.mark.reliability)
    needy = [item for item in items if item.get_closest_marker("gpu")]
    if needy:
        import torch

        if not torch.cuda.is_available():
            for item in needy:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    yield
    number, _, count = os.environ.get("ROUTINGVL_TEST_SHARD", "0/1").partition("/")
    items[:] = items[int(number) :: int(count)]
