"""One run, one process: ours, flash-linear-attention's Triton kernels (where installed), softmax attention, and the floor.

The contestants take turns, on inputs that rotate through more memory than the caches hold; medians are printed. On a GPU they are times of the
GPU: it is kept busy while Python issues a call. There a turn is a tenth of a second of calls that do not count and then half as long of calls that do: who
follows softmax attention of a long sequence would otherwise be measured at the clocks which that left behind (power). The file says clocks and power of
each, as nvidia-smi sees them. The floor is the time to read every input once and write every output once (k, v and g once per key/value head) at the copy
bandwidth measured in the same turns. The results that are timed are compared with fp64 in the same run. Ratios of one run are what counts: figures move by a
tenth from run to run.

Memory (CUDA): the most that was allocated during a call, less what was allocated before it (inputs, cotangent, kernels' lasting buffers): "beyond inputs".
Less the bytes of the gradients of all inputs as well: "beyond inputs and gradients", what a training step needs more than it must; the output, and what is
kept for backward, count. The peer's inputs and gradients are its own, with k, v, s and g at the width of the query heads. "level 0" and "level 1" are ours
with that checkpoint_level, the others have the default, 2.

fp32 inputs on CUDA: torch's default is fp32 arithmetic; ``--tf32`` sets torch.backends.cuda.matmul.allow_tf32, which is what ours goes by. The peer's
Triton kernels multiply fp32 inputs in TF32 either way. Errors then have to be below 3e-3, as in the tests. cuDNN attention has no fp32.

Accuracy beside the peer: python -m benchmarks.accuracy; time against T: benchmarks.lengths; packed, sliced and short inputs: benchmarks.edges; decoding:
benchmarks.step.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.peer import PEER, fla, peer_version
from gsa_ext import chunk_gsa, testing
from gsa_ext.cli.info import facts


class Shape(NamedTuple):
    B: int
    T: int
    HQ: int
    H: int
    D: int  # K = V
    M: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.B}x{self.T} {self.HQ}/{self.H} D{self.D} M{self.M} {self.dtype}"


GPU = [
    (4, 4096, 32, 32, 128, 64), (4, 4096, 32, 8, 128, 64), (4, 4096, 32, 32, 128, 128), (4, 4096, 32, 8, 128, 128),
    (8, 2048, 32, 32, 128, 64), (1, 16384, 32, 32, 128, 64), (1, 65536, 32, 32, 128, 64), (1, 65536, 32, 8, 128, 64), (8, 4096, 16, 16, 64, 64),
    (16, 2048, 4, 4, 512, 64), (4, 4096, 4, 4, 512, 64),
]  # fmt: skip
CPU = [(1, T, 8, 8, 64, 64) for T in (1024, 2048, 4096, 8192, 16384, 32768)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument("--shapes", nargs="+", metavar="B,T,HQ,H,D,M", help="instead of the default list; D = K = V")
    parser.add_argument("--dtypes", nargs="+", default=None, help="default: bfloat16 on CUDA, float32 and bfloat16 on the CPU")
    parser.add_argument("--quick", action="store_true", help="the first shapes only")
    parser.add_argument("--no-peers", action="store_true", help="ours and the floor only")
    parser.add_argument("--tf32", action="store_true", help="allow TF32 for fp32 inputs on CUDA")
    parser.add_argument("--turn", type=float, default=3.0, help="seconds of measuring for each row")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="where the JSON and the plot go")
    args = parser.parse_args()
    device = torch.device(args.device)
    cuda = device.type == "cuda"
    torch.backends.cuda.matmul.allow_tf32 = args.tf32

    shapes = [tuple(map(int, s.split(","))) for s in args.shapes] if args.shapes else (GPU if cuda else CPU)
    shapes = shapes[: 4 if cuda else 3] if args.quick else shapes
    dtypes = args.dtypes or (["bfloat16"] if cuda else ["float32", "bfloat16"])
    about = {**provenance(), "peer": peer_version()}
    for name, value in about.items():
        print(f"{name:<14}{value}")
    print()

    rows: list[dict[str, Any]] = []
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / f"{device.type}-{time.strftime('%Y%m%d-%H%M%S')}"
    for dtype in dtypes:
        for numbers in shapes:
            rows += sequence(Shape(*numbers, dtype), device, not args.no_peers, args.turn)
            stem.with_suffix(".json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    plot(rows, about, stem.with_suffix(".png"))
    print(f"\nwritten: {stem}.json, {stem}.png")
    wrong = [row for row in rows if not row["correct"]]
    for row in wrong:
        print(f"WRONG: {row['shape']} {row['what']}: {row['errors']}")
    return 1 if wrong else 0


# ---------------------------------------------------------------------------------------------------------------------- contestants


class Contestant(NamedTuple):
    name: str
    forward: Callable[..., torch.Tensor]  # of the leaves
    leaves: list[list[torch.Tensor]]  # one list for each set of inputs
    kernels: str = ""  # GSA_KERNELS: which of ours


@contextlib.contextmanager
def kernels(name: str) -> Iterator[None]:
    """Calls in here run ours as GSA_KERNELS=name would."""
    before = os.environ.get("GSA_KERNELS")
    os.environ["GSA_KERNELS"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["GSA_KERNELS"]
        else:
            os.environ["GSA_KERNELS"] = before


def contestants(shape: Shape, device: torch.device, peers: bool, names: Collection[str] | None = None) -> tuple[list[Contestant], list[str]]:
    """Who can run this shape (of these names), and a note on each who cannot."""
    cuda = device.type == "cuda"
    sets = min(8, max(2, math.ceil(256e6 / traffic(shape)["forward"]))) if cuda else 2
    inputs = [make(shape, device, seed) for seed in range(sets)]
    r, found, notes = shape.HQ // shape.H, [], []

    def leaves(names: str, wide: bool = False, heads_first: bool = False) -> list[list[torch.Tensor]]:
        out = []
        for x in inputs:
            tensors = [x[n].repeat_interleave(r, 2) if wide and n != "q" else x[n] for n in names]
            out.append([(t.transpose(1, 2).contiguous() if heads_first else t).detach().requires_grad_() for t in tensors])
        return out

    def add(name: str, forward: Callable[..., torch.Tensor], of: Callable[[], list[list[torch.Tensor]]], which: str = "", may_refuse: bool = False) -> None:
        if names is not None and name not in names:
            return
        c = Contestant(name, forward, of(), which)
        if may_refuse:
            try:
                passes(c, True)(0)
            except Exception as error:  # each has its own
                notes.append(f"{name} refuses: {str(error).partition(chr(10))[0]}")
                return
        found.append(c)

    add("ours", lambda q, k, v, g: chunk_gsa(q, k, v, None, g)[0], lambda: leaves("qkvg"))
    if not peers:
        return found, notes
    if cuda:
        for x in inputs:
            x["s"] = -torch.expm1(x["g"].float()).to(x["g"])
        given = leaves("qkvsg")  # s too: as the peer needs it
        for level, name in ((2, "ours"), (1, "level 1"), (0, "level 0")):
            add(f"{name}, s given", lambda q, k, v, s, g, level=level: chunk_gsa(q, k, v, s, g, checkpoint_level=level)[0], lambda: given)
        add("portable, s given", lambda q, k, v, s, g: chunk_gsa(q, k, v, s, g)[0], lambda: given, "portable")
        if fla() is not None:
            # it repeats k, v, s and g to the query heads; that is done beforehand and not timed
            theirs = lambda q, k, v, s, g: fla().chunk_gsa(q, k, v, s, g, scale=shape.D**-0.5)[0]  # noqa: E731
            add("fla", theirs, lambda: leaves("qkvsg", wide=True), may_refuse=True)
        else:
            notes.append(f"{PEER} is absent")
    if shape.D <= 256:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if cuda else contextlib.nullcontext():
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        add("cudnn" if cuda else "sdpa", attention, lambda: leaves("qkv", wide=True, heads_first=True), may_refuse=cuda)
    return found, notes


def make(shape: Shape, device: torch.device, seed: int) -> dict[str, Any]:
    """Random tensors made where they are used."""
    generator = torch.Generator(device).manual_seed(seed)
    B, T, HQ, H, D, M, dtype = shape

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device).to(getattr(torch, dtype))

    return {"q": normal(B, T, HQ, D), "k": normal(B, T, H, D), "v": normal(B, T, H, D), "g": F.logsigmoid(normal(B, T, H, M)) / 8}


# ---------------------------------------------------------------------------------------------------------------------- measuring


def passes(c: Contestant, train: bool) -> Callable[[int], Any]:
    """A call of ``c`` on the inputs whose turn it is: forward alone, or with backward; returns the gradients."""
    cotangent = torch.randn_like(c.leaves[0][0])  # o has the shape of q

    def call(turn: int) -> Any:
        leaves = c.leaves[turn % len(c.leaves)]
        with kernels(c.kernels) if c.kernels else contextlib.nullcontext(), torch.set_grad_enabled(train):
            o = c.forward(*leaves)
            return torch.autograd.grad(o, leaves, cotangent) if train else None

    return call


def traffic(shape: Shape) -> dict[str, int]:
    """Bytes of the floor: every input read once and every output written once, forward, and forward and backward."""
    B, T, HQ, H, D, M, dtype = shape
    width = getattr(torch, dtype).itemsize
    q, kv, g = (B * T * n * width for n in (HQ * D, 2 * H * D, H * M))
    return {"forward": 2 * q + kv + g, "forward+backward": (2 * q + kv + g) + (3 * q + 2 * kv + 2 * g)}


def peak(call: Callable[[int], Any]) -> tuple[float, float]:
    """MiB at the peak of a call on a GPU beyond what was allocated before it, and the same less the gradients that it returns."""
    call(0)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients = call(0) or ()
    torch.cuda.synchronize()
    beyond = torch.cuda.max_memory_allocated() - before
    return beyond / 2**20, (beyond - sum(x.numel() * x.element_size() for x in gradients)) / 2**20


def several(call: Callable[[int], Any], times: int, cuda: bool) -> Callable[[int], Any]:
    """A turn of ``times`` calls; on a GPU they are one CUDA graph, which keeps what ``call`` holds."""
    if not cuda:
        return lambda turn: [call(i) for i in range(times)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(3):
            call(i)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(times):
            call(i)

    def replay(turn: int, keep: Any = call) -> None:  # whatever the graph reads and writes must stay
        graph.replay()

    return replay


def alternate(calls: dict[str, Callable[[int], Any]], cuda: bool, seconds: float, cover: bool = True) -> dict[str, float]:
    """Median ms of each call, called in turns with the number of the turn."""
    return {name: statistics.median(values) for name, values in turns(calls, cuda, seconds, cover).items()}


def timed(call: Callable[[int], Any], turn: int, cuda: bool, busy: Callable[[int], Any] | None) -> float:
    """ms of a call; busy: called before it."""
    if not cuda:
        start = time.perf_counter()
        call(turn)
        return (time.perf_counter() - start) * 1e3
    a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if busy:
        busy(turn)
    a.record()
    call(turn)
    b.record()
    b.synchronize()
    return a.elapsed_time(b)


def turns(calls: dict[str, Callable[[int], Any]], cuda: bool, seconds: float, cover: bool = True) -> dict[str, list[float]]:
    """ms of each call in each turn. cover: a copy of half a millisecond keeps the GPU busy while Python issues the call, which then is timed as in a stream of
    others: the time on the GPU alone, with cold caches; else with the time until its first kernel starts."""
    busy = copier(torch.device("cuda"))[0] if cuda and cover else None
    times: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    turn = -2 if cuda else -1  # turns to warm up
    while turn < 3 or (turn < 30 and time.perf_counter() - began < seconds):
        for name, call in calls.items():
            elapsed = timed(call, turn, cuda, busy)
            if turn >= 0:
                times[name].append(elapsed)
        turn += 1
        if turn >= 1 and time.perf_counter() - began > 20 * seconds:  # one turn of something very slow
            break
    return times


SETTLE = 0.1  # seconds: after softmax attention of 65536 tokens an H200 needs some 0.05 to be at the clocks of what it does now


def steady(calls: dict[str, Callable[[int], Any]], cuda: bool, seconds: float) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Median ms of each call in turns of its own, at the clocks of its own (CPU: as ``alternate``); and the clocks, MHz, and the power, W, of each."""
    if not cuda:
        return alternate(calls, cuda, seconds), {}
    busy = copier(torch.device("cuda"))[0]
    times: dict[str, list[float]] = {name: [] for name in calls}
    spans: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    began, number = time.time(), 0
    with Clocks() as clocks:
        for rounds in range(1, 31):
            for name, call in calls.items():
                start = time.time()
                while time.time() < start + SETTLE:
                    timed(call, number := number + 1, cuda, busy)
                counted = time.time()
                while not times[name] or time.time() < counted + SETTLE / 2:
                    times[name].append(timed(call, number := number + 1, cuda, busy))
                spans[name].append((counted, time.time()))
            if time.time() > began + seconds and rounds >= 3:
                break
    return {name: statistics.median(values) for name, values in times.items()}, {name: found for name in calls if (found := clocks.during(spans[name]))}


class Clocks:
    """What nvidia-smi says of the current device while the ``with`` lasts, every 20 ms. Without nvidia-smi: nothing."""

    def __enter__(self) -> Clocks:
        which = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        command = ["nvidia-smi", f"--id=GPU-{which}", "--query-gpu=timestamp,clocks.sm,power.draw.instant", "--format=csv,noheader,nounits", "-lms", "20"]
        self.file = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(command, stdout=self.file, stderr=subprocess.DEVNULL) if shutil.which(command[0]) else None
        return self

    def __exit__(self, *error: Any) -> None:
        if self.process:
            self.process.terminate()
            self.process.wait()
        self.file.seek(0)
        self.samples = []
        for line in self.file:
            with contextlib.suppress(ValueError):  # a line that was not finished, or [N/A]
                when, clock, watts = line.split(", ")
                self.samples.append((datetime.strptime(when, "%Y/%m/%d %H:%M:%S.%f").timestamp(), float(clock), float(watts)))
        self.file.close()

    def during(self, spans: list[tuple[float, float]]) -> dict[str, float]:
        """Medians over spans of time.time()."""
        those = [sample[1:] for sample in self.samples if any(start <= sample[0] <= end for start, end in spans)]
        return {name: statistics.median(values) for name, values in zip(("MHz", "W"), zip(*those))}


def copier(device: torch.device) -> tuple[Callable[[int], Any], int]:
    """A copy that no cache holds, and the bytes it reads and writes."""
    size = (1 << 30) if device.type == "cuda" else (1 << 28)
    a = torch.ones(size // 4, dtype=torch.float32, device=device)
    b = torch.empty_like(a)
    return lambda turn: b.copy_(a), 2 * size


def sequence(shape: Shape, device: torch.device, peers: bool, seconds: float) -> list[dict[str, Any]]:
    """Forward, and forward with backward, of one shape."""
    cuda = device.type == "cuda"
    entries, notes = contestants(shape, device, peers)
    print(f"{shape} ...", file=sys.stderr, flush=True)
    errors, correct = accuracy(shape, device)
    copy, copied = copier(device)
    rows = []
    for what, nbytes in traffic(shape).items():
        calls = {c.name: passes(c, what != "forward") for c in entries}
        memory = {name: peak(call) for name, call in calls.items()} if cuda else {}
        ms, clocks = steady({**calls, "copy": copy}, cuda, seconds)
        bandwidth = copied / ms.pop("copy") * 1e3
        floor = nbytes / bandwidth * 1e3
        row = {
            "shape": str(shape), **shape._asdict(), "what": what, "ms": ms, "floor_ms": floor, "copy_GBps": bandwidth / 1e9,
            "GBps": nbytes / ms["ours"] / 1e6, "percent_of_floor": 100 * floor / ms["ours"],
            "peak_MiB": {name: beyond for name, (beyond, _) in memory.items()}, "peak_MiB_beyond_gradients": {name: less for name, (_, less) in memory.items()},
            "speedup": {name: value / ms["ours"] for name, value in ms.items() if name != "ours"},
            "errors": errors, "correct": correct, "notes": notes, "clocks": clocks,
        }  # fmt: skip
        show(row)
        rows.append(row)
    return rows


def accuracy(shape: Shape, device: torch.device) -> tuple[dict[str, dict[str, float]], bool]:
    """Errors against fp64 over 512 tokens, outputs and gradients: ours (the kernels for Hopper where there are any, and the portable ones) on one
    key/value head, to be within tolerance."""
    x = testing.make_inputs(1, min(shape.T, 512), shape.HQ // shape.H, 1, shape.D, shape.D, shape.M, dtype=getattr(torch, shape.dtype), device=device)
    tf32 = shape.dtype == "float32" and device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
    allowed = dict.fromkeys(("o", "hk", "hv", "dq", "dk", "dv", "dg"), 3e-3) if tf32 else None
    errors, correct = {}, True
    for name in ("hopper", "portable") if device.type == "cuda" else ("",):  # which runs by itself depends on the number of heads
        with kernels(name):
            rows = testing.compare(chunk_gsa, x, allowed=allowed)
        errors["ours" if name != "portable" else name] = {row.name: row.error for row in rows}
        correct &= all(row.ok for row in rows)
    return errors, correct


# ---------------------------------------------------------------------------------------------------------------------- telling


def show(row: dict[str, Any]) -> None:
    line = "  ".join(f"{name} {ms:.3f}" for name, ms in row["ms"].items())
    ratios = "  ".join(f"{value:.2f}x {name}" for name, value in row["speedup"].items())
    less = row["peak_MiB_beyond_gradients"]
    memory = "  ".join(f"{name} {value:.0f}" + (f" ({less[name]:.0f})" if less[name] != value else "") for name, value in row["peak_MiB"].items())
    worst = "  ".join(f"{who} o {e['o']:.1e} worst {max(e, key=e.__getitem__)} {max(e.values()):.1e}" for who, e in row["errors"].items())
    print(f"{row['shape']:<36} {row['what']:<17} ms: {line}  floor {row['floor_ms']:.3f} (copy {row['copy_GBps']:.0f} GB/s)")
    more = ("; speed: " + ratios if ratios else "") + ("; MiB beyond inputs (and gradients): " + memory if memory else "")
    print(f"{'':<54} ours: {row['GBps']:.0f} GB/s, {row['percent_of_floor']:.0f} % of floor{more}")
    print(f"{'':<54} error: {worst}{'' if row['correct'] else '  WRONG'}{'; ' + '; '.join(row['notes']) if row['notes'] else ''}", flush=True)


def provenance() -> dict[str, str]:
    """What ran, on what, when: the head of every result. Where things lie on this machine is not a part of it."""
    known = {name: value.split(", /")[0] for name, value in facts().items()}
    return {**known, "commit": commit(), "argv": " ".join(sys.argv[1:]), "date": time.strftime("%Y-%m-%d %H:%M")}


def commit() -> str:
    try:
        root = Path(__file__).resolve().parent
        found = subprocess.run(["git", "-C", root, "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True)
        return found.stdout.strip() or "unknown"
    except OSError:
        return "unknown"


def bars(axis: Any, rows: list[dict[str, Any]], value: Callable[[dict[str, Any], str], float], unit: str, title: str) -> None:
    """A group of bars for each row: value(row, name) for every contestant of any row, then for "floor"."""
    names = [*dict.fromkeys(name for row in rows for name in row["ms"]), "floor"]
    for i, name in enumerate(names):
        axis.bar([x + i * 0.8 / len(names) for x in range(len(rows))], [value(row, name) for row in rows], 0.8 / len(names), label=name)
    axis.set_yscale("log")
    axis.set_ylabel(unit)
    axis.set_title(title, fontsize=10)
    axis.set_xticks([x + 0.3 for x in range(len(rows))], [row["shape"] for row in rows], rotation=25, ha="right", fontsize=7)
    axis.legend()
    axis.grid(axis="y", alpha=0.3)


def plot(rows: list[dict[str, Any]], about: dict[str, str], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    what = list(dict.fromkeys(row["what"] for row in rows))
    figure, axes = pyplot.subplots(len(what), 1, figsize=(max(8, 0.9 * len(rows)), 4.5 * len(what)), squeeze=False)
    for axis, kind in zip(axes[:, 0], what):
        chosen = [row for row in rows if row["what"] == kind]
        title = f"{kind}, {about.get('cuda:0', about['cpu']).split(',')[0]}, torch {torch.__version__}"
        bars(axis, chosen, lambda row, name: row["floor_ms"] if name == "floor" else row["ms"].get(name, math.nan), "ms", title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
