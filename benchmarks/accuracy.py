"""Accuracy beside the peer: the error of every output and gradient against fp64, at the heads, dimensions and slots of every shape of the table.

    python -m benchmarks.accuracy [--taus 8 1 0.1] [--shapes B,T,HQ,H,D,M ...] [--states]

An error is the relative RMS over a whole tensor. Ours and flash-linear-attention (where installed) get the same rounded q, k, v, s and g, with
g = logsigmoid(N(0, 1)) / tau and s = 1 - exp(g) rounded like the rest, and the same rounded cotangent; the truth is the recurrence in fp64 on those values
(testing.vectorised_gsa, on the same device). Sequences are of 512 tokens, eight chunks of 64, whatever T the table has: fp64 is costly, and these gates
forget sooner. B stays, as the peer tunes its kernels for each B, number of heads and dimension, and not for each T: what it found for the table serves
here. It repeats k, v, s and g to the query heads; the gradients of a group are added up in fp32 and not rounded again, which flatters it.

Ours is measured with every set of kernels that GSA_KERNELS knows, as which runs by itself depends on B, T and the number of heads. What is asked: every
result at or below the peer's, and dg at tau 0.1 at or below 7e-3, half of what the best published kernels had; "OVER" marks what is not.

``--states`` adds an initial state with its gradient and the final state, for which the peer tunes kernels that the table does not need.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.__main__ import CPU, GPU, Shape, kernels
from benchmarks.peer import fla, peer_version
from benchmarks.report import Report
from gsa_ext import chunk_gsa, testing

Errors = dict[str, float]
HALF = 7e-3  # of dg at tau = 0.1


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument("--shapes", nargs="+", metavar="B,T,HQ,H,D,M", help="instead of the table's; D = K = V")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--taus", nargs="+", type=float, default=list(testing.PEER), help="of the gates")
    parser.add_argument("--tokens", type=int, default=512, help="the most in a sequence")
    parser.add_argument("--states", action="store_true", help="initial and final states, too")
    parser.add_argument("--tf32", action="store_true", help="allow TF32 for fp32 inputs on CUDA")
    parser.add_argument("--no-peers", action="store_true", help="ours only")
    parser.add_argument("--seconds", type=float, default=600, help="start nothing new after so many")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="where the JSON goes")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = args.tf32
    listed = [tuple(map(int, s.split(","))) for s in args.shapes] if args.shapes else GPU if device.type == "cuda" else CPU
    shapes: dict[tuple[Any, ...], Shape] = {}
    for dtype, (B, T, *rest) in itertools.product(args.dtypes, listed):
        shapes.setdefault((*rest, dtype), Shape(B, min(T, args.tokens), *rest, dtype))
    work = list(itertools.product(shapes.values(), args.taus))
    with Report(args.out, "accuracy", device.type, args.seconds, None, peer=peer_version()) as report:
        print("errors in 1e-3: the worst of ours / the peer's", flush=True)
        for i, (shape, tau) in enumerate(work, 1):
            if not report.late((str(shape), tau)):
                row = measure(shape, tau, device, not args.no_peers, args.states)
                report.add(row)
                show(row, f"{i}/{len(work)}")
    over = sum(len(row["over"]) for row in report.rows)
    print(f"{len(report.rows)} of {len(work)} rows, {over} results over what is asked")
    return 1 if over or len(report.rows) < len(work) else 0


def measure(shape: Shape, tau: float, device: torch.device, peers: bool, states: bool) -> dict[str, Any]:
    B, T, HQ, H, D, M, dtype = shape
    x = testing.make_inputs(B, T, HQ, H, D, D, M, gate=tau, dtype=getattr(torch, dtype), device=device, initial_state=states, scale=D**-0.5)
    x["s"] = -torch.expm1(x["g"].float()).to(x["g"])
    truth = testing.results(outputs(testing.vectorised_gsa, states), x, double=True, device=device)

    def errors(op: testing.Op, x: testing.Inputs) -> Errors:
        got = testing.results(outputs(op, states), x)
        return {name: testing.error(got[name], want) for name, want in truth.items()}

    ours = {}
    for name in ("hopper", "segments", "parts", "few", "portable") if device.type == "cuda" else ("",):
        with kernels(name):
            ours[name or "ours"] = errors(chunk_gsa, x)
    theirs = errors(repeated, {**x, **{name: x[name].float() for name in "kvsg"}}) if peers and device.type == "cuda" and fla() is not None else {}
    worst = {name: max(e[name] for e in ours.values()) for name in truth}
    asked = {**theirs, "dg": min(theirs.get("dg", HALF), HALF)} if tau == 0.1 else theirs
    over = [f"{name} ({which})" for name in asked for which, found in ours.items() if found[name] > asked[name]]
    return {"shape": str(shape), **shape._asdict(), "tau": tau, "errors": {**ours, **({"fla": theirs} if theirs else {})}, "worst": worst, "over": over}


def outputs(op: testing.Op, states: bool) -> testing.Op:
    """``op`` without final states (a cotangent of which is part of every gradient), unless they are asked for."""
    return op if states else lambda **x: (op(**{**x, "output_final_state": False})[0], None)


def repeated(q, k, v, s, g, scale, initial_state=None, output_final_state=False):
    """The peer on repeated heads. k, v, s and g are rounded values in fp32, so that the gradients of a group are added up in fp32."""
    r = q.shape[2] // k.shape[2]
    inputs = (x.repeat_interleave(r, 2).to(q.dtype) for x in (k, v, s, g))
    initial = None if initial_state is None else tuple(x.repeat_interleave(r, 1) for x in initial_state)
    o, final = fla().chunk_gsa(q, *inputs, scale=scale, initial_state=initial, output_final_state=output_final_state)
    return o, tuple(x[:, ::r] for x in final) if output_final_state else None


def show(row: dict[str, Any], progress: str) -> None:
    theirs = row["errors"].get("fla", {})
    told: Callable[[str], str] = lambda name: f"{1e3 * row['worst'][name]:.2f}" + (f"/{1e3 * theirs[name]:.2f}" if name in theirs else "")  # noqa: E731
    over = f"  OVER: {', '.join(row['over'])}" if row["over"] else ""
    print(f"{progress:>6} {row['shape']:<30} tau {row['tau']:<4g} {'  '.join(f'{name} {told(name)}' for name in row['worst'])}{over}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
