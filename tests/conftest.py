"""Settings of every test: offline, one thread, and GPU tests only where there is a GPU."""

import os

import pytest

# Before torch and transformers are imported. The models of the tests are tiny: further threads only cost time, the more
# so when pytest-xdist runs a test on every core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` without a CUDA device (torch is imported only if there are such tests)."""
    needy = [item for item in items if item.get_closest_marker("gpu")]
    if needy:
        import torch

        if not torch.cuda.is_available():
            for item in needy:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
