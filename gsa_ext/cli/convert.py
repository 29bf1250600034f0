"""``gsa-ext convert``: a Transformer's layers become Gated Slot Attention, untrained, and the model is saved."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("convert", help="convert a Transformer and save it, without training", description=__doc__)
    parser.add_argument("model", help="directory of a saved model (or a hub id)")
    parser.add_argument("output", help="directory for the converted model; must be empty or not there")
    parser.add_argument("--preset", default="t2r-window", help="t2r-window, t2r, paper or liger (default: t2r-window)")
    parser.add_argument("--layers", default="all", help="layers to convert: all, or indices such as 0,1,3 (default: all)")
    parser.add_argument("--num-slots", type=int, help="memory slots per key/value head (default: the preset's)")
    parser.add_argument("--gate", help="proj, a new projection, or key, the keys themselves (default: the preset's)")
    parser.add_argument("--rope", help="keep or drop the rotary position embedding (default: the preset's)")
    parser.add_argument("--scale", type=float, help="factor on the slot logits (default: the preset's)")
    parser.add_argument("--window", type=int, help="tokens of a softmax window beside the slots (default: the preset's)")
    parser.add_argument("--mix", help="share of the window in the output, or learned (default: 0.5)")
    parser.add_argument("--seed", type=int, default=0, help="of the new parameters (default: 0)")


def run(args: argparse.Namespace) -> int:
    """Returns 0, or 2 with a message on stderr when something given cannot be used."""
    if importlib.util.find_spec("transformers") is None:
        print("gsa-ext convert: error: needs transformers: pip install transformers", file=sys.stderr)
        return 2
    import transformers

    import gsa_ext.hf
    from gsa_ext.cli._t2r_data import BadInput, storage_failure
    from gsa_ext.cli.t2r import _layers, _pretrained

    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    output = Path(args.output)
    try:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise BadInput(f"{output}: is there already; give a new or an empty directory")
        layers, mix = _layers(args.layers), args.mix
        if mix not in (None, "learned"):
            try:
                mix = float(mix)
            except ValueError:
                raise BadInput(f"--mix: expected a number or learned, given {args.mix!r}") from None
        model = _pretrained("AutoModelForCausalLM", args.model, dtype="auto")
        transformers.set_seed(args.seed)
        before = model.num_parameters()
        try:
            gsa_ext.hf.convert(model, args.preset, layers, num_slots=args.num_slots, gate=args.gate, rope=args.rope, scale=args.scale,
                               window=args.window, mix=mix)
        except (ValueError, TypeError) as error:
            raise BadInput(str(error)) from error
        model.save_pretrained(output)
        try:
            transformers.AutoTokenizer.from_pretrained(args.model).save_pretrained(output)
            tokenizer = ""
        except (OSError, ValueError, KeyError):
            tokenizer = " (no tokenizer there)"
    except BadInput as error:
        print(f"gsa-ext convert: error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        failure = storage_failure(error)
        if failure is None:
            raise
        print(f"gsa-ext convert: error: {failure}; {output} is not whole.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\ngsa-ext convert: interrupted; {output} is not whole.", file=sys.stderr)
        return 130
    converted = model.config.gsa["layers"]
    print(f"{output}: {len(converted)} of {model.config.num_hidden_layers} layers converted ({args.preset}), "
          f"{model.num_parameters() - before:,} new parameters of {model.num_parameters():,}{tokenizer}. Finetune it before use.")
    return 0
