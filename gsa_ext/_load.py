"""Loads the native module, after making sure that it belongs to the torch that is running."""

from __future__ import annotations

import mmap
import re
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

REINSTALL = "reinstall with `pip install --force-reinstall --no-deps --no-build-isolation {}`"


class Build(NamedTuple):
    """What gsa_ext was compiled with."""

    torch: str  #: version of torch, local part included
    cuda: str | None  #: version of CUDA, None for a CPU-only build
    archs: tuple[str, ...]  #: GPU architectures as in TORCH_CUDA_ARCH_LIST
    path: Path  #: the native module
    why: str = ""  #: of a CPU-only build: why there are no CUDA kernels in it

    @property
    def cpu_only(self) -> str | None:
        """What a user should know about a build without CUDA kernels; None when they are there."""
        return None if self.cuda else "built for the CPU ONLY" + (f" ({self.why})" if self.why else "")


def built() -> Build:
    """Reads the facts out of the native module without loading it.

    Raises:
        ImportError: there is no native module.
    """
    spec = util.find_spec("gsa_ext._C")
    if spec is None or spec.origin is None:
        raise ImportError(f"gsa_ext is not compiled for this Python: run `pip install -e {_source()}`, or leave the source directory to import another")
    path = Path(spec.origin)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = data.find(b"gsa_ext-built;torch=")
        found = re.match(rb"gsa_ext-built;torch=([^;]*);cuda=([^;]*);archs=([^;]*);(?:why=([^;]*);)?", data[at : at + 1024]) if at >= 0 else None
    if found is None:
        raise ImportError(f"{path} is not a native module of this gsa_ext: " + REINSTALL.format(_source()))
    version, cuda, archs, why = (x.decode() for x in found.groups(b""))
    return Build(version, cuda or None, tuple(archs.split()), path, why)


def mismatch(build: Build, version: str, cuda: str | None) -> str | None:
    """The sentence for a user whose torch (its version and CUDA version) is not the one that gsa_ext was compiled with; None when it is."""
    same_torch = build.torch.partition("+")[0] == version.partition("+")[0]
    same_cuda = build.cuda is None or (cuda is not None and build.cuda.split(".")[0] == cuda.split(".")[0])
    if same_torch and same_cuda:
        return None
    want, have = (f"torch {t}" + ("" if same_cuda else f" with CUDA {c}" if c else " without CUDA") for t, c in ((build.torch, build.cuda), (version, cuda)))
    return f"gsa_ext was built for {want}, found {have}: " + REINSTALL.format(_source())


def library() -> ModuleType:
    """The native module; the first call loads it and registers ``torch.ops.gsa``.

    Raises:
        ImportError: it was compiled for another torch, or not compiled at all; the message says what to run.
    """
    wrong = mismatch(built(), torch.__version__, torch.version.cuda)
    if wrong:
        raise ImportError(wrong)
    from gsa_ext import _C

    return _C


def _source() -> str:
    root = Path(__file__).resolve().parent.parent
    return str(root) if (root / "setup.py").exists() else "<the source directory of gsa_ext>"
