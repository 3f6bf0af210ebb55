"""A call that follows a plan makes the launch that it would have made without one, in every argument."""

import random
from types import SimpleNamespace

import pytest
import torch

from routingvl.kernels import dispatch, routed_adapter, routed_lora_linear
from routingvl.kernels.optional_triton import triton

pytestmark = pytest.mark.skipif(triton is None, reason="no triton")


class Code:
    """Machine code whose launches are written down: grid, and arguments (tensors by their traits)."""

    def __init__(self, name: str, log: list) -> None:
        self.name, self.log = name, log

    def __getitem__(self, grid):
        def run(*arguments):
            self.log.append((self.name, grid, tuple(map(told, arguments))))

        return run


given: dict[int, int] = {}  # address -> number of a tensor that the running call was given


def told(argument):
    """What a kernel gets to know of an argument: of a tensor its dtype and which one it is."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, given.get(argument.data_ptr(), "new")
    return argument


class Kernel:
    """A jitted function as far as CachedKernel knows one; nothing is compiled."""

    params, pre_run_hooks = (), ()

    def __init__(self, fn, log: list) -> None:
        self.fn, self.log = fn, log

    def __getitem__(self, grid):
        def search(*arguments, num_warps, num_stages, **constants):
            code = Code(self.fn.__name__, self.log)
            code[(*grid, 1, 1)[:3]](*arguments, *constants.values())
            return code

        return search


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch):
    """Switches between the ways: planned or not; and the list of launches."""
    from routingvl.kernels.adapter import ops as adapter_ops
    from routingvl.kernels.lora import ops as lora_ops
    from routingvl.kernels.triton_common import cached_launcher, launch

    log: list = []
    runtime = SimpleNamespace(launch_enter_hook=None, launch_exit_hook=None, debug=False)
    stand_in = SimpleNamespace(
        JITFunction=Kernel,
        knobs=SimpleNamespace(runtime=runtime, compilation=None),
        compiler=SimpleNamespace(CompiledKernel=Code),
        OutOfResources=MemoryError,
        TritonError=MemoryError,
    )
    monkeypatch.setattr(cached_launcher, "triton", stand_in)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.delenv("ROUTINGVL_LAUNCH", raising=False)
    monkeypatch.setattr(launch, "triton", stand_in)
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    monkeypatch.setattr(dispatch, "triton_obstacle", lambda device_type: None)
    monkeypatch.setattr(dispatch, "call_obstacle", lambda dtype, width: None)
    kernels = []
    for ops in (lora_ops, adapter_ops):
        for name, old in list(vars(ops).items()):
            if isinstance(old, cached_launcher.CachedKernel):
                kernels.append(cached_launcher.CachedKernel(Kernel(old._kernel.fn, log)))
                monkeypatch.setattr(ops, name, kernels[-1])

    def choose(planned: bool) -> list:
        for kernel in kernels:
            kernel._direct = planned
        log.clear()
        return log

    return choose


def a_call(draw: random.Random):
    """A function that makes one call of a layer, forward and backward, always the same."""
    lora, dtype = draw.random() < 0.6, draw.choice([torch.float32, torch.bfloat16])
    routing = draw.choice(["none", "add", "mul", "vllora", "expand"])
    visual = draw.choice([1, 1, 3]) if routing == "vllora" else 1
    batch, text, width, rank, groups = draw.choice([1, 2]), draw.choice([1, 3]), draw.choice([16, 20]), 4, 1
    columns = None
    if lora and draw.random() < 0.5:
        groups, columns = 2, (0, 2 * width)
    outputs = groups * width if columns is None else 3 * width
    new = lambda *shape: torch.zeros(*shape, dtype=dtype)  # noqa: E731
    x, v = new(batch, text, width), new(batch, visual, width)
    if draw.random() < 0.3:
        x = new(batch, text, 2 * width)[..., :width]  # rows apart from each other
    if draw.random() < 0.3:
        x = new(batch * text * width + 1)[1:].view(batch, text, width)  # not aligned
    weights = [new(groups * rank, width), new(groups * width, rank)] if lora else [new(rank, width), new(width, rank)]
    for tensor in (x, *weights):
        tensor.requires_grad_(draw.random() < 0.7)
    options = {"routing": routing, "backend": "triton"}
    if lora:
        bias = None if draw.random() < 0.5 else new(outputs)
        options |= {"groups": groups, "columns": columns, "dropout": draw.choice([0.0, 0.5]), "scaling": 2.0}
        function, tensors = routed_lora_linear, (x, v, new(outputs, width), bias, *weights)
    else:
        biases = [None if draw.random() < 0.5 else new(size) for size in (rank, width)]
        options |= {"residual": draw.random() < 0.5, "activation": draw.choice(["gelu", "relu"])}
        function, tensors = routed_adapter, (x, v, weights[0], biases[0], weights[1], biases[1])
    with_gradients = draw.random() < 0.8

    def call() -> None:
        given.clear()
        given.update((tensor.data_ptr(), number) for number, tensor in enumerate(tensors) if tensor is not None)
        with torch.set_grad_enabled(with_gradients):
            y = function(*tensors, **options)
        if y.requires_grad:
            y.backward(torch.zeros_like(y))

    return call


def test_planned_launches_are_the_launches(ways) -> None:
    draw = random.Random(0)
    calls = [a_call(draw) for _ in range(60)]
    log = ways(False)
    wanted = []
    for call in calls:
        log.clear()
        call()
        wanted.append(list(log))
    ways(True)
    for _ in range(4):  # searched, found, planned, and again; among each other in another order each time
        order = list(range(len(calls)))
        draw.shuffle(order)
        for number in order:
            log.clear()
            calls[number]()
            assert log == wanted[number]
    assert sum(map(len, wanted)) > 100
