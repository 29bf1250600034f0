"""One attention layer, forward and backward: how much of its time is the op, how much the projections, and what the rest is.

Layers: "layer" is gsa_ext.GatedSlotAttention; the others are a Llama's attention after gsa_ext.hf.convert with that preset. "total" is
timed without the profiler; the shares are of the time on the device (on the CPU: in its operators) in a profile of the same calls: inside torch.ops.gsa,
inside matrix products, inside a window's softmax attention (with what its operator does inside: of FlashAttention the sum over the query heads that
share a key), and everything else (gates, feature maps, norms, rotation, masks, mixing, copies), which is listed by operator. Compiled code is told apart by
kernels, that sum is in its rest. Copies are outputs of copying operators with as many bytes as the hidden states or more; an operator that needs one is an
operator to look at.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.__main__ import provenance
from gsa_ext import GatedSlotAttention

LAYERS = ("layer", "t2r", "paper", "liger", "t2r-window")
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::linear", "aten::matmul", "aten::bmm", "aten::linear_backward", "aten::mkldnn_linear")
GEMMS = ("nvjet", "gemm", "xmma", "cutlass", "cublas", "splitK")
BESIDE = ("gsa::rotate", "gsa::log_gate", "gsa::log_gate_backward", "gsa::mix", "gsa::mix_backward",                # not the op
          "gsa::silu_norm", "gsa::silu_norm_forward", "gsa::silu_norm_backward")
OWN_KERNELS = ("rotate_kernel", "log_gate_kernel", "mix_kernel", "silu_norm")                                       # of these
ATTENTION = ("flash", "sdpa", "fmha")                                       # in the names of kernels
COPIES = ("_to_copy", "clone", "copy_", "cat", "contiguous", "repeat", "index_select")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument("--shape", default=None, metavar="B,T,hidden,HQ,H,M", help="default: 4,4096,4096,32,8,64 on CUDA, 1,256,128,4,2,16 on the CPU")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--layers", nargs="+", default=LAYERS, choices=LAYERS)
    parser.add_argument("--compile", action="store_true", help="also each layer after torch.compile (on a GPU)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="where the JSON goes")
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.compile and device.type == "cpu":
        parser.error("--compile: on a GPU only, where kernels can be told apart")
    shape = tuple(map(int, (args.shape or ("4,4096,4096,32,8,64" if device.type == "cuda" else "1,256,128,4,2,16")).split(",")))
    about = {**provenance(), "shape": dict(zip(("B", "T", "hidden", "HQ", "H", "M"), shape)), "dtype": args.dtype}
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"layer-{device.type}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    rows = []
    for compiled in (False, True) if args.compile else (False,):
        for name in args.layers:
            rows.append(measure(name, shape, getattr(torch, args.dtype), device, compiled))
            show(rows[-1])
            path.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    print(f"\nwritten: {path}")
    return 0


def build(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[torch.nn.Module, Callable[..., torch.Tensor]]:
    """A layer in training mode, and what calls it: ``x [B, T, hidden] -> [B, T, hidden]``."""
    _, T, hidden, HQ, H, M = shape
    torch.manual_seed(0)
    if name == "layer":
        layer = GatedSlotAttention(hidden_size=hidden, num_heads=HQ, num_kv_heads=H, num_slots=M, device=device, dtype=dtype)
        return layer, lambda x: layer(x)[0]
    from transformers import LlamaConfig, LlamaForCausalLM

    import gsa_ext.hf

    config = LlamaConfig(vocab_size=32, hidden_size=hidden, intermediate_size=32, num_hidden_layers=1, num_attention_heads=HQ, num_key_value_heads=H,
                         max_position_embeddings=T, dtype=dtype)
    model = gsa_ext.hf.convert(LlamaForCausalLM(config).to(device, dtype), name, num_slots=hidden // HQ if name == "liger" else M)
    attention: Any = model.model.layers[0].self_attn
    rotation = model.model.rotary_emb(torch.zeros(1, T, hidden, device=device, dtype=dtype), torch.arange(T, device=device)[None])
    return attention.train(), lambda x: attention(x, position_embeddings=rotation)[0]


def measure(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, compiled: bool, calls: int = 5) -> dict[str, Any]:
    cuda = device.type == "cuda"
    layer, forward = build(name, shape, dtype, device)
    if compiled:
        torch._dynamo.reset()
        forward = torch.compile(forward, fullgraph=True, dynamic=False)
    x = torch.randn(*shape[:3], device=device).to(dtype).requires_grad_()
    leaves = [x, *layer.parameters()]
    cotangent = torch.randn_like(x)

    def call() -> None:
        torch.autograd.grad(forward(x), leaves, cotangent)

    def wait() -> None:
        if cuda:
            torch.cuda.synchronize()

    for _ in range(3 if cuda else 1):
        call()
    wait()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        wait()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20 if cuda else None
    times = []
    for _ in range(4 * calls):
        start = time.perf_counter()
        call()
        wait()
        times.append(1e3 * (time.perf_counter() - start))
    copies = Copies(x)
    if not compiled:                                                     # after that there are no operators to look at
        with copies:
            call()
    kinds = [torch.profiler.ProfilerActivity.CPU] + ([torch.profiler.ProfilerActivity.CUDA] if cuda else [])
    with torch.profiler.profile(activities=kinds) as profile:
        for _ in range(calls):
            call()
        wait()
    parts, rest, launches = by_kernel(profile.events()) if compiled else split(profile.events(), cuda)
    total = sum(parts.values())
    return {"layer": name, "compiled": compiled, "total_ms": statistics.median(times), "profiled_ms": total / calls / 1e3, "peak_MiB": peak,
            "launches": launches / calls, "percent": {part: 100 * value / total for part, value in parts.items()},
            "rest_ms": {op: value / calls / 1e3 for op, value in rest.most_common(12)}, "copies": None if compiled else dict(copies.found)}


def split(events: Any, cuda: bool) -> tuple[dict[str, float], Counter[str], int]:
    """Microseconds in the op, in matrix products, in a window's attention and elsewhere; elsewhere by operator; and the number of kernels."""
    parts, rest, launches = {"op": 0.0, "projections": 0.0, "window": 0.0, "rest": 0.0}, Counter[str](), 0
    for event in events:
        if str(event.device_type) != "DeviceType.CPU":
            continue
        spent = sum(kernel.duration for kernel in event.kernels) if cuda else event.self_cpu_time_total if event.name.startswith(("aten::", "gsa::")) else 0.0
        launches += len(event.kernels)
        if not spent:
            continue
        lineage, parent = [event.name], event.cpu_parent
        while parent is not None:
            lineage.append(parent.name)
            parent = parent.cpu_parent
        if any(name.startswith("gsa::") and name not in BESIDE for name in lineage):
            parts["op"] += spent
        elif any(name.startswith("torch_attn::") or (name.startswith("aten::_") and "attention" in name) for name in lineage):
            parts["window"] += spent
        elif any(name in PRODUCTS for name in lineage):
            parts["projections"] += spent
        else:
            parts["rest"] += spent
            rest[next((name for name in lineage if name.startswith(("aten::", "gsa::"))), event.name)] += spent
    return parts, rest, launches


def by_kernel(events: Any) -> tuple[dict[str, float], Counter[str], int]:
    """As :func:`split`, of compiled code, by the names of the kernels."""
    parts, rest, launches = {"op": 0.0, "projections": 0.0, "window": 0.0, "rest": 0.0}, Counter[str](), 0
    for event in events:
        if str(event.device_type) == "DeviceType.CPU" or getattr(event, "is_user_annotation", False):
            continue
        launches += 1
        part = "rest"
        if "gsa::" in event.name:
            part = "rest" if any(mark in event.name for mark in OWN_KERNELS) else "op"
        elif any(mark in event.name for mark in ATTENTION):              # before products: these have cutlass in their names, too
            part = "window"
        elif any(mark in event.name for mark in GEMMS):
            part = "projections"
        parts[part] += event.self_device_time_total
        if part == "rest":
            rest[event.name.split("(")[0][:60]] += event.self_device_time_total
    return parts, rest, launches


class Copies(TorchDispatchMode):
    """Counts outputs of copying operators with at least as many bytes as ``x``, by name, whatever they call an element. What is copied inside an operator of
    torch's is not seen."""

    def __init__(self, x: torch.Tensor) -> None:
        super().__init__()
        self.bytes, self.found = x.numel() * x.element_size(), Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in COPIES and isinstance(out, torch.Tensor) and out.numel() * out.element_size() >= self.bytes:
            self.found[name] += 1
        return out


def show(row: dict[str, Any]) -> None:
    shares = "  ".join(f"{part} {value:.1f} %" for part, value in row["percent"].items())
    memory = "" if row["peak_MiB"] is None else f"  {row['peak_MiB']:.0f} MiB"
    kind = "compiled " if row["compiled"] else ""
    print(f"{row['layer']:<6} {kind}{row['total_ms']:.3f} ms ({row['profiled_ms']:.3f} in {row['launches']:.0f} kernels)  {shares}{memory}")
    print(f"{'':<6} rest, ms: " + "  ".join(f"{op.removeprefix('aten::')} {value:.3f}" for op, value in row["rest_ms"].items()))
    if not row["compiled"]:
        print(f"{'':<6} full-size copies: {row['copies'] or 'none'}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
