"""Which library multiplies float32 on a CPU: the table, the probe for CPUs that are not in it, what turns it off."""

from collections.abc import Callable, Iterator

import pytest
import torch

from routingvl.kernels import cpu_library

HAS_ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise")
needs_onednn = pytest.mark.skipif(not HAS_ONEDNN, reason="this torch has no oneDNN operation for float32")


@pytest.fixture
def a_cpu(tmp_path, monkeypatch) -> Iterator[Callable]:
    """Makes this process see another CPU; nothing it decided is kept."""

    def be(maker: str, capability: str, mkl: bool = True) -> None:
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {maker}\n")
        monkeypatch.setattr(cpu_library, "CPU_LIST", tmp_path / "cpuinfo")
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
        forget()

    def forget() -> None:
        cpu_library.measured.cache_clear()
        cpu_library._probed.cache_clear()

    yield be
    forget()


@pytest.fixture
def probes(monkeypatch) -> list[int]:
    """The threads of every probe; its result is 3 with one thread and 1.1 with more."""
    asked: list[int] = []

    def probe(threads: int) -> float:
        asked.append(threads)
        return 3.0 if threads == 1 else 1.1

    monkeypatch.setattr(cpu_library, "probe", probe)
    return asked


@pytest.mark.parametrize(
    ("maker", "capability", "mkl", "expected"),
    [
        ("AuthenticAMD", "AVX512", True, HAS_ONEDNN),
        ("GenuineIntel", "AVX512", True, False),
        ("GenuineIntel", "AVX2", True, False),
        ("AuthenticAMD", "AVX512", False, False),
        ("", "SVE256", False, False),  # ARM
    ],
)
def test_a_measured_cpu_is_not_probed(maker, capability, mkl, expected, a_cpu, probes, tmp_path, monkeypatch) -> None:
    a_cpu(maker, capability, mkl)
    assert cpu_library.onednn_is_faster() is expected
    # Systems without that file tell the maker in the processor's name.
    monkeypatch.setattr(cpu_library, "CPU_LIST", tmp_path / "nothing")
    monkeypatch.setattr(cpu_library.platform, "processor", lambda: f"AMD64 Family 26, {maker}")
    cpu_library.measured.cache_clear()
    assert cpu_library.onednn_is_faster() is expected
    assert not probes


@needs_onednn
@pytest.mark.parametrize("maker", ["AuthenticAMD", "HygonGenuine"])
def test_others_are_probed_once_for_each_number_of_threads(maker, a_cpu, probes) -> None:
    a_cpu(maker, "AVX2")
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 1, 2):
            torch.set_num_threads(threads)
            found.append(cpu_library.onednn_is_faster())
    finally:
        torch.set_num_threads(before)
    assert found == [True, False, True, False]  # 1.1 times is no clear difference
    assert probes == [1, 2]


@needs_onednn
def test_a_report_says_which_and_why(a_cpu, probes) -> None:
    a_cpu("AuthenticAMD", "AVX512")
    assert cpu_library.in_words() == "oneDNN, as measured on such CPUs"
    a_cpu("AuthenticAMD", "AVX2")
    assert cpu_library.in_words().endswith(", by a probe of this CPU")
    a_cpu("", "SVE256", mkl=False)
    assert cpu_library.in_words() == "torch's own"
    assert len(probes) == 1


@needs_onednn
def test_deterministic_algorithms_ask_no_clock(a_cpu, probes) -> None:
    a_cpu("AuthenticAMD", "AVX2")
    torch.use_deterministic_algorithms(True)
    try:
        assert not cpu_library.onednn_is_faster()
    finally:
        torch.use_deterministic_algorithms(False)
    assert not probes


@needs_onednn
def test_the_probe_times_both_and_leaves_the_generator_alone(monkeypatch) -> None:
    calls = {"torch": 0, "onednn": 0}
    clock = [0.0]

    def way(name: str, seconds: float, real: Callable) -> Callable:
        def product(left, right):
            calls[name] += 1
            clock[0] += seconds
            return real(left, right)

        return product

    monkeypatch.setattr(cpu_library.time, "thread_time", lambda: clock[0])
    monkeypatch.setattr(cpu_library.torch, "mm", way("torch", 6.0, torch.mm))
    monkeypatch.setattr(cpu_library, "onednn_product", way("onednn", 2.0, cpu_library.onednn_product))
    state = torch.get_rng_state()
    assert cpu_library.probe(1) == pytest.approx(3.0)
    assert calls["torch"] == calls["onednn"] == 7 * (1 + cpu_library.PROBE_ROUNDS)
    assert torch.equal(torch.get_rng_state(), state)


@needs_onednn
def test_the_probe_is_a_plausible_ratio() -> None:
    assert 0.05 < cpu_library.probe(torch.get_num_threads()) < 20


def test_the_probe_is_of_float32_on_the_cpu_whatever_the_defaults(monkeypatch):
    seen = []

    def way(left, right):
        seen.append((left.dtype, right.dtype, left.device.type, torch.is_autocast_enabled("cpu")))

    monkeypatch.setattr(cpu_library, "onednn_product", way)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16):
            cpu_library.probe(1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert set(seen) == {(torch.float32, torch.float32, "cpu", False)}
