"""The cache layer with which ``generate`` runs GSA layers: a :class:`~gsa_ext.layer.SlotState` that transformers takes for one of its own."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, StaticCache

from gsa_ext.hf.window import WindowState
from gsa_ext.layer import SlotState


class GSACacheLayer(SlotState, CacheLayerMixin):
    """A GSA layer's place in a transformers ``Cache``. Installs itself at the first forward pass, whatever cache the caller made."""

    window: WindowState | None                          # of layers that have a sliding window beside the slots

    def __init__(self, **kwargs: Any) -> None:
        CacheLayerMixin.__init__(self)
        SlotState.__init__(self)

    def clear(self) -> None:
        super().clear()
        self.window = None

    reset = clear

    @property
    def nbytes(self) -> int:
        return super().nbytes + sum(x.numel() * x.element_size() for x in self.window or ())

    def tensors(self) -> dict[str, torch.Tensor]:
        return super().tensors() | ({} if self.window is None else {f"window.{name}": x for name, x in self.window._asdict().items()})

    def restore(self, tensors: dict[str, torch.Tensor], seen: int) -> None:
        super().restore(tensors, seen)
        if "window.keys" in tensors:
            self.window = WindowState(*(tensors[f"window.{name}"] for name in WindowState._fields))

    def _over_batch(self, f: Any) -> None:
        super()._over_batch(f)
        if self.window is not None:
            self.window = WindowState(*map(f, self.window))

    @property
    def is_initialized(self) -> bool:
        return self.slots is not None

    @is_initialized.setter
    def is_initialized(self, value: bool) -> None:
        """transformers sets this attribute in its constructor; here it follows from the state."""

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """The state is made by the layer, at its first token."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError("this layer of the cache belongs to a GSA layer and holds no keys and values; another model cannot use this cache")


def check_cache(cache: Any) -> None:
    """Refuses caches that a model with GSA layers cannot fill."""
    if cache is None:
        return
    if not isinstance(cache, Cache):
        raise TypeError(f"past_key_values: expected a transformers Cache, given {type(cache).__name__}; pass DynamicCache() or nothing")
    if any(isinstance(layer, SlotState) and not isinstance(layer, GSACacheLayer) for layer in cache.layers):
        raise TypeError("past_key_values: has layers of gsa_ext.layer.SlotState, which are not for transformers; "
                        "load states with load_state(..., kind=gsa_ext.hf.GSACacheLayer)")
    if isinstance(cache, StaticCache) or any(getattr(layer, "is_compileable", False) for layer in cache.layers):
        raise ValueError(f"past_key_values: a {type(cache).__name__} has static layers, which models with GSA layers do not support; "
                         "use the default DynamicCache (GSA layers need constant memory in it)")


def cache_bytes(cache: Cache) -> int:
    """Bytes that ``cache`` holds: the slots of GSA layers, the keys and values of softmax layers."""
    total = 0
    layer: Any
    for layer in cache.layers:
        if isinstance(layer, SlotState):
            total += layer.nbytes
        else:
            total += sum(x.numel() * x.element_size() for x in (layer.keys, layer.values) if x is not None)
    return total
