#!/usr/bin/env python3
"""Tests with the CUDA kernels' own code, on a machine without a GPU:

    python tests/emulation/run.py tests/test_hopper.py -k packed      pytest's options
    python tests/emulation/run.py                                     the tests that are worth their time here (SUBSET)
    python tests/emulation/run.py --asan ...                          with AddressSanitizer: accesses beyond the end of a tensor too; three times as slow

compiles what has changed and runs pytest, with the tests' `cuda` and `device` the CPU, whose tensors go to the kernels for CUDA. In the environment:
GSA_EMULATION_SEED (default 1) is what chance starts from, in each test; GSA_EMULATION=early or late: asynchronous work is done at once, or when waited for.

Blocks run one after the other, in an order of chance, with early and late in that of the grid. Where one waits for blocks before it in the grid (pools of
groups and of segments: tests test_pool...) only the latter is right.
"""

from __future__ import annotations

import os
import subprocess
import sys

import build

# One of twelve cases of each test; what is left out has no kernel, or takes too long here.
SUBSET = ["tests/emulation", "tests/test_hopper.py", "tests/test_accuracy.py", "tests/test_inputs.py", "tests/test_beside.py", "--one-of", "12"]
LONG = ["environment_decides", "walk_backward_only", "block_for_all_heads", "more_chunks_than", "test_pool", "under_load", "several_windows_among"]
LONG += ["many_rows", "test_long"]
ELSEWHERE = ["rotate_is_the_formula"]  # expects of tensors of the CPU what the CPU does
NO_KERNEL = ["fp64", "float64", "window_attention", "opcheck", "fake", "compile"]
SUBSET += ["-k", f"emulation or not ({' or '.join([*LONG, *ELSEWHERE, *NO_KERNEL])})"]


def main(arguments: list[str]) -> int:
    asan = "--asan" in arguments
    arguments = [x for x in arguments if x != "--asan"]
    try:
        builder = build.Builder(asan)
    except build.NotPossible as why:
        print(f"NOT emulated: {why}")
        return 0 if "--if-possible" in arguments else 1
    arguments = [x for x in arguments if x != "--if-possible"]
    library, _ = builder.library(), builder.faults()
    if arguments == ["--build"]:
        return 0
    if not any(os.path.exists(x.partition("::")[0]) for x in arguments):
        arguments = [*SUBSET, *arguments]
        os.chdir(build.ROOT)
    environment = {**os.environ, "GSA_EMULATED": str(library), "PYTHONPATH": f"{builder.package}{os.pathsep}{build.ROOT}", "OMP_NUM_THREADS": "1"}
    if asan:
        # libstdc++ too, or AddressSanitizer looks for its exceptions before they are there
        libraries = [build.execute(["g++", f"-print-file-name={name}"]).strip() for name in ("libasan.so", "libstdc++.so")]
        environment |= {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
    # -P and no pythonpath: the package of the checkout is not the one to import
    return subprocess.run([sys.executable, "-P", "-m", "pytest", "-o", "pythonpath=", *arguments], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
