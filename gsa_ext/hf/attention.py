"""The attention module of converted models: an existing softmax attention's projections around Gated Slot Attention."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from gsa_ext.hf._versions import takes_cache
from gsa_ext.hf.cache import GSACacheLayer
from gsa_ext.hf.rotary import is_half_rotation, is_half_rotation_to_the_bit
from gsa_ext.hf.window import causal_attention, window_attention, window_step
from gsa_ext.layer import RMSNorm, Rotary, layer_state, linears, silu_norm, slot_attention
from gsa_ext.ops import mix

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


class WindowMix(nn.Module):
    """``window_mix``: per query head the learned share that the window has in the output, half at the start. ``weight [num_heads]`` is its logit.

    ``o, beside [..., num_heads, D]`` of one dtype -> ``o + share (beside - o)``, in one pass forward and one backward.
    """

    def __init__(self, num_heads: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_heads, device=device, dtype=dtype))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        init.zeros_(self.weight)

    def forward(self, o: Tensor, beside: Tensor) -> Tensor:
        share = torch.sigmoid(self.weight).to(o.dtype)
        if torch.compiler.is_compiling():                                # a compiler sees through the formula
            return torch.lerp(o, beside, share[:, None])
        return mix(o, beside, share)


class GSAAttention(nn.Module):
    """Gated Slot Attention in the place of a decoder layer's softmax attention.

    The projections (and the norms of q and k, where there are some) are the very modules of the attention it replaces, under the same names; new are
    ``f_proj``, the gate (with ``gate="proj"``), ``g_norm``, the output norm (with ``norm``) and ``window_mix`` (with ``mix="learned"``).
    Attention dropout does not apply.

    Args:
        layer: the decoder layer with the softmax attention; left as it is.
        settings: one layer's entry of ``config.gsa["layers"]``.
    """

    def __init__(self, layer: nn.Module, family: Family, settings: dict[str, Any]) -> None:
        super().__init__()
        attention: Any = getattr(layer, family.attention)
        config: Any = attention.config
        self.config, self.settings = config, settings
        self.layer_idx: int = attention.layer_idx
        self.head_dim: int = family.head_dim(attention)
        self.num_heads, self.num_kv_heads = family.heads(config)
        self.num_slots: int = settings["num_slots"]
        self.scale: float = settings["scale"]
        self.window: int | None = settings.get("window")
        floor = settings.get("gate_floor")                               # absent from models that were converted before there was one
        kept = None if floor is None else math.exp(floor * settings["gate_logit_normalizer"])
        self.lowest_logit = None if kept is None else math.log(kept / (1 - kept))
        self.softmax_scale: float = attention.scaling
        self.softmax_window = family.window(attention)
        self.clip: float | None = getattr(config, "clip_qkv", None)      # of q, k and v; each look at a config of transformers takes microseconds
        self.rotates = family.rotates(attention)
        self._family = family
        self.apply_rotary = getattr(sys.modules[type(attention).__module__], family.rotary)
        self.rotates_halves = is_half_rotation(self.apply_rotary)
        self.step_rotates = is_half_rotation_to_the_bit(self.apply_rotary)
        for name in (*family.modules, *family.norms):
            if hasattr(attention, name):
                setattr(self, name, getattr(attention, name))
        where = _place(getattr(getattr(attention, family.modules[0]), "weight", None), layer, config)
        self.f_proj: GateProjection | None = None
        if settings["gate"] == "proj":
            half_lives = settings["half_lives"] and tuple(settings["half_lives"])
            self.f_proj = GateProjection(
                config.hidden_size, self.num_kv_heads, self.num_slots, settings["gate_std"], settings["gate_spread"], half_lives, **where)
        self.g_norm = RMSNorm(self.num_heads * self.head_dim, eps=1e-5, **where) if settings["norm"] else None
        self.window_mix = WindowMix(self.num_heads, **where) if settings.get("mix") == "learned" else None
        self.instead: Callable[..., Tensor] | None = None                # what training puts in the place of slots_output for a while
        self.train(attention.training)

    @property
    def projections(self) -> tuple[str, ...]:
        """The names of the input projections."""
        return self._family.modules[:-1]

    @takes_cache
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | Tokens | None = None,
        past_key_values: Any = None,
        gsa_tokens: Tokens | None = None,
        layer_past: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states ``[B, T, hidden_size]`` -> ``([B, T, hidden_size], None)``. ``attention_mask``, which is between pairs of tokens, is not
        used: padding and packing come in ``gsa_tokens``, or in its place. ``layer_past`` is another name for ``past_key_values``."""
        tokens = attention_mask if gsa_tokens is None and isinstance(attention_mask, Tokens) else gsa_tokens
        past_key_values = layer_past if past_key_values is None else past_key_values
        if self.instead is None:
            return self.slots_output(hidden_states, position_embeddings, tokens, past_key_values), None
        if past_key_values is not None:
            raise ValueError("softmax attention in the place of GSA layers has no cache: pass use_cache=False")
        return self.instead(hidden_states, position_embeddings, tokens), None

    def slots_output(self, hidden_states: Tensor, position_embeddings: Any = None, tokens: Tokens | None = None, past_key_values: Any = None) -> Tensor:
        """What this layer makes of ``hidden_states``: ``[B, T, hidden_size]``."""
        mask, cu_seqlens = tokens or (None, None)
        state = None if past_key_values is None else cast(GSACacheLayer, layer_state(past_key_values, self.layer_idx, GSACacheLayer))
        inputs = [getattr(self, name) for name in self.projections]
        gate = [] if self.f_proj is None or self._family.input_norm is None else [self.f_proj]
        outputs = linears(hidden_states, *inputs, *gate)
        q, k, v = self._family.divide(self, outputs[:len(inputs)])       # [B, T, heads, head_dim]
        if self.f_proj is not None and not gate:                         # the gate wants inputs of known size
            outputs.append(self.f_proj(F.rms_norm(hidden_states, hidden_states.shape[-1:])))
        gate_logits = self._key_logits(k) if self.f_proj is None else outputs[-1].unflatten(-1, (self.num_kv_heads, self.num_slots))
        turn, rotary, rotated, beside = None, None, None, None
        if self.rotates and self.step_rotates and position_embeddings is not None:
            turn = Rotary(position_embeddings[0], position_embeddings[1], lambda q, k: self._rotated(q, k, position_embeddings))
        if self.window is not None:
            past, step = None if state is None else state.window, None
            alone = q.shape[1] == 1 and state is not None and cu_seqlens is None and not (torch.is_grad_enabled() and (q.requires_grad or v.requires_grad))
            if alone and (turn is not None or not self.rotates):
                step = window_step(q, k, v, self.window, self.softmax_scale, mask, past, turn)
            if step is None:
                rotated = self._rotated(q, k, position_embeddings)
                step = window_attention(
                    *rotated, v, self.window, self.softmax_scale, mask, past, cu_seqlens, keep=state is not None)      # type: ignore[misc, assignment]
            beside, kept = step                                              # type: ignore[misc]
            if state is not None:
                state.window = kept
        if self.settings["rope"] == "keep":
            if rotated is None and turn is not None:
                rotary = turn
            else:
                q, k = self._rotated(q, k, position_embeddings) if rotated is None else rotated
        silu, normalizer = self.settings["silu"], self.settings["gate_logit_normalizer"]
        o = slot_attention(q, k, v, gate_logits, normalizer, self.scale, mask, state, cu_seqlens, silu, silu, rotary, self.lowest_logit)
        if beside is not None:
            o = torch.lerp(o, beside, self.settings["mix"]) if self.window_mix is None else self.window_mix(o, beside)
        o = o.flatten(-2)
        if self.g_norm is not None:
            o = silu_norm(o, self.g_norm)
        return getattr(self, self._family.output)(o)

    def softmax_output(self, hidden_states: Tensor, position_embeddings: Any = None, tokens: Tokens | None = None) -> Tensor:
        """What the softmax attention that was here makes of ``hidden_states``, with the projections as they are now: ``[B, T, hidden_size]``.
        The target of attention transfer; time quadratic in T unless the model has a sliding window of its own."""
        mask, cu_seqlens = tokens or (None, None)
        q, k, v = self._family.divide(self, linears(hidden_states, *(getattr(self, name) for name in self.projections)))
        q, k = self._rotated(q, k, position_embeddings)
        if self.softmax_window is not None and self.softmax_window < q.shape[1]:
            o = window_attention(q, k, v, self.softmax_window, self.softmax_scale, mask, None, cu_seqlens)[0]
        else:
            o = causal_attention(q, k, v, self.softmax_scale, mask, cu_seqlens)
        return getattr(self, self._family.output)(o.flatten(-2))

    def _rotated(self, q: Tensor, k: Tensor, position_embeddings: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        return self._family.rotate(self, q, k, *position_embeddings) if self.rotates and position_embeddings is not None else (q, k)

    def _key_logits(self, k: Tensor) -> Tensor:
        """``[B, T, kv heads, slots]``."""
        if self.head_dim % self.num_slots == 0:
            return k if self.num_slots == self.head_dim else k.unflatten(-1, (self.num_slots, -1)).mean(-1)
        return F.adaptive_avg_pool1d(k.flatten(0, 1), self.num_slots).unflatten(0, k.shape[:2])

    def extra_repr(self) -> str:
        beside = "" if self.window is None else f", window={self.window}"
        return f"heads={self.num_heads}/{self.num_kv_heads}, head_dim={self.head_dim}, num_slots={self.num_slots}{beside}"


def _place(weight: Any, layer: nn.Module, config: Any) -> dict[str, Any]:
    """Device and dtype of new parameters: those of the projection ``weight`` or, where it is quantised, of the first norm in the decoder layer."""
    candidates = [weight, *(p for name, p in layer.named_parameters() if "norm" in name), *layer.parameters()]
    tensors = [x for x in candidates if isinstance(x, Tensor)]
    for x in tensors:
        if x.dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            return {"device": x.device, "dtype": x.dtype}
    dtype = getattr(config, "dtype", None)
    return {"device": tensors[0].device if tensors else None, "dtype": dtype if isinstance(dtype, torch.dtype) else None}
