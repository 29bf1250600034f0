"""Text for ``gsa-ext t2r``: the bytes of the Python sources that every machine has, or the user's own."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

SUFFIXES = {".txt": "text", ".text": "text", ".md": "text", ".py": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


class BadInput(Exception):
    """What the user gave cannot be used; the message says what and why."""


def storage_failure(error: Exception) -> str | None:
    """What to say of an error that a disk or file system made (full, gone, read-only), whichever library met it; None for other errors."""
    if isinstance(error, OSError) or (type(error).__name__ == "SafetensorError" and "I/O error" in str(error)):
        return _first_line(error)
    if isinstance(error, RuntimeError) and ("PytorchStreamWriter" in str(error) or "inline_container" in str(error)):
        return "a checkpoint could not be written (is the disk full?)"
    return None


class Blocks(Dataset):
    """A long row of token ids, cut into training examples of ``length`` tokens; the rest is dropped."""

    def __init__(self, tokens: np.ndarray, length: int) -> None:
        self.tokens = tokens[: len(tokens) // length * length].reshape(-1, length)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = torch.from_numpy(self.tokens[i].astype(np.int64))
        return {"input_ids": ids, "labels": ids}

    def first(self, count: int) -> Blocks:
        """The same with ``count`` blocks only, taken evenly from the whole."""
        chosen = Blocks.__new__(Blocks)
        chosen.tokens = self.tokens[np.linspace(0, len(self) - 1, min(count, len(self))).astype(np.int64)]
        return chosen


def python_sources() -> tuple[np.ndarray, np.ndarray]:
    """Bytes (uint8) of the ``.py`` files of the Python standard library and of torch, sorted by path: a training and a held-out part,
    split by a hash of the path."""
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for name, root in (("python", Path(sysconfig.get_paths()["stdlib"])), ("torch", Path(torch.__file__).parent)):
        for path in sorted(root.rglob("*.py")):
            inside = path.relative_to(root)
            if "site-packages" in inside.parts or "dist-packages" in inside.parts:
                continue
            held_out = hashlib.sha256(f"{name}/{inside.as_posix()}".encode()).digest()[0] < 5               # one file in fifty
            try:
                parts[held_out].append(path.read_bytes())
            except OSError:
                continue
    train, held = (np.frombuffer(b"\n".join(part), dtype=np.uint8) for part in parts)
    return train, held


def byte_tokenizer() -> Any:
    """A tokenizer whose ids are the bytes of the UTF-8 text: vocabulary 256, no special tokens. It saves and loads like any other."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # the byte-level alphabet: printable Latin-1 characters stand for themselves, the other bytes for the characters from 256 on
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in printable]
    letter = {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(rest)}
    tokenizer = Tokenizer(models.BPE(vocab={letter[b]: b for b in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, model_input_names=["input_ids", "attention_mask"])


def user_text(data: str, column: str | None, tokenizer: Any, wanted: int) -> tuple[np.ndarray, float]:
    """Tokens (int32, at most about ``wanted``) of the user's data, and the bytes of text per token.

    Args:
        data: a file (text, jsonl, json, parquet), a directory of such files, or the id of a data set on the hub.
        column: the column with the text; None: "text", or the only column of strings.
    """
    from tqdm import tqdm

    rows, column = _rows(data, column)
    ids: list[np.ndarray] = []
    tokens = size = 0
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    with tqdm(total=wanted, desc="reading text", unit="token", unit_scale=True) as bar:
        batch: list[str] = []

        def flush() -> None:
            nonlocal tokens, size
            for text, row in zip(batch, tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]):
                ids.append(np.asarray(row + end, dtype=np.int32))
                tokens, size = tokens + len(ids[-1]), size + len(text.encode())
                bar.update(len(ids[-1]))
            batch.clear()

        for row in rows:
            if row[column]:
                batch.append(row[column])
            if len(batch) == 64:
                flush()
                if tokens >= wanted:
                    break
        if batch:
            flush()
    if not tokens:
        raise BadInput(f"--data {data}: no text in column {column!r}")
    return np.concatenate(ids), size / tokens


def _rows(data: str, column: str | None) -> tuple[Any, str]:
    import datasets

    path = Path(data)
    try:
        if path.is_dir():
            kinds = sorted({SUFFIXES[p.suffix] for p in path.rglob("*") if p.suffix in SUFFIXES})
            if len(kinds) != 1:
                raise BadInput(f"--data {data}: expected a directory with files of one kind ({', '.join(SUFFIXES)}), found {' and '.join(kinds) or 'none'}")
            files = sorted(str(p) for p in path.rglob("*") if SUFFIXES.get(p.suffix) == kinds[0])
            rows = _load(datasets, kinds[0], files)
        elif path.is_file():
            if path.suffix not in SUFFIXES:
                raise BadInput(f"--data {data}: unknown kind of file; there are {', '.join(SUFFIXES)}")
            rows = _load(datasets, SUFFIXES[path.suffix], [data])
        elif data.startswith((".", "/", "~")) or path.suffix in SUFFIXES or data.count("/") > 1:
            raise BadInput(f"--data {data}: no such file or directory")
        else:
            rows = datasets.load_dataset(data, split="train", streaming=True)
    except BadInput:
        raise
    except Exception as error:                                           # datasets raises many kinds
        raise BadInput(f"--data {data}: cannot be read: {_first_line(error)}") from error
    if column is None:
        names = [name for name, feature in (rows.features or {}).items() if getattr(feature, "dtype", None) in ("string", "large_string")]
        column = "text" if "text" in names or not names else names[0] if len(names) == 1 else None
        if column is None:
            raise BadInput(f"--data {data}: which column is the text? Give --text-column, one of {', '.join(names)}")
    elif rows.features is not None and column not in rows.features:
        raise BadInput(f"--text-column {column}: the data has {', '.join(rows.features)}")
    if rows.features is not None and column not in rows.features:
        raise BadInput(f"--data {data}: no column {column!r}; give --text-column, one of {', '.join(rows.features)}")
    return rows, column


def _load(datasets: Any, kind: str, files: list[str]) -> Any:
    if kind == "text":                                                   # whole files, line ends included
        return datasets.Dataset.from_dict({"text": [Path(f).read_text(encoding="utf-8", errors="replace") for f in files]})
    return datasets.load_dataset(kind, data_files=files, split="train")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
