"""``gsa-ext verify``: every op against the fp64 reference on the machine at hand, in seconds."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("verify", help="every op against the fp64 reference on this machine: pass, or which output is off by how much")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ...; default: the CPU, and the GPU where there is one")
    parser.add_argument("-v", "--verbose", action="store_true", help="print every compared tensor")


def run(args: argparse.Namespace) -> int:
    import torch

    from gsa_ext import _load

    devices = [args.device] if args.device else ["cpu"] + (["cuda"] if torch.cuda.is_available() and _load.built().cuda else [])
    if not args.device and torch.cuda.is_available() and not _load.built().cuda:
        print("cuda   not verified: gsa_ext was built for the CPU only")
    failures = 0
    for device in devices:
        began = time.perf_counter()
        count = 0
        for title, rows in cases(torch.device(device)):
            bad = [row for row in rows if not row.ok]
            count += len(rows)
            failures += len(bad)
            for row in rows if args.verbose else bad:
                print(f"{device:<6} {title:<60} {row}")
        print(f"{device:<6} {count} tensors compared with the fp64 reference in {time.perf_counter() - began:.1f} s")
    print(f"verify: {failures} tensors OFF" if failures else "verify: pass")
    return 1 if failures else 0


def cases(device: Any) -> Iterator[tuple[str, list[Any]]]:
    """(title, compared rows): every op, mode and dtype, at shapes that have ragged ends and, in turn, each width of the kernels."""
    import torch

    from gsa_ext import chunk_gsa, fused_recurrent_gsa, testing

    dtypes = [torch.float32, torch.bfloat16, torch.float16] + ([torch.float64] if device.type == "cpu" else [])
    small: dict[str, Any] = {"B": 1, "T": 37, "HQ": 4, "H": 2, "K": 32, "V": 48, "M": 16, "initial_state": True}
    for dtype in dtypes:
        kind = str(dtype)[6:]
        for mode in ("coupled", "given", "abc"):
            for op in (chunk_gsa, fused_recurrent_gsa, testing.stepwise):
                x = testing.make_inputs(**small, mode=mode, gate="mixed", dtype=dtype, device=device)
                yield f"{op.__name__} {mode} {kind}", testing.compare(op, x, gradients=op is not testing.stepwise)
        x = testing.make_inputs(T=0, HQ=2, K=32, V=32, M=16, lengths=[0, 20, 1, 0, 70], mode="coupled", dtype=dtype, device=device)
        yield f"chunk_gsa packed {kind}", testing.compare(chunk_gsa, x)
        for K, V, M in ((128, 128, 64), (60, 100, 128)):
            x = testing.make_inputs(T=70, HQ=1, K=K, V=V, M=M, mode="given", dtype=dtype, device=device)
            yield f"chunk_gsa K {K} V {V} M {M} {kind}", testing.compare(chunk_gsa, x)
