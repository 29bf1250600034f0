"""A pool of states, as a server keeps it: prompts read into its rows, and tokens decoded from them, against the same without a pool.

"in order": sequence n has state n. "pool": rows of a pool, in place (``state_indices``). "indexing": what one does without: the rows taken out with one
index operation, the call, the rows put back with another. "pool in bf16": the same with half the bytes. Each on the kernels that run by themselves
and, on a GPU, on the portable ones; there a call is one of several in a CUDA graph. Results of the pool are compared with those in order, bit for bit.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.__main__ import Shape, alternate, copier, kernels, make, several
from benchmarks.report import Report
from gsa_ext import chunk_gsa, gsa_step

State = tuple[torch.Tensor, torch.Tensor]
Lengths = list[int] | tuple[int, int]  # of packed sequences; tokens alone are a step. Or B, T
GPU: list[tuple[Lengths, int, int, int, int]] = [  # .., HQ, H, D, M
    ([1024] * 16, 32, 8, 128, 64), ([2048] * 8, 32, 8, 128, 64), ([4096] * 4, 32, 32, 128, 64), ([64] * 32 + [2048], 32, 8, 128, 64),
    ([1] * 56 + [256] * 8, 32, 8, 128, 64), ((4, 4096), 32, 8, 128, 64), ((1, 16384), 32, 32, 128, 64), ((1, 16384), 32, 8, 128, 128),
    ((16, 2048), 4, 4, 512, 64), ([2048] * 16, 4, 4, 512, 64), ([1] * 64, 32, 8, 128, 64), ([1] * 256, 32, 8, 128, 64), ([1] * 64, 32, 32, 128, 64),
    ([1] * 128, 4, 4, 512, 64),
]  # fmt: skip
CPU: list[tuple[Lengths, int, int, int, int]] = [([256] * 4, 8, 8, 64, 64), ([1] * 28 + [64] * 4, 8, 2, 64, 64), ([1] * 64, 8, 8, 64, 64)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pool", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument("--seconds", type=float, default=300, help="start nothing new after so many")
    parser.add_argument("--turn", type=float, default=1.0, help="seconds of measuring for each row")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="where the JSON and the plot go")
    args = parser.parse_args()
    device = torch.device(args.device)
    with Report(args.out, "pool", device.type, args.seconds, plot) as report, torch.no_grad():
        for which, *heads in GPU if device.type == "cuda" else CPU:
            packed = isinstance(which, list)
            lengths = which if isinstance(which, list) else [which[1]] * which[0]
            for name in ("", "portable") if device.type == "cuda" and max(lengths) > 1 else ("",):
                if not report.late((len(lengths), heads, name)):
                    with kernels(name):
                        report.add(measure(lengths, packed, *heads, name, device, args.turn))
    return 0 if all(row["equal"] for row in report.rows) else 1


def measure(lengths: list[int], packed: bool, HQ: int, H: int, D: int, M: int, which: str, device: torch.device, seconds: float) -> dict[str, Any]:
    cuda, N, step = device.type == "cuda", len(lengths), max(lengths) == 1
    P, T, times = N + N // 4 + 1, sum(lengths), 10 if step else 4
    x = make(Shape(1, T, HQ, H, D, M, "bfloat16") if packed else Shape(N, T // N, HQ, H, D, M, "bfloat16"), device, 0)
    cu = torch.tensor([0, *lengths], device=device).cumsum(0) if packed else None
    where = torch.randperm(P, device=device)[:N]
    sets = times if step else 1                                              # of a step's states, so that they do not stay in the cache

    def states(rows: int, dtype: torch.dtype = torch.float32) -> list[State]:
        return [(torch.randn(rows, H, D, M, device=device).to(dtype), torch.randn(rows, H, M, D, device=device).to(dtype)) for _ in range(sets)]

    def op(state: State, rows: torch.Tensor | None) -> tuple[torch.Tensor, Any]:
        if step:
            token = (x[name][0] for name in "qkv")
            return gsa_step(*token, None, x["g"][0], state, state_indices=rows), state
        return chunk_gsa(x["q"], x["k"], x["v"], None, x["g"], initial_state=state, output_final_state=True, cu_seqlens=cu, state_indices=rows)

    def indexing(pool: State) -> None:
        final = op((pool[0][where], pool[1][where]), None)[1]
        for t, new in zip(pool, final):
            t.index_copy_(0, where, new)

    held = {"in order": states(N), "pool": states(P), "pool in bf16": states(P, torch.bfloat16)}
    fresh = tuple(t.clone() for t in held["pool"][0])
    start = (fresh[0][where], fresh[1][where])
    o, final = op(start, None)
    pool = (fresh[0].clone(), fresh[1].clone())
    equal = torch.equal(o, op(pool, where)[0]) and all(torch.equal(t[where], new) for t, new in zip(pool, final))
    calls: dict[str, Callable[[int], Any]] = {
        "in order": lambda i: op(held["in order"][i % sets], None), "pool": lambda i: op(held["pool"][i % sets], where),
        "indexing": lambda i: indexing(held["pool"][i % sets]), "pool in bf16": lambda i: op(held["pool in bf16"][i % sets], where),
    }  # fmt: skip
    turns = {name: several(call, times, cuda) for name, call in calls.items()}
    ms = alternate({**turns, "copy": copier(device)[0]}, cuda, seconds, cover=False)
    ms = {name: ms[name] / times for name in calls}
    what = f"{N} tokens" if step else f"{N} x {lengths[0]}" if len(set(lengths)) == 1 else " + ".join(f"{lengths.count(n)} x {n}" for n in sorted(set(lengths)))
    what += "" if packed else ", not packed"
    row = {
        "what": "step" if step else "chunk_gsa", "shape": f"{what}, {HQ}/{H} D{D} M{M}", "kernels": which or "automatic",
        "lengths": lengths, "packed": packed, "HQ": HQ, "H": H, "D": D, "M": M, "ms": ms, "equal": equal,
        "slower_percent": {name: 100 * value / ms["in order"] - 100 for name, value in ms.items() if name != "in order"},
    }  # fmt: skip
    more = "  ".join(f"{name} {value:+.1f} %" for name, value in row["slower_percent"].items())
    print(f"{row['shape']:<42} {row['kernels']:<10} us: {'  '.join(f'{name} {1e3 * value:.1f}' for name, value in ms.items())}; than in order: {more}"
          f"{'' if equal else '  DIFFERENT BITS'}", flush=True)
    return row


def plot(rows: list[dict[str, Any]], about: dict[str, str], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(max(8, 1.1 * len(rows)), 4.5))
    names = list(rows[0]["ms"])
    for i, name in enumerate(names):
        axis.bar([x + 0.2 * i for x in range(len(rows))], [row["ms"][name] / row["ms"]["in order"] for row in rows], 0.2, label=name)
    axis.axhline(1.03, color="grey", linewidth=0.8, linestyle="--")
    axis.set_ylabel("time, in order = 1")
    axis.set_xticks([x + 0.3 for x in range(len(rows))], [f"{row['shape']}, {row['kernels']}" for row in rows], rotation=25, ha="right", fontsize=7)
    axis.set_title(f"states in a pool, {about.get('cuda:0', about['cpu']).split(',')[0]}, torch {torch.__version__}", fontsize=10)
    axis.legend()
    axis.grid(axis="y", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
