"""Builds gsa_ext._C, the native half of gsa_ext, with the torch it will run with.

    GSA_BUILD_CUDA=0|1      without or with the CUDA kernels; unset: with them when torch's CUDA and a toolkit of that major version are there
    TORCH_CUDA_ARCH_LIST    architectures, default "8.0+PTX;9.0a"
    MAX_JOBS                parallel compilers
    GSA_SANITIZE=1          CPU code with AddressSanitizer and UndefinedBehaviorSanitizer (.ci/sanitize)
"""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
ARCHITECTURES = "8.0+PTX;9.0a"
NO_TORCH = (
    "gsa_ext is compiled against torch, and this Python has none: `pip install torch setuptools ninja` first, "
    "or install gsa_ext without --no-build-isolation, which brings torch along"
)


def build_requirements() -> list[str]:
    """What an isolated build needs: ninja, and the torch of the environment that gsa_ext is going to (pip hides it from sys.path, not from here)."""
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    if not Path(sys.prefix, "pyvenv.cfg").exists() or "include-system-site-packages = true" in Path(sys.prefix, "pyvenv.cfg").read_text():
        paths |= {*site.getsitepackages(), site.getusersitepackages()}
    for found in metadata.distributions(name="torch", path=sorted(paths)):
        return ["ninja", f"torch=={found.version.partition('+')[0]}"]
    return ["ninja", "torch>=2.11"]


def toolkit_version(cuda_home: str | None) -> str | None:
    """Version of the CUDA toolkit whose nvcc torch would call, or None."""
    nvcc = Path(cuda_home, "bin", "nvcc") if cuda_home else None
    if nvcc is None or not nvcc.exists():
        return None
    found = re.search(r"release (\d+\.\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    return found.group(1) if found else None


def use_cuda(torch_cuda: str | None, toolkit: str | None) -> tuple[bool, str]:
    """Whether to build the CUDA kernels, and why. The GPUs of the building machine have no say."""
    forced = os.environ.get("GSA_BUILD_CUDA", "")
    if forced not in ("", "0", "1"):
        raise SystemExit(f"GSA_BUILD_CUDA: expected 0 or 1, given {forced!r}")
    if forced == "0":
        return False, "GSA_BUILD_CUDA=0"
    if torch_cuda is None:
        reason = "this torch has no CUDA: install one that has (see pytorch.org)"
    elif toolkit is None:
        reason = f"torch has CUDA {torch_cuda}, but there is no CUDA toolkit: put nvcc {torch_cuda.split('.')[0]}.x on PATH or set CUDA_HOME"
    elif toolkit.split(".")[0] != torch_cuda.split(".")[0]:
        reason = f"torch has CUDA {torch_cuda}, the toolkit is {toolkit}: the major versions must agree"
    else:
        return True, f"torch has CUDA {torch_cuda}, the toolkit is {toolkit}"
    if forced == "1":
        raise SystemExit(f"GSA_BUILD_CUDA=1 cannot be done: {reason}")
    return False, reason


def native() -> dict[str, Any]:
    """The extension and the command that builds it; without torch, a command that says so."""
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:

        class NeedsTorch(build_ext):
            def run(self) -> None:
                raise SystemExit(NO_TORCH)

        return {"ext_modules": [Extension("gsa_ext._C", [])], "cmdclass": {"build_ext": NeedsTorch}}

    cuda, why = use_cuda(torch.version.cuda, toolkit_version(cpp_extension.CUDA_HOME))
    if cuda:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    if shutil.which("ninja") is None:  # installed beside this Python, whose bin directory is not on PATH
        os.environ["PATH"] += os.pathsep + sysconfig.get_path("scripts")

    archs = re.sub(r"[;,\s]+", " ", os.environ["TORCH_CUDA_ARCH_LIST"]).strip() if cuda else ""
    facts = [("GSA_BUILT_TORCH", torch.__version__), ("GSA_BUILT_CUDA", torch.version.cuda if cuda else ""), ("GSA_BUILT_ARCHS", archs)]
    facts += [("GSA_BUILT_WHY", "" if cuda else why)]
    common = ["-O3", "-std=c++20"]
    host, link = [*common, "-g0"], ["-Wl,-s"]
    if os.environ.get("GSA_SANITIZE") == "1":
        host = link = ["-O1", "-g1", "-std=c++20", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
    csrc = ROOT / "csrc"
    sources = sorted([*csrc.glob("*.cpp"), *csrc.glob("cpu/**/*.cpp")])
    sources[:0] = sorted(csrc.glob("cuda/**/*.cu"), key=lambda path: (-path.stat().st_size, path)) if cuda else []  # the longest to compile first
    kind = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    extension = kind(
        "gsa_ext._C",
        [str(path.relative_to(ROOT)) for path in sources],
        include_dirs=[str(csrc)],
        define_macros=[(name, f'"{value}"') for name, value in facts] + ([("GSA_WITH_CUDA", None)] if cuda else []),
        # -fopenmp when compiling only: linked, it could bring a second OpenMP runtime beside torch's, deaf to torch.set_num_threads
        extra_compile_args={"cxx": [*host, "-fopenmp", "-fvisibility=hidden"], "nvcc": [*common, "-Xfatbin=-compress-all", "--threads=2"]},
        extra_link_args=link,
    )

    class Build(cpp_extension.BuildExtension):
        def run(self) -> None:
            print(f"gsa_ext: building {'for the CPU and CUDA (' + archs + ')' if cuda else 'for the CPU ONLY'}: {why}", file=sys.stderr, flush=True)
            super().run()

    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


setup(setup_requires=build_requirements(), **native())
