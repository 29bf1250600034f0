"""The emulation itself: it runs what is right, and notices what is not (faults.cu), whatever the seed."""

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

if "GSA_EMULATED" not in os.environ:
    pytest.skip("for python tests/emulation/run.py", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).parent))

import torch

import build

ASAN = "emulated-asan" in os.environ["GSA_EMULATED"]
THREADS, ROUNDS = 128, 8
RIGHT = ["exchange", "exchange in warps", "barrier", "bulk", "copies", "products", "cluster"]
# What is said, or None: only the results show it.
WRONG = {
    "exchange: no barrier before reading": None,
    "exchange: no barrier before writing again": None,
    "exchange in warps: no __syncwarp": None,
    "barrier: a warp short": r"nobody can go on\n  block 0, threads 0 to 95: at bar.sync 1\n  block 0, threads 96 to 127: done",
    "barrier: from two places": r"come to bar.sync 1 from different places:\n.*faults.cu:\d+\n.*faults.cu:\d+$",
    "barrier: two counts": "where others say|bar.sync 1: more than|nobody can go on",
    "barrier: some lanes": "nobody can go on",
    "bulk: no wait": None,
    "bulk: no barrier before the store": None,
    "bulk: written while others read": None,
    "bulk: ends before its stores": "while its bulk copies may still read",
    "bulk: what is stored is written": None,
    "bulk: an mbarrier that is not initialised": "is not initialised",
    "bulk: an arrival too many": "an arrival too many|is written while a copy|nobody can go on",
    "bulk: an odd address": "cp.async.bulk: 512 bytes",
    "bulk: beyond its memory": "8 bytes at 512, and there are 512|not in shared memory",
    "copies: no wait": None,
    "products: no wait": None,
    "products: accumulators written in flight": "accumulators are written while products",
    "products: operand written in flight": None,
    "products: ends in flight": "ends with products in flight",
    "products: beyond its memory": "shared memory: 16 bytes at",
    "cluster: nobody waits": None,
    "cluster: sends before everybody is there": "no mbarrier|not initialised|shared memory|nobody can go on",
    "cluster: one ends early": "a block that has ended|no mbarrier|not initialised|shared memory",
}


@pytest.fixture(scope="module")
def faults():
    library = ctypes.CDLL(str(build.Builder(ASAN).faults()))
    library.gsa_emulation_fault.restype = ctypes.c_char_p
    library.gsa_emulation_fault.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p]
    return library


def run(library, name):
    """What was said, and whether the results are right."""
    x = torch.randn(ROUNDS * THREADS * 4)
    o, y = torch.full_like(x, torch.nan), x.view(-1, THREADS)[:ROUNDS]
    said = library.gsa_emulation_fault(name.encode(), x.data_ptr(), o.data_ptr()).decode()
    thread, kind = torch.arange(THREADS), name.partition(":")[0]
    want = {
        "exchange": lambda: y.flip(1).sum(0),
        "exchange in warps": lambda: y[:, thread ^ 31].sum(0),
        "barrier": lambda: y[0],
        "bulk": lambda: (2 * y[:, thread ^ 32]).flatten(),
        "copies": lambda: x[(thread ^ 33) * 4],
        "products": lambda: torch.full([32 * THREADS], 64.0),
        "cluster": lambda: x[: 4 * THREADS].view(2, 2, THREADS).flip(1).flatten(),
    }[kind]()
    return said, torch.allclose(o[: want.numel()], want, atol=1e-5)


@pytest.mark.parametrize("name", RIGHT)
def test_right(name, faults):
    for _ in range(20):
        assert run(faults, name) == ("", True)


@pytest.mark.parametrize("name", WRONG)
def test_wrong(name, faults):
    """Noticed in most launches, or in a fifth of them where only the order of warps matters."""
    noticed = 0
    for _ in range(50):
        said, right = run(faults, name)
        noticed += bool(said) or not right
        if said and WRONG[name] is not None:
            assert re.search(WRONG[name], said), said
            assert "_kernel" in said and "seed" in said
    assert noticed >= 10, f"noticed in {noticed} of 50 launches"


def test_the_same_seed_is_the_same_run(faults):
    """Also of what depends on chance."""

    def once():
        faults.gsa_emulation_begin()
        torch.manual_seed(0)
        return [run(faults, name) for name in ("exchange: no barrier before reading", "bulk: an arrival too many") for _ in range(10)]

    assert once() == once()


BEYOND = """
import ctypes, sys, torch
library = ctypes.CDLL(sys.argv[1])
library.gsa_emulation_fault.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p]
x, o = torch.zeros(4096), torch.zeros(4096)
library.gsa_emulation_fault(b"beyond the end of a tensor", x.data_ptr(), o.data_ptr())
"""


@pytest.mark.skipif(not ASAN, reason="with --asan")
def test_beyond_the_end_of_a_tensor(faults):
    done = subprocess.run([sys.executable, "-c", BEYOND, faults._name], capture_output=True, text=True)
    assert done.returncode and "heap-buffer-overflow" in done.stderr and "beyond_kernel" in done.stderr, done.stderr[-2000:]


def test_an_instruction_that_is_not_known():
    with pytest.raises(build.Unknown, match="mov.b64 %0, %1;"):
        build.translate('asm volatile("mov.b64 %0, %1;" : "=l"(x) : "l"(y));')
    with pytest.raises(build.Unknown, match="shared memory"):
        build.translate("emulation_shared float *x;")
    assert build.translate('if (a) asm volatile("bar.sync %0,\\n %1;" ::"r"(id), "r"(f(a, b)) : "memory");') == "if (a) (::emulation::sync((id), (f(a, b))));"
    assert build.translate("kernel<<<dim3(a, b), n>>>(x, y);") == "::emulation::Launch(dim3(a, b), n).of(kernel, x, y);"
