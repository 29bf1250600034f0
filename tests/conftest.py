"""Fixtures. GSA_REQUIRE_GPU=1 turns a missing GPU into failures instead of skips.

Under tests/emulation/run.py (GSA_EMULATED) tensors of the CPU go to the kernels for CUDA, compiled for the CPU: `device` and `cuda` are the CPU then, and
tests marked `gpu` are skipped.
"""

import collections
import ctypes
import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts: lets torch's own products run under deterministic algorithms

import pytest
import torch

from gsa_ext import _load

REQUIRED = os.environ.get("GSA_REQUIRE_GPU") == "1"
PRESENT = torch.cuda.is_available()
EMULATED = ctypes.CDLL(os.environ["GSA_EMULATED"]) if "GSA_EMULATED" in os.environ else None
if EMULATED:
    assert str(_load.built().path) == os.environ["GSA_EMULATED"], "another gsa_ext than the emulated one was imported"
    EMULATED.gsa_emulation_launched.restype = ctypes.c_char_p


def gpu() -> torch.device:
    if EMULATED:
        return torch.device("cpu")
    if not PRESENT:
        (pytest.fail if REQUIRED else pytest.skip)("no GPU")
    return torch.device("cuda")


def pytest_report_header():
    if EMULATED:
        return f"gsa_ext: CUDA kernels emulated, GSA_EMULATION_SEED={os.environ.get('GSA_EMULATION_SEED', '1')}"
    return f"gsa_ext: {_load.built().cpu_only or 'built for the CPU and CUDA'}"


def pytest_addoption(parser):
    parser.addoption("--one-of", type=int, default=1, metavar="N", help="of the cases of each test the first, and then one of N")


@pytest.hookimpl(trylast=True)  # of those that -k leaves
def pytest_collection_modifyitems(config, items):
    if (one_of := config.getoption("one_of")) > 1:
        seen = collections.Counter()
        kept = []
        for item in items:
            test = item.nodeid.partition("[")[0]
            kept += [item] if seen[test] % one_of == 0 else []
            seen[test] += 1
        items[:] = kept


def pytest_runtest_setup(item):
    if EMULATED:
        EMULATED.gsa_emulation_begin()
        if marker := item.get_closest_marker("gpu"):
            pytest.skip(f"not emulated: {marker.args[0]}")


@pytest.fixture
def tf32():
    """fp32 products on a GPU may be in TF32."""
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture(params=["emulated"] if EMULATED else ["cpu", "cuda"] if PRESENT or REQUIRED else ["cpu"])
def device(request):
    """The CPU, and the GPU where there is one."""
    return torch.device("cpu") if request.param == "cpu" else gpu()


@pytest.fixture
def cuda():
    """The GPU: for tests of what the CPU does not have."""
    return gpu()


@pytest.fixture
def capability(cuda):
    """Of the GPU."""
    return (9, 0) if EMULATED else torch.cuda.get_device_capability()


@pytest.fixture
def kernels_of(cuda):
    """The names of the kernels that a call launches."""

    def profiled(call) -> set[str]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        return {event.name for event in profile.events()}

    def logged(call) -> set[str]:
        EMULATED.gsa_emulation_launched()
        call()
        return set(EMULATED.gsa_emulation_launched().decode().split("\n"))

    return logged if EMULATED else profiled


@pytest.fixture
def poisoned():
    """Memory that nobody has written reads NaN (or the largest integer)."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(9).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
