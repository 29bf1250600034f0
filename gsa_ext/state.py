"""What a model remembers of a sequence, kept in a file: a prompt is read once, and generation goes on from it whenever, as often, and wherever."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from torch import Tensor

from gsa_ext.layer import SlotCache, SlotState, layer_state

FORMAT = "gsa_ext state 1"


def save_state(cache: Any, path: str | os.PathLike[str], metadata: dict[str, str] | None = None) -> None:
    """Writes the states of all layers of ``cache`` to a safetensors file, bit for bit.

    Args:
        cache: a :class:`~gsa_ext.layer.SlotCache` or a transformers ``DynamicCache``; layers of keys and values (softmax attention) are kept too.
        path: where the file goes.
        metadata: strings that :func:`load_metadata` gives back, such as the model's name or the prompt.

    Raises:
        TypeError: not a cache, or a layer that is neither slots nor plain keys and values. ImportError: safetensors is missing.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    about: list[dict[str, Any]] = []
    layers = getattr(cache, "layers", None)
    if not isinstance(layers, list):
        raise TypeError(f"cache: expected a gsa_ext.layer.SlotCache or a transformers Cache, given {type(cache).__name__}")
    for i, layer in enumerate(layers):
        if isinstance(layer, SlotState):
            held = layer.tensors()
            if sum(x.numel() * x.element_size() for x in held.values()) != layer.nbytes:
                raise TypeError(f"cache: layer {i} ({type(layer).__name__}) holds more than its tensors() gives; its class has to add what it keeps")
            about.append({"kind": "slots", "seen": layer.seen})
        elif type(layer).__name__ == "DynamicLayer":
            full = layer.get_seq_length() > 0
            held = {"keys": layer.keys, "values": layer.values} if full else {}
            about.append({"kind": "keys and values"})
        else:
            raise TypeError(f"cache: layer {i} is a {type(layer).__name__}; only slots and the layers of a DynamicCache can be saved")
        tensors.update({f"{i}.{name}": x.detach().contiguous() for name, x in held.items()})
    save_file(tensors, path, {**(metadata or {}), "format": FORMAT, "layers": json.dumps(about)})


def load_state(path: str | os.PathLike[str], device: torch.device | str = "cpu", cache: Any = None, kind: type[SlotState] = SlotState) -> Any:
    """The cache that :func:`save_state` has written. Nothing in the file is ever executed.

    Args:
        path: of the file.
        device: where the tensors go.
        cache: an empty cache to fill, such as a transformers ``DynamicCache()``; None: a new :class:`~gsa_ext.layer.SlotCache`.
        kind: class of the layers with slots.

    Returns:
        ``cache``.

    Raises:
        ValueError: not a file of save_state, a file with layers of keys and values for a SlotCache, or a cache that is not empty.
    """
    from safetensors import safe_open

    cache = SlotCache() if cache is None else cache
    if any(layer.get_seq_length() > 0 for layer in cache.layers):
        raise ValueError("cache: holds tokens already; give an empty one")
    about = json.loads(_metadata(path)["layers"])
    with safe_open(path, "pt", device=str(torch.device(device))) as file:
        held: list[dict[str, Tensor]] = [{} for _ in about]
        for name in file.keys():
            layer, _, part = name.partition(".")
            held[int(layer)][part] = file.get_tensor(name)
    for i, (layer_about, tensors) in enumerate(zip(about, held)):
        if layer_about["kind"] == "slots":
            layer_state(cache, i, kind).restore(tensors, layer_about["seen"])
        elif not hasattr(cache, "update"):
            raise ValueError(f"{path}: layer {i} has keys and values, which a {type(cache).__name__} has no place for; give cache=transformers.DynamicCache()")
        elif tensors:
            cache.update(tensors["keys"], tensors["values"], i)
    return cache


def load_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The ``metadata`` that a file of :func:`save_state` was given."""
    return {name: value for name, value in _metadata(path).items() if name not in ("format", "layers")}


def _metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from None
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: expected a file of gsa_ext.state.save_state ({FORMAT!r}), its format is {metadata.get('format')!r}")
    return metadata
