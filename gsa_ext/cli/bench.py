"""``gsa-ext bench``: the ops on this machine, in a minute. The full comparison with other kernels is ``python -m benchmarks`` in the source tree."""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("bench", help="ms per call of the ops beside softmax attention on this machine")
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument("--heads", type=int, nargs=2, metavar=("HQ", "H"), help="query and key/value heads; default 8 8 (CPU), 32 8 (CUDA)")
    parser.add_argument("--dim", type=int, help="head dimension K = V; default 64 (CPU), 128 (CUDA)")
    parser.add_argument("--slots", type=int, default=64, help="M; default 64")
    parser.add_argument("--tokens", type=int, nargs="+", help="sequence lengths, B = 1")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))


def run(args: argparse.Namespace) -> int:
    import torch
    import torch.nn.functional as F

    from gsa_ext import _load, chunk_gsa, testing
    from gsa_ext.cli.info import cpu_name

    device = args.device or ("cuda" if torch.cuda.is_available() and _load.built().cuda else "cpu")
    cuda = torch.device(device).type == "cuda"
    HQ, H = args.heads or ((32, 8) if cuda else (8, 8))
    D = args.dim or (128 if cuda else 64)
    tokens = args.tokens or ([2048, 8192, 32768] if cuda else [1024, 2048, 4096])
    dtype = getattr(torch, args.dtype)
    name = torch.cuda.get_device_name() if cuda else cpu_name()
    print(f"{name}, torch {torch.__version__}: B 1, heads {HQ}/{H}, K = V = {D}, M {args.slots}, {args.dtype}; median ms")
    print(f"{'T':>8} {'GSA fwd':>10} {'SDPA fwd':>10} {'GSA fwd+bwd':>12} {'SDPA fwd+bwd':>13}")

    def attention(q, k, v, s, g, scale):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=HQ != H)

    for T in tokens:
        x = testing.make_inputs(1, T, HQ, H, D, D, args.slots, dtype=dtype, device=device)
        line = []
        for train in (False, True):
            for op in (lambda **x: chunk_gsa(**x)[0], attention):
                leaves = {name: t.detach().requires_grad_(train) for name, t in x.items() if isinstance(t, torch.Tensor)}
                times = []
                for _ in range(7):
                    torch.cuda.synchronize() if cuda else None
                    began = time.perf_counter()
                    o = op(**{**x, **leaves})
                    if train:
                        o.backward(o.detach())
                    torch.cuda.synchronize() if cuda else None
                    times.append((time.perf_counter() - began) * 1e3)
                line.append(statistics.median(times[2:]))
        print(f"{T:>8} {line[0]:>10.2f} {line[1]:>10.2f} {line[2]:>12.2f} {line[3]:>13.2f}", flush=True)
    return 0
