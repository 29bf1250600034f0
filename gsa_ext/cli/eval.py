"""``gsa-ext eval``: bits per byte of a model on a text, where in the context it loses them, and what it remembers of what went by."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
from typing import Any


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("eval", help="bits per byte by position, and copying from far back", description=__doc__)
    parser.add_argument("model", help="directory of a saved model (or a hub id)")
    parser.add_argument("--data", required=True, help="text: file or directory (.txt, .md, .py, .jsonl, .json, .parquet) or hub id of a data set")
    parser.add_argument("--text-column", help="column of the data that holds the text (default: text)")
    parser.add_argument("--against", metavar="MODEL", help="another model with the same tokenizer, such as the original, to compare with")
    parser.add_argument("--seq-len", type=int, default=1024, help="tokens per example (default: 1024)")
    parser.add_argument("--batch-size", type=int, default=4, help="examples at a time (default: 4)")
    parser.add_argument("--examples", type=int, default=64, help="examples to read, evenly from the whole text (default: 64)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers to this file, too")


def run(args: argparse.Namespace) -> int:
    """Returns 0, or 2 with a message on stderr when something given cannot be used."""
    missing = [name for name in ("transformers", "datasets") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"gsa-ext eval: error: needs {', '.join(missing)}: pip install {' '.join(missing)}", file=sys.stderr)
        return 2
    import transformers

    import gsa_ext.hf  # noqa: F401  teaches transformers the converted models
    from gsa_ext.cli import _t2r_data as data
    from gsa_ext.cli.t2r import _device, _pretrained

    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    try:
        for name in ("seq_len", "batch_size", "examples"):
            if getattr(args, name) < (16 if name == "seq_len" else 1):
                raise data.BadInput(f"--{name.replace('_', '-')}: expected at least {16 if name == 'seq_len' else 1}, given {getattr(args, name)}")
        device = _device(args.device)
        tokenizer = _pretrained("AutoTokenizer", args.model)
        tokens, bytes_per_token = data.user_text(args.data, args.text_column, tokenizer, 4 * args.examples * args.seq_len)
        if len(tokens) < args.seq_len:
            raise data.BadInput(f"--data {args.data}: {len(tokens)} tokens are less than one example of --seq-len = {args.seq_len}")
        blocks = data.Blocks(tokens, args.seq_len).first(args.examples)
        results: dict[str, Any] = {"bytes_per_token": bytes_per_token, "examples": len(blocks), "seq_len": args.seq_len, "models": {}}
        for name in dict.fromkeys((args.model, *([args.against] if args.against else []))):
            model = _pretrained("AutoModelForCausalLM", name, dtype="auto").to(device).eval()
            results["models"][name] = measure(model, blocks, args.batch_size, bytes_per_token)
    except data.BadInput as error:
        print(f"gsa-ext eval: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ngsa-ext eval: interrupted.", file=sys.stderr)
        return 130
    _print(results)
    if args.json:
        try:
            with open(args.json, "w") as file:
                json.dump(results, file, indent=2)
        except OSError as error:
            print(f"gsa-ext eval: error: {error}", file=sys.stderr)
            return 1
    return 0


def measure(model: Any, blocks: Any, batch_size: int, bytes_per_token: float) -> dict[str, Any]:
    """What a model does on ``blocks``.

    Returns:
        ``bits_per_byte``; ``perplexity``: per token, by position in the context, ``{"16-63": ...}``; ``copy``: by distance, in tokens, the loss in bits
        per token on a passage when it is met for the second time, the distance after the first, and ``copy_first``, when it is met for the first time.
    """
    import torch
    from tqdm import tqdm

    length = blocks.tokens.shape[1]
    edges = [0] + [4 ** n for n in range(2, 12) if 4 ** n < length - 1] + [length - 1]
    rows = torch.stack([blocks[i]["input_ids"] for i in range(len(blocks))])
    nats = []
    for i in tqdm(range(0, len(rows), batch_size), desc="text", unit="batch", leave=False):
        nats.append(_losses(model, rows[i:i + batch_size]))
    by_position = torch.cat(nats).double().mean(0)
    copies: dict[str, float] = {}
    first = []
    passage = max(4, min(32, length // 8))
    for distance in [4 ** n for n in range(2, 12) if passage <= 4 ** n <= length - passage]:
        again = []
        for i in tqdm(range(0, len(rows), batch_size), desc=f"copy over {distance}", unit="batch", leave=False):
            part = rows[i:i + batch_size, :distance + passage].clone()
            part[:, distance:] = part[:, :passage]
            losses = _losses(model, part)
            again.append(losses[:, distance:].double().mean(1))         # all but the passage's first token, which nothing announces
            first.append(losses[:, :passage - 1].double().mean(1))
        copies[str(distance)] = torch.cat(again).mean().item() / math.log(2)
    return {
        "bits_per_byte": by_position.mean().item() / math.log(2) / bytes_per_token,
        "perplexity": {f"{a}-{b - 1}": math.exp(by_position[a:b].mean().item()) for a, b in zip(edges, edges[1:])},
        "copy_first": torch.cat(first).mean().item() / math.log(2) if first else None,
        "copy": copies,
    }


def _losses(model: Any, ids: Any) -> Any:
    """Nats per token ``[B, T - 1]`` of all tokens but the first."""
    import torch

    ids = ids.to(model.device)
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none").cpu()


def _print(results: dict[str, Any]) -> None:
    models = results["models"]
    every = list(models.values())
    print(f"{results['examples']} examples of {results['seq_len']} tokens; " + " against ".join(models))
    rows = [("bits per byte", [m["bits_per_byte"] for m in every])]
    rows += [(f"perplexity, positions {span}", [m["perplexity"][span] for m in every]) for span in every[0]["perplexity"]]
    if every[0]["copy"]:
        rows += [("a passage, first time, bits per token", [m["copy_first"] for m in every])]
        rows += [(f"the same {distance} tokens later", [m["copy"][distance] for m in every]) for distance in every[0]["copy"]]
    for name, values in rows:
        print(f"{name:<40}" + "".join(f"{value:>12.3f}" for value in values))
