"""A whole model, softmax attention against the same model converted: ms per generated token and memory by context and batch; tokens per second of training.

Random weights in the shape of Llama 3.2 1B (hidden size 2048, 16 layers, 32 query heads, 8 key/value heads of 64, vocabulary 128256), bf16; ``--size tiny`` to
try the script. Generation: transformers' ``generate``, greedy, from a cache that stands at ``context`` tokens (filled with random numbers, as reading a
prompt is not what is timed): softmax attention with its StaticCache, the converted model (``--preset``, t2r) with the default cache. "eager": as it comes,
compilation off. "graph": the step in a CUDA graph, ours by ``gsa_ext.hf.decode_graph``, that of the softmax model by the same means below.
"forward": calls of the model alone in such a graph, without the rest of ``generate``. Training: forward and backward, gradient checkpointing, median of three.
Prints and writes as it goes, and starts nothing new after ``--seconds``; ``--parts generate --seconds 80`` is all of generation on one H200.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from benchmarks.report import Report
from gsa_ext.hf import PRESETS, GSACacheLayer, cache_bytes, convert, decode_graph
from gsa_ext.hf._versions import CACHE
from gsa_ext.layer import layer_state

SIZES = {
    "1b": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 8192,
           "vocab_size": 128256, "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 128,
             "vocab_size": 512, "tie_word_embeddings": True},
}  # fmt: skip
MODELS = ("softmax", "gsa")
FEW, MANY = 8, 32                                                            # tokens; ms a token: the median of up to five differences
ROOM = 64                                                                    # in a static cache, beyond the context


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument("--size", default="1b", choices=SIZES)
    parser.add_argument("--preset", default="t2r", choices=PRESETS, help="of the conversion")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--parts", nargs="+", default=["generate", "train"], choices=["generate", "train"])
    parser.add_argument("--hows", nargs="+", choices=["graph", "eager"], help="of generating; default: both on a GPU, eager on the CPU")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64])
    parser.add_argument("--contexts", nargs="+", type=int, default=[1024, 8192, 65536])
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 8192, 32768], help="of sequences to train on; the batch makes up the longest")
    parser.add_argument("--seconds", type=float, default=80, help="start nothing new after so many")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="where the JSON and the plot go")
    args = parser.parse_args()
    device = torch.device(args.device)
    work: list[tuple[Callable[..., dict[str, Any]], tuple[Any, ...]]] = []
    if "generate" in args.parts:
        hows = args.hows or (("graph", "eager") if device.type == "cuda" else ("eager",))
        work += [(generate, (how, B, context)) for how, B, context in itertools.product(hows, args.batches, args.contexts)]
    if "train" in args.parts:
        work += [(train, (max(args.lengths), T)) for T in args.lengths]
    with Report(args.out, "model", device.type, args.seconds, plot, preset=args.preset, size=SIZES[args.size]) as report:
        torch.manual_seed(0)
        models = {name: build(args.size, device) for name in args.models}
        if "gsa" in models:
            convert(models["gsa"], args.preset)
        for (measure, what), name in itertools.product(work, models):
            row = {"model": name, "what": measure.__name__}
            if report.late(f"{name} {measure.__name__} {what}"):
                continue
            try:
                row.update(measure(models[name], *what))
            except torch.OutOfMemoryError as error:
                row.update(zip(("how", "batch", "context"), what), failed=f"does not fit: {str(error).partition('.')[0]}")
            print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
            report.add(row)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    for line in ratios(report.rows):
        print(line)
    return 0


def ratios(rows: list[dict[str, Any]]) -> list[str]:
    """What generation comes down to, in sentences."""
    ms = {(row["model"], row["how"], row["batch"], row["context"]): row["ms_per_token"] for row in rows if "ms_per_token" in row}
    said = []
    for (model, how, B, context), value in ms.items():
        compared = {
            "eager": ms.get((model, "eager", B, context)) if how == "graph" else None,
            "softmax": ms.get(("softmax", how, B, context)) if model == "gsa" else None,
        }
        first = min(c for m, h, b, c in ms if (m, h, b) == (model, how, B))
        parts = [f"{other / value:.2f}x {name}" for name, other in compared.items() if other]
        if context > first:
            parts.append(f"{100 * value / ms[model, how, B, first] - 100:+.1f} % of the time at {first}")
        if parts:
            said.append(f"{model}, {how}, batch {B}, context {context}: {value:.3f} ms a token; {', '.join(parts)}")
    return said


def build(size: str, device: torch.device) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return LlamaForCausalLM(LlamaConfig(**SIZES[size], max_position_embeddings=131072, bos_token_id=None, eos_token_id=None, pad_token_id=0)).eval()
    finally:
        torch.set_default_dtype(before)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# ------------------------------------------------------------------------------------------------------------ generation


def filled(model: Any, B: int, context: int) -> tuple[Any, Callable[[], None]]:
    """A cache that has seen ``context`` tokens, and what sets it back to that."""
    config, where = model.config, {"device": model.device, "dtype": torch.float32}
    H, D, dtype = config.num_key_value_heads, config.head_dim, model.dtype
    cache: Any
    if not hasattr(config, "gsa"):
        cache = StaticCache(config, max_cache_len=context + ROOM)
        for layer in cache.layers:
            layer.lazy_initialization(*(torch.zeros(B, H, 1, D, device=model.device, dtype=dtype),) * 2)
            layer.keys.normal_()
            layer.values.normal_()
        return cache, lambda: [layer.cumulative_length.fill_(context) for layer in cache.layers] and None
    cache = DynamicCache()
    layers = [layer_state(cache, i, GSACacheLayer) for i in range(config.num_hidden_layers)]
    for layer in layers:
        settings = config.gsa["layers"]["0"]
        M, window = settings["num_slots"], settings.get("window")
        held = {"hk": torch.randn(B, H, D, M, **where), "hv": torch.randn(B, H, M, D, **where)}
        if window:
            held.update({f"window.{name}": torch.randn(B, window - 1, H, D, device=model.device, dtype=dtype) for name in ("keys", "values")})
            held["window.filled"] = torch.full((B,), window - 1, device=model.device)
        layer.restore(held, context)
    return cache, lambda: [setattr(layer, "seen", context) for layer in layers] and None


@contextmanager
def static_graph(model: Any) -> Iterator[None]:
    """decode_graph for a softmax model and one StaticCache."""
    eager, own = model.forward, {}

    @functools.wraps(eager)
    def forward(**kwargs: Any) -> Any:
        given = {name: x for name, x in kwargs.items() if isinstance(x, torch.Tensor)}
        if given["input_ids"].shape[1] != 1:
            return eager(**kwargs)
        if not own:
            own["inputs"], counters = {name: x.clone() for name, x in given.items()}, [layer.cumulative_length for layer in kwargs[CACHE].layers]
            before, side, own["graph"] = [x.clone() for x in counters], torch.cuda.Stream(), torch.cuda.CUDAGraph()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                eager(**{**kwargs, **own["inputs"]})
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(own["graph"]):
                own["out"] = eager(**{**kwargs, **own["inputs"]})
            for x, value in zip(counters, before):
                x.copy_(value)
        for name, x in given.items():
            own["inputs"][name].copy_(x)
        own["graph"].replay()
        return type(own["out"])(logits=own["out"].logits.clone(), **{CACHE: kwargs[CACHE]})

    model.forward = forward
    try:
        yield
    finally:
        del model.forward


@torch.no_grad()
def generate(model: Any, how: str, B: int, context: int) -> dict[str, Any]:
    """ms per token through ``generate``, and of the model alone."""
    device, gsa, config = model.device, hasattr(model.config, "gsa"), model.config
    row: dict[str, Any] = {"how": how, "batch": B, "context": context}
    needed = config.num_hidden_layers * 4 * B * (context + ROOM) * config.num_key_value_heads * config.head_dim
    if not gsa and device.type == "cuda" and needed > 0.5 * torch.cuda.get_device_properties(device).total_memory:
        return {**row, "failed": f"does not fit: {needed / 1e9:.0f} GB of keys and values"}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        weights = torch.cuda.memory_allocated()
    cache, reset = filled(model, B, context)
    ids = torch.randint(1, config.vocab_size, (B, context + 1), device=device)
    ones, position = torch.ones_like(ids), torch.full((B, 1), context, device=device)

    def tokens(n: int) -> float:
        reset()
        synchronize(device)
        start = time.perf_counter()
        model.generate(ids, attention_mask=ones, max_new_tokens=n, do_sample=False, disable_compile=True, **{CACHE: cache})
        synchronize(device)
        return time.perf_counter() - start

    def alone(n: int) -> float:
        mask = ones[:, -1:] if gsa else torch.ones(B, 1, 1, context + ROOM, dtype=torch.bool, device=device)
        reset()
        start = time.perf_counter()
        for _ in range(n):
            model(input_ids=ids[:, -1:], position_ids=position, attention_mask=mask, use_cache=True, logits_to_keep=1, **{CACHE: cache})
        synchronize(device)
        return time.perf_counter() - start

    with nullcontext() if how == "eager" else decode_graph(model) if gsa else static_graph(model):
        tokens(3)
        pairs = [(tokens(FEW), tokens(MANY))]
        pairs += [(tokens(FEW), tokens(MANY)) for _ in range(4 if pairs[0][1] < 1 else 1 if pairs[0][1] < 2 else 0)]
        per_token = statistics.median(many - few for few, many in pairs) / (MANY - FEW)
    if how == "graph":                                                       # another mask, and so another recording
        with decode_graph(model) if gsa else static_graph(model):
            alone(3)
            row["forward_ms"] = 1e3 * min(alone(10) for _ in range(3)) / 10
    row.update(ms_per_token=1e3 * per_token, tokens_per_s=B / per_token, cache_MB=cache_bytes(cache) / 1e6)
    if device.type == "cuda":
        row["peak_MB_beyond_weights"] = (torch.cuda.max_memory_allocated() - weights) / 1e6
    return row


# ------------------------------------------------------------------------------------------------------------ training


def train(model: Any, tokens: int, T: int) -> dict[str, Any]:
    """Tokens per second, forward and backward, ``tokens // T`` sequences of T tokens."""
    device, B = model.device, max(1, tokens // T)
    ids = torch.randint(1, model.config.vocab_size, (B, T), device=device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        weights = torch.cuda.memory_allocated()
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})

    def step() -> float:
        synchronize(device)
        start = time.perf_counter()
        model(ids, labels=ids, use_cache=False).loss.backward()
        synchronize(device)
        return time.perf_counter() - start

    try:
        step()
        seconds = statistics.median(step() for _ in range(3))
    finally:
        model.zero_grad(set_to_none=True)
        model.gradient_checkpointing_disable()
        model.eval()
    row = {"batch": B, "context": T, "tokens_per_s": B * T / seconds, "seconds": seconds}
    if device.type == "cuda":
        row["peak_MB_beyond_weights"] = (torch.cuda.max_memory_allocated() - weights) / 1e6
    return row


def plot(rows: list[dict[str, Any]], about: dict[str, str], path: Path) -> None:
    """Time by context for each batch, memory by context, training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    batches = list(dict.fromkeys(row["batch"] for row in rows if row["what"] == "generate"))
    panels = [(f"generate, batch {B}", "ms per token", "ms_per_token", lambda row, B=B: row["batch"] == B) for B in batches]
    panels += [("the cache", "MB", "cache_MB", lambda row: True)] if batches else []
    panels += [("training", "tokens per second", "tokens_per_s", lambda row: False)] if any(row["what"] == "train" for row in rows) else []
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 4), squeeze=False)
    for axis, (title, unit, value, chosen) in zip(axes[0], panels):
        lines: dict[str, list[tuple[int, float]]] = {}
        for row in rows:
            if value in row and (chosen(row) if row["what"] == "generate" else title == "training"):
                how = row.get("how", "") if unit != "MB" else f"batch {row['batch']}"
                lines.setdefault(f"{row['model']} {how}", []).append((row["context"], row[value]))
        for name, points in lines.items():
            axis.plot(*zip(*sorted(set(points))), marker="o", label=name)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("tokens in a sequence" if title == "training" else "context")
        axis.set_ylabel(unit)
        axis.set_title(title, fontsize=10)
        if lines:
            axis.legend()
        axis.grid(alpha=0.3)
    figure.suptitle(f"{about.get('cuda:0', about['cpu']).split(',')[0]}, torch {torch.__version__}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
