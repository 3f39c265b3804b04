"""Without a GPU the Triton kernels run in the interpreter; `gpu` tests skip with the reason."""

from collections.abc import Callable, Iterator

import pytest
import torch

from attnres import backend as backends
from attnres import triton_interpreter

triton_interpreter.use_without_gpu()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch finds none"))


@pytest.fixture(autouse=True)
def release_memory() -> Iterator[None]:
    """What a test kept of the device's memory, for others that run beside: eight processes kept more than 140 GB."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(operation, backend) of every launch."""
    calls = []
    original = backends.launcher

    def spy(op: str, backend: str) -> Callable[..., None]:
        calls.append((op, backend))
        return original(op, backend)

    monkeypatch.setattr(backends, "launcher", spy)
    return calls
