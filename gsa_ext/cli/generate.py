"""``gsa-ext generate``: text from a saved model, as it is written."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("generate", help="write text with a saved model", description=__doc__)
    parser.add_argument("model", help="directory of a saved model (or a hub id)")
    parser.add_argument("--prompt", required=True, help="the beginning of the text; - reads it from standard input")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="tokens to write (default: 200)")
    parser.add_argument("--temperature", type=float, default=0.7, help="0: always the most likely token (default: 0.7)")
    parser.add_argument("--top-k", type=int, default=40, help="choose among so many tokens; 0: all (default: 40)")
    parser.add_argument("--seed", type=int, default=None, help="repeat a text (default: another one each time)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")


def run(args: argparse.Namespace) -> int:
    """Returns 0, or 2 with a message on stderr when something given cannot be used."""
    if importlib.util.find_spec("transformers") is None:
        print("gsa-ext generate: error: needs transformers: pip install transformers", file=sys.stderr)
        return 2
    import torch
    import transformers

    import gsa_ext.hf
    from gsa_ext.cli._t2r_data import BadInput
    from gsa_ext.cli.t2r import _device, _pretrained
    from gsa_ext.hf._versions import CACHE

    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    try:
        if args.max_new_tokens < 1:
            raise BadInput(f"--max-new-tokens: expected at least 1, given {args.max_new_tokens}")
        if not args.temperature >= 0:
            raise BadInput(f"--temperature: expected 0 or more, given {args.temperature}")
        if args.top_k < 0:
            raise BadInput(f"--top-k: expected 0 or more, given {args.top_k}")
        device = _device(args.device)
        if not Path(args.model).is_dir() and args.model.count("/") != 1:
            raise BadInput(f"{args.model}: no such directory")
        tokenizer = _pretrained("AutoTokenizer", args.model)
        model = _pretrained("AutoModelForCausalLM", args.model).to(device).eval()
        prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
        inputs = tokenizer(prompt, return_tensors="pt").to(device)
        if inputs["input_ids"].shape[1] == 0:
            raise BadInput("--prompt: expected some text, given none")
    except BadInput as error:
        print(f"gsa-ext generate: error: {error}", file=sys.stderr)
        return 2
    inputs.pop("token_type_ids", None)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": args.temperature, "top_k": args.top_k} if args.temperature > 0 else {"do_sample": False}
    pad = next((x for x in (tokenizer.pad_token_id, tokenizer.eos_token_id) if x is not None), 0)
    start = time.perf_counter()
    try:
        out = model.generate(**inputs, **sampling, max_new_tokens=args.max_new_tokens, pad_token_id=pad, return_dict_in_generate=True,
                             streamer=transformers.TextStreamer(tokenizer))
    except KeyboardInterrupt:
        print()
        return 130
    count = out.sequences.shape[1] - inputs["input_ids"].shape[1]
    ms = 1e3 * (time.perf_counter() - start) / count
    print(f"[{count} tokens, {ms:.1f} ms per token, cache {gsa_ext.hf.cache_bytes(out[CACHE]):,} bytes]", file=sys.stderr)
    return 0
