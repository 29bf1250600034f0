"""``gsa-ext info``: versions, what was built for which architectures, which devices are there."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from importlib import metadata
from typing import Any


def add_parser(subparsers: Any) -> None:
    subparsers.add_parser("info", help="versions, what was built for which architectures, which devices are there")


def run(args: argparse.Namespace) -> int:
    for name, value in facts().items():
        print(f"{name:<14}{value}")
    return 0


def facts() -> dict[str, str]:
    """What a report about a problem should contain."""
    import torch

    import gsa_ext
    from gsa_ext import _load

    build = _load.built()
    found = {
        "gsa_ext": f"{gsa_ext.__version__}, {os.path.dirname(gsa_ext.__file__)}",
        "built with": f"torch {build.torch}, g++ {_load.library().compiler}",
        "built for": f"CPU and CUDA {build.cuda}, architectures {' '.join(build.archs)}" if build.cuda else f"CPU only: {build.why}",
        "python": f"{platform.python_version()}, {sys.executable}",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}",
    }
    for name in ("transformers", "triton"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    found["cpu"] = f"{cpu_name()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    if not torch.cuda.is_available():
        found["gpu"] = "none"
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        p = torch.cuda.get_device_properties(i)
        note = "" if p.major >= 8 else ": needs compute capability 8.0 or higher"
        note = note if build.cuda else ": NOT USABLE, built for the CPU only; reinstall where nvcc is"
        found[f"cuda:{i}"] = f"{p.name}, compute capability {p.major}.{p.minor}, {p.total_memory / 2**30:.0f} GiB, {p.multi_processor_count} SMs{note}"
    return found


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
