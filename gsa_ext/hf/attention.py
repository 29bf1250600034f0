"""The attention module of converted models: an existing softmax attention's projections around Gated Slot Attention."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from gsa_ext.hf.cache import GSACacheLayer
from gsa_ext.layer import RMSNorm, layer_state, log_gate, slot_attention

if TYPE_CHECKING:
    from gsa_ext.hf.families import Family


class Tokens(NamedTuple):
    """What a GSA layer must know about the tokens of this call, found out once by the model and handed down as ``gsa_tokens``."""

    mask: Tensor | None                     # [B, T] bool, False at padding
    cu_seqlens: Tensor | None               # [N + 1], packed sequences


class GateProjection(nn.Linear):
    """``f_proj``: hidden states to one gate logit per key/value head and slot.

    Weights start normal with standard deviation ``std``. With ``half_lives=(shortest, longest)``, in tokens, there is a bias: if the weights give
    the logits the standard deviation ``spread``, and it is large, a slot is either left alone or overwritten by a token, and the biases are such that
    half of what the slots of a head hold is overwritten after so many tokens, spaced evenly on a log scale from slot to slot.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, num_slots: int, std: float, spread: float = 1.0, half_lives: tuple[float, float] | None = None,
        device: Any = None, dtype: Any = None,
    ) -> None:
        self.num_heads, self.num_slots, self.std, self.spread, self.half_lives = num_heads, num_slots, std, spread, half_lives
        super().__init__(hidden_size, num_heads * num_slots, bias=half_lives is not None, device=device, dtype=dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        init.normal_(self.weight, mean=0.0, std=self.std)
        if self.half_lives is not None:
            low, high = (math.log(x) for x in self.half_lives)
            steps = torch.linspace(low, high, self.num_slots, dtype=torch.float64) if self.num_slots > 1 else torch.tensor([high], dtype=torch.float64)
            # a logit N(b, spread) is positive, and the slot kept, with probability 2 ** (-1 / half-life)
            bias = self.spread * torch.special.ndtri(torch.exp2(-1 / steps.exp()))
            init.copy_(self.bias, bias.repeat(self.num_heads).to(self.bias.dtype))


class GSAAttention(nn.Module):
    """Gated Slot Attention in the place of a decoder layer's softmax attention.

    The projections (and whatever else the family lists) are the very modules of the attention it replaces, under the same names; new are
    ``f_proj``, the gate, and with ``settings["norm"]`` the output norm ``g_norm``. Attention dropout does not apply.

    Args:
        attention: the softmax attention module, left as it is.
        settings: one layer's entry of ``config.gsa["layers"]``.
    """

    def __init__(self, attention: nn.Module, family: Family, settings: dict[str, Any]) -> None:
        super().__init__()
        config: Any = attention.config
        self.config, self.settings = config, settings
        self.layer_idx: int = attention.layer_idx                        # type: ignore[assignment]
        self.head_dim: int = family.head_dim(attention)
        self.num_heads, self.num_kv_heads, self.num_slots = config.num_attention_heads, config.num_key_value_heads, settings["num_slots"]
        self.scale: float = settings["scale"]
        self._family = family
        self._apply_rotary = getattr(sys.modules[type(attention).__module__], family.rotary)
        for name in family.modules:
            setattr(self, name, getattr(attention, name))
        weight = getattr(self, family.modules[0]).weight
        where = {"device": weight.device, "dtype": weight.dtype}
        half_lives = settings["half_lives"] and tuple(settings["half_lives"])
        self.f_proj = GateProjection(
            config.hidden_size, self.num_kv_heads, self.num_slots, settings["gate_std"], settings["gate_spread"], half_lives, **where)
        self.g_norm = RMSNorm(self.num_heads * self.head_dim, eps=1e-5, **where) if settings["norm"] else None
        self.train(attention.training)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        gsa_tokens: Tokens | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states ``[B, T, hidden_size]`` -> ``([B, T, hidden_size], None)``. ``attention_mask``, which is between pairs of tokens, is not
        used: padding and packing come in ``gsa_tokens``."""
        mask, cu_seqlens = gsa_tokens or (None, None)
        q, k, v = self._family.project(self, hidden_states)              # [B, T, heads, head_dim]
        if self.settings["rope"] == "keep" and position_embeddings is not None:
            q, k = self._apply_rotary(q, k, *position_embeddings, unsqueeze_dim=2)
        if self.settings["silu"]:
            q, k, v = F.silu(q), F.silu(k), F.silu(v)
        g = log_gate(self.f_proj(hidden_states).unflatten(-1, (self.num_kv_heads, self.num_slots)), self.settings["gate_logit_normalizer"])
        state = None if past_key_values is None else layer_state(past_key_values, self.layer_idx, GSACacheLayer)
        o = slot_attention(q, k, v, g, self.scale, mask, state, cu_seqlens).flatten(-2)
        if self.g_norm is not None:
            o = self.g_norm(F.silu(o))
        return getattr(self, self._family.output)(o), None

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}/{self.num_kv_heads}, head_dim={self.head_dim}, num_slots={self.num_slots}"
