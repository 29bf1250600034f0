"""What ``gsa-ext t2r`` measures on its models, and how it tells: report.json, report.md, loss.png."""

from __future__ import annotations

import copy
import json
import math
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from gsa_ext.cli._t2r_data import Blocks


@torch.no_grad()
def nats_per_token(model: Any, blocks: Blocks, batch_size: int, desc: str) -> float:
    """Mean loss of the model on the blocks, each read from its start."""
    model.eval()
    total = 0.0
    for i in tqdm(range(0, len(blocks), batch_size), desc=desc, unit="batch", leave=False):
        rows = [blocks[j] for j in range(i, min(i + batch_size, len(blocks)))]
        ids = torch.stack([row["input_ids"] for row in rows]).to(model.device)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
            total += model(ids, labels=ids, use_cache=False).loss.item() * len(rows)
    return total / len(blocks)


@torch.no_grad()
def decode_cost(model: Any, contexts: list[int], tokens: int = 24) -> dict[int, dict[str, float]]:
    """For each context length: the bytes of the cache after reading it, and the median milliseconds of a generated token (batch 1)."""
    from gsa_ext.hf import cache_bytes
    from gsa_ext.hf._versions import CACHE

    model.eval()
    costs = {}
    for context in tqdm(contexts, desc="generation cost", unit="length", leave=False):
        ids = torch.arange(context, device=model.device)[None] % model.config.vocab_size
        out = model(ids, use_cache=True, logits_to_keep=1)
        cache, held, times = out[CACHE], cache_bytes(out[CACHE]), []
        for _ in range(tokens + 3):
            start = time.perf_counter()
            out = model(out.logits[:, -1:].argmax(-1), use_cache=True, **{CACHE: cache})
            out.logits.sum().item()                                      # waits for the device
            times.append(time.perf_counter() - start)
        costs[context] = {"cache_bytes": held, "ms_per_token": 1e3 * statistics.median(times[3:])}
    return costs


@torch.no_grad()
def sample(model: Any, tokenizer: Any, prompt: str, tokens: int, seed: int) -> str:
    """What the model writes after the prompt: temperature 0.7, top 40."""
    model.eval()
    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    inputs.pop("token_type_ids", None)
    pad = next((x for x in (tokenizer.pad_token_id, tokenizer.eos_token_id) if x is not None), 0)
    out = model.generate(**inputs, max_new_tokens=tokens, do_sample=True, temperature=0.7, top_k=40, pad_token_id=pad)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1]:])


def environment(device: torch.device) -> dict[str, Any]:
    import transformers

    import gsa_ext

    processor = platform.machine()
    try:
        names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        processor = names[0] if names else processor
    except OSError:
        pass
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "cpu": f"{processor}, {os.cpu_count()} logical cores", "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__, "gsa_ext": gsa_ext.__version__,
    }


def write(folder: Path, report: dict[str, Any]) -> None:
    """report.json, loss.png and report.md in ``folder``; the last one is what to read."""
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    _plot(folder / "loss.png", report)
    (folder / "report.md").write_text(_markdown(report))


def _plot(path: Path, report: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bits = report["bits_per_byte"]
    scale = 1 / math.log(2) / report["bytes_per_token"]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), constrained_layout=True)
    history = report["history"]
    offset = 0
    if history["teacher"]:
        offset = -history["teacher"][-1]["step"]
        steps, loss = _curve(history["teacher"], "loss")
        axes.plot([s + offset for s in steps], [x * scale for x in loss], color="tab:blue", alpha=0.6, label="teacher, training")
    steps, loss = _curve(history["converted"], "loss")
    axes.plot(steps, [x * scale for x in loss], color="tab:orange", alpha=0.5, label="converted, training")
    steps, loss = _curve(history["converted"], "eval_loss")
    axes.plot([0, *steps], [bits["converted"], *(x * scale for x in loss)], "o-", color="tab:red", label="converted, held-out")
    axes.axhline(bits["teacher"], color="tab:blue", linestyle="--", label=f"teacher: {bits['teacher']:.3f}")
    axes.axhline(bits["converted"], color="tab:gray", linestyle=":", label=f"converted, before training: {bits['converted']:.3f}")
    axes.axhline(bits["finetuned"], color="tab:red", linestyle="--", label=f"converted, after training: {bits['finetuned']:.3f}")
    axes.set_xlabel("optimizer steps (conversion at 0)")
    axes.set_ylabel("bits per byte")
    low, high = min(bits.values()), max(bits.values())
    axes.set_ylim(low - 0.15 * (high - low) - 0.05, high + 0.4 * (high - low) + 0.2)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _curve(history: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    rows = [row for row in history if key in row]
    return [row["step"] for row in rows], [row[key] for row in rows]


def _markdown(report: dict[str, Any]) -> str:
    bits, settings, model, texts = report["bits_per_byte"], report["settings"], report["model"], report["sample"]
    lost, left = bits["converted"] - bits["teacher"], bits["finetuned"] - bits["teacher"]
    gap = f"Gap to the teacher: {left:+.3f} bits per byte"
    if 0 < left < lost:
        gap += f"; {100 * (1 - left / lost):.0f} % of what the conversion lost is recovered"
    gap += ". The teacher was not trained on meanwhile"
    gap += ": being below it means that it was not trained to its end, not that GSA is better." if left < 0 else "."
    lines = [
        "# From softmax attention to Gated Slot Attention", "",
        f"{model['what']}: {model['parameters'] / 1e6:.2f} M parameters, {model['converted_layers']} of {model['layers']} "
        f"layers converted (preset {settings['preset']}, {model['num_slots']} slots), then trained: {settings['stages']}, {settings['steps']} steps each"
        f"{', transfer ' + str(settings['transfer_steps']) if 'transfer' in settings['stages'] else ''} "
        f"({report['tokens']['finetune'] / 1e6:.2f} M tokens).", "",
        "| held-out text | bits per byte |", "|---|---|",
        f"| teacher, softmax attention | {bits['teacher']:.3f} |",
        f"| converted, before training | {bits['converted']:.3f} |",
        f"| converted, after training | {bits['finetuned']:.3f} |", "",
        gap, "",
        "![loss](loss.png)", "",
        "## Generation, batch 1", "",
        "| context, tokens | softmax cache, bytes | GSA cache, bytes | softmax, ms per token | GSA, ms per token |", "|---|---|---|---|---|",
    ]
    for row in report["generation"]:
        softmax = "-" if row["softmax_ms"] is None else f"{row['softmax_ms']:.2f}"
        gsa = "-" if row["gsa_ms"] is None else f"{row['gsa_ms']:.2f}"
        lines.append(f"| {row['context']:,} | {row['softmax_bytes']:,} | {row['gsa_bytes']:,} | {softmax} | {gsa} |")
    lines += ["", "Rows without times are computed: softmax keeps its keys and values of every token, GSA its slots.", "", "## A sample", ""]
    for title, text in (("Prompt", texts["prompt"]), ("The converted model, after training", texts["finetuned"]), ("The teacher", texts["teacher"])):
        lines += [f"{title}:", "", _fenced(text), ""]
    lines += ["## Run on", "", *(f"- {name}: {value}" for name, value in report["environment"].items())]
    lines += [f"- seconds: {', '.join(f'{name} {value:.0f}' for name, value in report['seconds'].items())}"]
    shown = {name: value for name, value in settings.items() if name != "prompt" and value is not None}
    lines += [f"- settings: {', '.join(f'{name} {value}' for name, value in shown.items())}", ""]
    return "\n".join(lines)


def _fenced(text: str) -> str:
    fence = "````" if "```" in text else "```"
    return f"{fence}text\n{text}\n{fence}"


def generation_rows(teacher: dict[int, dict[str, float]], gsa: dict[int, dict[str, float]], beyond: list[int]) -> list[dict[str, Any]]:
    """Measured contexts, and longer ones whose cache sizes follow from them."""
    rows: list[dict[str, Any]] = [
        {"context": n, "softmax_bytes": int(teacher[n]["cache_bytes"]), "gsa_bytes": int(gsa[n]["cache_bytes"]),
         "softmax_ms": teacher[n]["ms_per_token"], "gsa_ms": gsa[n]["ms_per_token"]} for n in teacher]
    (a, b), last = (rows[0], rows[-1]), copy.deepcopy(rows[-1])
    span = max(b["context"] - a["context"], 1)
    for n in beyond:
        row = {"context": n, "softmax_ms": None, "gsa_ms": None}
        for key in ("softmax_bytes", "gsa_bytes"):
            slope = (b[key] - a[key]) // span
            row[key] = last[key] + slope * (n - last["context"])
        rows.append(row)
    return rows
