"""The edges of the training op: packed sequences beside equal ones, slices of a fused projection, short sequences, the first call.

    python -m benchmarks.edges [--device cuda] [--out benchmarks/results]

"packed" is 32 random lengths in 64 Ki tokens, beside the same tokens as 32 sequences of 2048, packed too. "slices" reads q, k and v out of one tensor
[B, T, (HQ + 2 H) D], beside three. On a GPU these are times of the GPU: a call is one of two in a CUDA graph, so that 0.3 ms of kernels do not wait for
Python. The two take turns; a ratio is the median, over the turns, of one's time by the other's in the same turn, with its quartiles. Short sequences say
how many kernels a call launches and how long the GPU works in them (a profile), beside the time of a call issued from Python to an idle GPU; and of 100 calls
in a row the time each took until the GPU was done, and until Python had issued them: what the first is more, kernels add to launches. The first call is the
first of a process, less the fastest of those that follow it, torch and CUDA being up.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.__main__ import Contestant, Shape, alternate, make, passes, several, turns
from benchmarks.report import Report
from gsa_ext import chunk_gsa


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.edges", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="where the JSON goes")
    args = parser.parse_args()
    device = torch.device(args.device)
    cuda = device.type == "cuda"
    HQ, H, D, M, tokens, dtype = (32, 8, 128, 64, 65536, "bfloat16") if cuda else (4, 2, 32, 16, 2048, "float32")
    with Report(args.out, "edges", device.type, 0, None) as report:

        def add(row: dict[str, Any]) -> None:
            print("  ".join(f"{key} {told(value)}" for key, value in row.items()), flush=True)
            report.add(row)

        add(first_call(Shape(1, 512 if cuda else 64, HQ, H, D, M, dtype), device))
        for T in (128, 256, 512):
            add(short(Shape(1, T, HQ, H, D, M, dtype), device))
        for heads in (HQ, H):
            add(packed(Shape(1, tokens, HQ, heads, D, M, dtype), device))
        add(slices(Shape(4, tokens // 16, HQ, H, D, M, dtype), device))
    return 0


def told(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else " to ".join(map(told, value)) if isinstance(value, list) else str(value)


def ours(x: dict[str, Any], **more: Any) -> dict[str, Callable[[int], Any]]:
    """Forward alone, and forward and backward, of q, k, v, g."""
    leaves = [x[name].detach().requires_grad_() for name in "qkvg"]
    c = Contestant("ours", lambda q, k, v, g: chunk_gsa(q, k, v, None, g, **more)[0], [leaves])
    return {"forward": passes(c, False), "both": passes(c, True)}


def first_call(shape: Shape, device: torch.device) -> dict[str, Any]:
    both, times = ours(make(shape, device, 0))["both"], []
    x = torch.randn(8, device=device, requires_grad=True)
    torch.autograd.grad(x.square(), x, torch.ones_like(x))  # autograd's threads, and what torch imports (sympy) to look at a cotangent it is given
    for turn in range(4):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        both(turn)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return {"what": "first call", "shape": str(shape), "first_ms": times[0], "warm_ms": min(times), "beyond_ms": times[0] - min(times)}


def short(shape: Shape, device: torch.device) -> dict[str, Any]:
    calls, cuda = ours(make(shape, device, 0)), device.type == "cuda"
    row: dict[str, Any] = {"what": "short", "shape": str(shape), **{f"{name}_ms": ms for name, ms in alternate(calls, cuda, 0.5, cover=False).items()}}
    for name, call in calls.items() if cuda else ():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call(0)
            torch.cuda.synchronize()
        events = [event for event in profile.events() if "CUDA" in str(event.device_type)]
        row |= {f"{name}_launches": len(events), f"{name}_gpu_ms": sum(event.self_device_time_total for event in events) / 1e3}
        row |= dict(zip((f"{name}_in_a_row_ms", f"{name}_issued_ms"), map(statistics.median, zip(*(in_a_row(call, 100) for _ in range(7))))))
    return row


def in_a_row(call: Callable[[int], Any], count: int) -> tuple[float, float]:
    """ms of each of so many calls until the GPU is done, and until Python has issued them (fewer kernels than the GPU's queue holds)."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for turn in range(count):
        call(turn)
    issued = time.perf_counter()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3 / count, (issued - start) * 1e3 / count


def packed(shape: Shape, device: torch.device) -> dict[str, Any]:
    x, count = make(shape, device, 0), 32
    cuts = torch.randperm(shape.T - 1, generator=torch.Generator().manual_seed(0))[: count - 1].sort().values + 1
    random = torch.cat([torch.tensor([0]), cuts, torch.tensor([shape.T])])
    equal = torch.arange(0, shape.T + 1, shape.T // count)
    return compare("packed", shape, device, *(ours(x, cu_seqlens=bounds.to(device, torch.int32)) for bounds in (random, equal)))


def slices(shape: Shape, device: torch.device) -> dict[str, Any]:
    x = make(shape, device, 0)
    fused = torch.cat([x[name].flatten(2) for name in "qkv"], -1)
    sizes = [shape.HQ * shape.D, shape.H * shape.D, shape.H * shape.D]
    views = {name: part.unflatten(-1, (-1, shape.D)) for name, part in zip("qkv", fused.split(sizes, -1), strict=True)}
    return compare("slices", shape, device, ours({**x, **views}), ours(x))


def compare(what: str, shape: Shape, device: torch.device, these: dict[str, Any], those: dict[str, Any]) -> dict[str, Any]:
    """Median times of both, in turns, and the median and quartiles of their ratio."""
    cuda, count = device.type == "cuda", 2 if device.type == "cuda" else 1
    row: dict[str, Any] = {"what": what, "shape": str(shape)}
    for name in these:
        times = turns({"": several(these[name], count, cuda), "_else": several(those[name], count, cuda)}, cuda, 1.0)
        row |= {f"{name}{end}_ms": statistics.median(ms) / count for end, ms in times.items()}
        low, row[f"{name}_ratio"], high = statistics.quantiles((a / b for a, b in zip(*times.values())), n=4, method="inclusive")
        row[f"{name}_quartiles"] = [low, high]
    return row


if __name__ == "__main__":
    raise SystemExit(main())
