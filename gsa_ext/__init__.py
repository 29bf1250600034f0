"""Gated Slot Attention for PyTorch: the ops, and the layer. ``gsa_ext.hf`` (needs transformers) turns Transformers into GSA models."""

from gsa_ext import _load
from gsa_ext.layer import GatedSlotAttention
from gsa_ext.ops import chunk_gsa, fused_recurrent_gsa, gsa_step

__all__ = ["GatedSlotAttention", "chunk_gsa", "fused_recurrent_gsa", "gsa_step", "set_checks"]
__version__ = "0.1.0"


def set_checks(enabled: bool) -> None:
    """Switches on (or off) checks that cost a device synchronisation: contents of cu_seqlens and state_indices on the GPU.

    Off by default: CUDA contents are then memory-safe but not looked at, and CPU contents are always checked.
    """
    _load.library().set_checks(enabled)
