"""Repeated launches past Triton's search: they are the launches Triton would make, and none that it would not."""

from types import SimpleNamespace

import pytest
import torch
from compiling import output_of

from routingvl.kernels.optional_triton import triton
from routingvl.kernels.triton_common import cached_launcher as compiled
from routingvl.kernels.triton_common.cached_launcher import CachedKernel, launch_key, specialization

pytest.importorskip("hypothesis")

needs_triton = pytest.mark.skipif(triton is None, reason="no triton")
MEMORY = torch.zeros(64, dtype=torch.float64)


def test_what_has_no_key_goes_tritons_way() -> None:
    class Wrapped(torch.Tensor):
        pass

    for odd in (None, True, 2**31, -(2**31) - 1, "text", torch.zeros(2).as_subclass(Wrapped)):
        assert specialization(odd) is None
        assert launch_key((MEMORY, odd), ()) is None
    assert launch_key((3, MEMORY), ()) is None  # no tensor that names the device
    with torch._subclasses.FakeTensorMode():
        assert launch_key((torch.zeros(2),), ()) is None


def test_constants_and_their_types_are_in_the_key() -> None:
    keys = [launch_key((MEMORY,), constants) for constants in ((1,), (True,), (2,), (1, 1), ())]
    assert len(set(keys)) == len(keys)
    assert launch_key((MEMORY,), (1,)) == launch_key((MEMORY,), (1,))
    assert launch_key((torch.zeros(2, device="meta"),), ()) != launch_key((torch.zeros(2),), ())


class Compiled:
    """Machine code that writes down how it is launched."""

    def __init__(self, log: list) -> None:
        self.log = log

    def __getitem__(self, grid):
        return lambda *arguments: self.log.append((grid, arguments))


ARGUMENTS_OF_KERNEL = {"p_x": MEMORY, "rows": 5, "block_r": 64, "act": 2, "num_warps": 4, "num_stages": 3}


class Kernel:
    """A jitted function as far as CachedKernel knows one."""

    def __init__(self) -> None:
        self.params = []
        self.searched, self.direct, self.pre_run_hooks = [], [], []

    @staticmethod
    def fn(p_x, rows, BLOCK_R, ACT) -> None:
        """Only its signature is read."""

    def __getitem__(self, grid):
        def run(*arguments, **constants):
            self.searched.append((grid, arguments, constants))
            return Compiled(self.direct)

        return run


@pytest.fixture
def knobs(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stand-in for Triton, whose knobs a test may turn."""
    chains = {name: SimpleNamespace(calls=[]) for name in ("launch_enter_hook", "launch_exit_hook")}
    found = SimpleNamespace(
        runtime=SimpleNamespace(**chains, debug=False), compilation=SimpleNamespace(instrumentation_mode="")
    )
    compiler = SimpleNamespace(CompiledKernel=Compiled)
    monkeypatch.setattr(compiled, "triton", SimpleNamespace(JITFunction=Kernel, knobs=found, compiler=compiler))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.delenv("ROUTINGVL_LAUNCH", raising=False)
    return found


def test_the_second_launch_goes_straight_to_the_machine_code(knobs: SimpleNamespace) -> None:
    kernel = Kernel()
    launch = CachedKernel(kernel)
    given = {"act": 2, "p_x": MEMORY, "block_r": 64, "num_warps": 4, "num_stages": 3, "of no concern": 1}
    for rows in (5, 7, 16, 32):
        launch((3,), {**given, "rows": rows})
    assert [arguments[1] for _, arguments, _ in kernel.searched] == [5, 16]
    assert kernel.direct == [((3, 1, 1), (MEMORY, 7, 64, 2)), ((3, 1, 1), (MEMORY, 32, 64, 2))]
    assert kernel.searched[0][2] == {"BLOCK_R": 64, "ACT": 2, "num_warps": 4, "num_stages": 3}
    launch((3, 2), {**given, "rows": 7, "num_warps": 8})
    assert len(kernel.searched) == 3
    for maxnreg, searches in ((0, 3), (128, 4), (128, 4), (96, 5)):  # 0: no limit, as without it
        launch((3,), {**given, "rows": 7, "maxnreg": maxnreg})
        assert len(kernel.searched) == searches
    assert kernel.searched[3][2] == {**kernel.searched[0][2], "maxnreg": 128}
    with pytest.raises(KeyError, match="rows"):
        launch((3,), given)


def test_a_launch_that_somebody_watches_goes_tritons_way(knobs: SimpleNamespace) -> None:
    kernel = Kernel()
    launch = CachedKernel(kernel)

    def searches() -> bool:
        before = len(kernel.searched)
        launch((1,), ARGUMENTS_OF_KERNEL)
        return len(kernel.searched) > before

    assert [searches(), searches()] == [True, False]
    for change, back in (
        (lambda: knobs.runtime.launch_enter_hook.calls.append(print), knobs.runtime.launch_enter_hook.calls.clear),
        (lambda: knobs.runtime.launch_exit_hook.calls.append(print), knobs.runtime.launch_exit_hook.calls.clear),
        (lambda: kernel.pre_run_hooks.append(print), kernel.pre_run_hooks.clear),
        (lambda: setattr(knobs.runtime, "debug", True), lambda: setattr(knobs.runtime, "debug", False)),
        (
            lambda: setattr(knobs.compilation, "instrumentation_mode", "fpsan"),
            lambda: setattr(knobs.compilation, "instrumentation_mode", ""),
        ),
    ):
        change()
        assert searches()
        back()
        assert not searches()


def test_what_is_not_as_expected_is_left_to_triton(knobs: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def count(launch: CachedKernel, kernel: Kernel) -> int:
        for _ in range(3):
            launch((1,), ARGUMENTS_OF_KERNEL)
        return len(kernel.searched)

    monkeypatch.setenv("ROUTINGVL_LAUNCH", "triton")
    kernel = Kernel()
    assert count(CachedKernel(kernel), kernel) == 3
    monkeypatch.delenv("ROUTINGVL_LAUNCH")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    kernel = Kernel()
    assert count(CachedKernel(kernel), kernel) == 3
    monkeypatch.setattr(torch.version, "hip", None)
    del knobs.runtime.launch_exit_hook
    kernel = Kernel()
    assert count(CachedKernel(kernel), kernel) == 3


PROGRAM = """
import json
import torch, triton
import stub_gpu

launches = stub_gpu.install()
searches, search = [], triton.JITFunction.run
def run(self, *arguments, **options):
    searches.append(self.fn.__name__)
    return search(self, *arguments, **options)
triton.JITFunction.run = run

import routingvl.kernels.lora.ops, routingvl.kernels.adapter.ops
memory = torch.zeros(1 << 16)
def call(rows, width, first):
    ops = torch.ops.routingvl
    x, y = memory[first : first + rows * width].view(rows, width), memory[: rows * width].view(rows, width)
    up, u = memory[: 8 * width].view(width, 8), memory[:8].view(1, 8)
    ones = memory[:width].view(1, -1)
    ops.rank_one_forward_(y, x, ones, ones, None, rows, True, 3, False, 1.0, [0], "bottleneck", "nk", 0.0)
    down = memory[: 8 * width].view(8, width)
    ops.adapter_forward_(y, x, down, None, u, up, None, rows, 1, False, True, 1, False, 1, True)
for rows, width, first in [(8, 64, 0), (24, 64, 0), (8, 64, 1), (8, 60, 0), (1, 64, 0)]:
    for _ in range(2):
        call(rows, width, first)
print(json.dumps([searches, launches]))
"""


@needs_triton
def test_launches_are_the_same_with_and_without() -> None:
    results = [output_of(PROGRAM, TRITON_DEFAULT_FP_FUSION="1", ROUTINGVL_LAUNCH=way) for way in ("triton", "")]
    (every, stock), (searched, direct) = results
    assert len(stock) == len(direct) == len(every) == 20
    assert len(searched) < 10  # of ten different calls, one is like another to Triton
    # Pointers differ between processes; kernel, machine code (numbered as loaded), grid and sizes do not.
    assert [[*launch[:3], len(launch[3])] for launch in stock] == [[*launch[:3], len(launch[3])] for launch in direct]
    sizes = [
        [[a for a in launch[3] if not isinstance(a, int) or a < 2**20] for launch in way] for way in (stock, direct)
    ]
    assert sizes[0] == sizes[1]
