"""Time of forward and backward against T: ours, flash-linear-attention (where installed), softmax attention, and the floor.

    python -m benchmarks.lengths [--heads 32,32 32,8] [--lengths 512 ... 131072]

B is 1 throughout: one sequence that grows, as a context does. So the work grows with T (linearly but for softmax attention) and, where T is small, the GPU
is not full, which a batch that makes up for T would hide. s and g are given; the peer and softmax attention get k, v (s, g) repeated to the query heads
beforehand. They take turns as in python -m benchmarks, which also compares the results of ours with fp64; medians, of three turns where a call is slow.
They are times of the GPU, without what Python needs to issue a call: short ones take longer by themselves. Whoever would take more than a second a call, by
the last length and the growth up to it, is not run, and the figure says so.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.__main__ import Shape, contestants, copier, passes, steady, traffic
from benchmarks.peer import peer_version
from benchmarks.report import Report

NAMES = {"ours": "ours", "ours, s given": "ours", "fla": "flash-linear-attention", "cudnn": "cuDNN attention", "sdpa": "SDPA"}
COLOURS = {"ours": "C3", "flash-linear-attention": "C0", "cuDNN attention": "C2", "SDPA": "C2", "floor": "grey"}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lengths", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument("--heads", nargs="+", metavar="HQ,H", help="one panel each; default: 32,32 and 32,8; on the CPU 8,8 and 8,2")
    parser.add_argument("--dims", metavar="D,M", help="default: 128,64; on the CPU 64,64")
    parser.add_argument("--lengths", nargs="+", type=int, help="default: 512 to 128 Ki in powers of two; on the CPU to 8 Ki")
    parser.add_argument("--limit", type=float, default=1000, help="ms; what would take longer for a call is not run")
    parser.add_argument("--turn", type=float, default=0.5, help="seconds of measuring for each length")
    parser.add_argument("--seconds", type=float, default=600, help="start nothing new after so many")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="where the JSON and the plot go")
    args = parser.parse_args()
    device = torch.device(args.device)
    cuda = device.type == "cuda"
    D, M = map(int, (args.dims or ("128,64" if cuda else "64,64")).split(","))
    lengths = sorted(args.lengths or (2**i for i in range(9, 18 if cuda else 14)))
    wanted = ["ours, s given" if cuda else "ours", "fla", "cudnn" if cuda else "sdpa"]
    with Report(args.out, "lengths", device.type, args.seconds, plot, peer=peer_version()) as report:
        for heads in args.heads or (("32,32", "32,8") if cuda else ("8,8", "8,2")):
            HQ, H = map(int, heads.split(","))
            before: list[dict[str, Any]] = []
            for T in lengths:
                shape = Shape(1, T, HQ, H, D, M, "bfloat16" if cuda else "float32")
                if report.late(shape):
                    continue
                slow = {name: ms for name in wanted if (ms := expected(before, NAMES[name], T)) > args.limit}
                row = measure(shape, device, [name for name in wanted if name not in slow], args.turn)
                row["notes"] += [f"{NAMES[name]} not run: some {ms / 1e3:.1f} s a call expected" for name, ms in slow.items()]
                show(row)
                report.add(row)
                before.append(row)
    return 0


def expected(rows: list[dict[str, Any]], name: str, T: int) -> float:
    """ms of a call at T, from the last two lengths that have been measured; 0 where fewer have."""
    known = [(row["T"], row["ms"][name]) for row in rows if name in row["ms"]][-2:]
    if len(known) < 2:
        return 0.0
    (T0, first), (T1, last) = known
    return last * (T / T1) ** max(1.0, math.log(last / first) / math.log(T1 / T0))


def measure(shape: Shape, device: torch.device, names: list[str], seconds: float) -> dict[str, Any]:
    entries, notes = contestants(shape, device, True, names)
    copy, copied = copier(device)
    ms, clocks = steady({**{NAMES[c.name]: passes(c, True) for c in entries}, "copy": copy}, device.type == "cuda", seconds)
    bandwidth = copied / ms.pop("copy") * 1e3
    ms["floor"] = traffic(shape)["forward+backward"] / bandwidth * 1e3
    return {"shape": str(shape), **shape._asdict(), "what": "forward+backward", "ms": ms, "copy_GBps": bandwidth / 1e9, "notes": notes, "clocks": clocks}


def show(row: dict[str, Any]) -> None:
    times = "  ".join(f"{name} {ms:.3f}" for name, ms in row["ms"].items())
    print(f"{row['shape']:<36} ms: {times}{'; ' + '; '.join(row['notes']) if row['notes'] else ''}", flush=True)


def in_short(T: int) -> str:
    return f"{T // 1024}K" if T % 1024 == 0 else str(T)


def plot(rows: list[dict[str, Any]], about: dict[str, str], path: Path) -> None:
    """A panel for each number of heads, both axes logarithmic, the name of each line at its end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = list(dict.fromkeys((row["HQ"], row["H"]) for row in rows))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(6.4 * len(panels), 5), squeeze=False, sharey=True)
    for axis, heads in zip(axes[0], panels):
        chosen = sorted((row for row in rows if (row["HQ"], row["H"]) == heads), key=lambda row: row["T"])
        lengths, ends = [row["T"] for row in chosen], []
        for name in dict.fromkeys(name for row in chosen for name in row["ms"]):
            points = [(row["T"], row["ms"][name]) for row in chosen if name in row["ms"]]
            marker, style = ("", "--") if name == "floor" else ("o", "-")
            axis.plot(*zip(*points), color=COLOURS[name], marker=marker, linestyle=style, markersize=4)
            ends.append((points[-1], name))
        low, high = (f(ms for row in rows for ms in row["ms"].values()) for f in (min, max))
        step, below = (high / low) ** 0.055, 0.0
        for (T, ms), name in sorted(ends, key=lambda end: end[0][1]):  # labels keep apart
            below = max(ms, below * step)
            axis.annotate(f"{name} {ms:.3g} ms", (T, ms), (T * 1.2, below), color=COLOURS[name], fontsize=8, va="center", annotation_clip=False)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(lengths, [in_short(T) for T in lengths])
        axis.set_xlabel("T, tokens in the sequence (B = 1)")
        axis.set_title(f"{heads[0]} query heads, {heads[1]} key/value heads, D {chosen[0]['D']}, M {chosen[0]['M']}, {chosen[0]['dtype']}", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
        notes = [f"{in_short(row['T'])}: {note}" for row in chosen for note in row["notes"]]
        axis.text(0.98, 0.02, "\n".join(notes), transform=axis.transAxes, fontsize=7, ha="right", color="grey")
    axes[0, 0].set_ylabel("forward + backward, ms")
    figure.suptitle(f"{about.get('cuda:0', about['cpu']).split(',')[0]}, torch {torch.__version__}", fontsize=10)
    figure.tight_layout(w_pad=8)
    figure.savefig(path, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    sys.exit(main())
