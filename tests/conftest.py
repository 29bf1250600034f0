"""Fixtures. GSA_REQUIRE_GPU=1 turns a missing GPU into failures instead of skips."""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts: lets torch's own products run under deterministic algorithms

import pytest
import torch

from gsa_ext import _load

REQUIRED = os.environ.get("GSA_REQUIRE_GPU") == "1"
PRESENT = torch.cuda.is_available()


def gpu() -> torch.device:
    if not PRESENT:
        (pytest.fail if REQUIRED else pytest.skip)("no GPU")
    return torch.device("cuda")


def pytest_report_header():
    return f"gsa_ext: {_load.built().cpu_only or 'built for the CPU and CUDA'}"


@pytest.fixture(params=["cpu", "cuda"] if PRESENT or REQUIRED else ["cpu"])
def device(request):
    """The CPU, and the GPU where there is one."""
    return torch.device("cpu") if request.param == "cpu" else gpu()


@pytest.fixture
def cuda():
    """The GPU: for tests of what the CPU does not have."""
    return gpu()


@pytest.fixture
def poisoned():
    """Memory that nobody has written reads NaN (or the largest integer)."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(9).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
