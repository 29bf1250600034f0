"""Decoding, one token for each row: ours, flash-linear-attention's recurrent kernel (where installed), and the floor, in one process.

The floor is the time to read and write every state once, and the inputs and outputs, at the copy bandwidth measured between the same calls. On a GPU a
call is one of ten, in a CUDA graph, each on states of its own ("eager": issued from Python one by one). The peer returns new states where ours are
updated in place, and is given k, v, s and g repeated to the query heads. On a CPU "in place" is x *= 1, which has no second array to fetch.
Starts no new shape after ``--seconds``. States in a pool, and prompts read into one: python -m benchmarks.pool.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.__main__ import Shape, alternate, bars, copier, make, several
from benchmarks.peer import fla, peer_version
from benchmarks.report import Report
from gsa_ext import gsa_step, testing

GPU = [
    *((B, 1, 32, 32, 128, 64) for B in (1, 16, 64, 256)), *((B, 1, 32, 8, 128, 64) for B in (1, 64, 256, 512)),
    *((B, 1, 4, 4, 512, 64) for B in (1, 128)), *((B, 1, 32, 8, 128, 128) for B in (1, 256)),
]  # fmt: skip
CPU = [(B, 1, 8, 8, 64, 64) for B in (1, 64, 512)] + [(64, 1, 32, 8, 128, 64), (64, 1, 32, 32, 128, 64)]
CALLS = 10  # in a graph


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument("--shapes", nargs="+", metavar="B,HQ,H,D,M", help="instead of the default list; D = K = V")
    parser.add_argument("--dtype", default="bfloat16", help="of q, k, v and g")
    parser.add_argument("--no-peers", action="store_true", help="ours and the floor only")
    parser.add_argument("--seconds", type=float, default=600, help="start nothing new after so many")
    parser.add_argument("--turn", type=float, default=1.5, help="seconds of measuring for each shape")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="where the JSON and the plot go")
    args = parser.parse_args()
    device = torch.device(args.device)
    listed = [(B, 1, *rest) for B, *rest in (tuple(map(int, s.split(","))) for s in args.shapes)] if args.shapes else GPU if device.type == "cuda" else CPU
    with Report(args.out, "step", device.type, args.seconds, plot, peer=peer_version()) as report:
        for numbers in listed:
            shape = Shape(*numbers, args.dtype)
            if not report.late(shape):
                report.add(step(shape, device, not args.no_peers, args.turn))
    return 0 if all(row["correct"] for row in report.rows) else 1


def step(shape: Shape, device: torch.device, peers: bool, seconds: float) -> dict[str, Any]:
    """All contestants on one shape."""
    cuda = device.type == "cuda"
    B, _, HQ, H, D, M, dtype = shape
    inputs = [{name: t[:, 0] for name, t in make(shape, device, seed).items()} for seed in range(4)]
    element = inputs[0]["q"].element_size()
    io = B * (2 * HQ * D + 2 * H * D + H * M) * element
    nbytes = {"ours": 2 * 4 * 2 * B * H * M * D + io, "ours, bf16 state": 2 * 2 * 2 * B * H * M * D + io}
    calls: dict[str, Callable[[int], Any]] = {}
    per_call: dict[str, int] = {}

    def states(width: torch.dtype, heads: int = H) -> list[tuple[torch.Tensor, torch.Tensor]]:
        sets = min(CALLS, max(2, math.ceil(6e9 / (4 * 2 * B * heads * M * D)))) if cuda else 1
        return [(torch.randn(B, heads, D, M, device=device, dtype=width), torch.randn(B, heads, M, D, device=device, dtype=width)) for _ in range(sets)]

    def add(name: str, call: Callable[[int], Any]) -> None:
        per_call[name] = CALLS
        calls[name] = several(call, CALLS, cuda)

    def ours(held: list[tuple[torch.Tensor, torch.Tensor]]) -> Callable[[int], Any]:
        def call(turn: int) -> None:
            x = inputs[turn % len(inputs)]
            gsa_step(x["q"], x["k"], x["v"], None, x["g"], held[turn % len(held)])

        return call

    with torch.no_grad():
        fp32 = states(torch.float32)
        add("ours", ours(fp32))
        if dtype != "float32":
            add("ours, bf16 state", ours(states(torch.bfloat16)))
        if cuda:
            eager = ours(fp32)

            def ten(turn: int) -> None:
                for i in range(CALLS):
                    eager(i)

            calls["eager"], per_call["eager"] = ten, CALLS
        if cuda and peers and fla() is not None:
            wide = [{n: (t if n == "q" else t.repeat_interleave(HQ // H, 1))[:, None] for n, t in x.items()} for x in inputs]
            for x in wide:
                x["s"] = -torch.expm1(x["g"].float()).to(x["g"])
            held = states(torch.float32, HQ)
            written: dict[int, Any] = {}  # its new states in memory of their own: else the calls of a graph all write to one place, which may stay in the cache

            def theirs(turn: int) -> None:
                x, state = wide[turn % len(wide)], held[turn % len(held)]
                written[turn % len(held)] = fla().fused_recurrent_gsa(
                    x["q"], x["k"], x["v"], x["s"], x["g"], scale=D**-0.5, initial_state=state, output_final_state=True)

            add("fla", theirs)

        copy, copied = copier(device)
        calls["copy"], per_call["copy"] = copy, 1
        if not cuda:
            array = torch.ones(copied // 8)
            calls["in place"], per_call["in place"] = lambda turn: array.mul_(1.0), 1
        ms = {name: value / per_call[name] for name, value in alternate(calls, cuda, seconds, cover=False).items()}
    bandwidth = {name: copied / ms.pop(name) * 1e3 for name in ("copy", "in place") if name in ms}
    floor = {name: n / bandwidth["copy"] * 1e3 for name, n in nbytes.items() if name in ms}
    x = testing.make_inputs(min(B, 2), 20, HQ // H, 1, D, D, M, dtype=getattr(torch, dtype), device=device)
    checked = testing.compare(testing.stepwise, x, gradients=False)
    row = {
        "shape": str(shape), **shape._asdict(), "what": "step", "ms": ms, "floor_ms": floor, "GBps": {name: b / 1e9 for name, b in bandwidth.items()},
        "percent_of_copy": {name: 100 * floor[name] / ms[name] for name in floor}, "speedup": {"fla": ms["fla"] / ms["ours"]} if "fla" in ms else {},
        "errors": {r.name: r.error for r in checked}, "correct": all(r.ok for r in checked),
    }  # fmt: skip
    show(row)
    return row


def show(row: dict[str, Any]) -> None:
    times = "  ".join(f"{name} {1e3 * ms:.1f}" for name, ms in row["ms"].items())
    percent = "  ".join(f"{name} {value:.0f} %" for name, value in row["percent_of_copy"].items())
    ratio = "".join(f"; {value:.1f}x {name}" for name, value in row["speedup"].items())
    worst = max(row["errors"], key=row["errors"].__getitem__)
    print(f"{row['shape']:<32} us: {times}  floor {1e3 * row['floor_ms']['ours']:.1f} ({', '.join(f'{n} {b:.0f} GB/s' for n, b in row['GBps'].items())})")
    print(f"{'':<32} of copy bandwidth: {percent}{ratio}; error {worst} {row['errors'][worst]:.1e}{'' if row['correct'] else '  WRONG'}", flush=True)


def plot(rows: list[dict[str, Any]], about: dict[str, str], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(max(8, 0.9 * len(rows)), 4.5))
    title = f"one token, {about.get('cuda:0', about['cpu']).split(',')[0]}, torch {torch.__version__}"
    bars(axis, rows, lambda row, name: 1e3 * (row["floor_ms"]["ours"] if name == "floor" else row["ms"].get(name, math.nan)), "us", title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
