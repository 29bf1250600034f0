"""Gated Slot Attention language models as they are on the hub: ``GSAConfig``, ``GSAModel``, ``GSAForCausalLM`` (model_type "gsa").

Parameter names and settings are those of the public checkpoints (fla-hub/gsa-1.3B-100B and others), so that these load as they are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from gsa_ext.hf._versions import CACHE, takes_cache
from gsa_ext.hf.attention import Tokens
from gsa_ext.hf.cache import GSACacheLayer
from gsa_ext.hf.families import Call, GSAModelMixin
from gsa_ext.hf.window import attention_over, causal_attention, window_attention
from gsa_ext.layer import GatedSlotAttention, RMSNorm, layer_state

MISSPELT = {"exapnd_k": "expand_k", "exapnd_v": "expand_v"}                  # in configurations on the hub
ATTENTION = {"num_kv_heads": None, "qkv_bias": False, "window_size": None, "rope_theta": 10000.0}     # defaults of an `attn` entry


class GSAConfig(PreTrainedConfig):
    """Settings of a GSA language model.

    Args:
        hidden_size, num_hidden_layers, vocab_size, initializer_range: as usual.
        num_heads, num_kv_heads: query heads and key/value heads (None: as many).
        num_slots: slots per key/value head; None: the head dimension of q and k.
        expand_k, expand_v: total width of q and v as multiples of hidden_size (``exapnd_k``, ``exapnd_v`` on the hub).
        gate_logit_normalizer, feature_map ("swish", "relu", "t2r"), use_short_conv, conv_size: as in :class:`gsa_ext.GatedSlotAttention`.
        elementwise_affine: whether the output norm inside the mixer has weights.
        hidden_ratio, intermediate_size: width of the MLP; None: two thirds of ``hidden_size * hidden_ratio``, rounded up to a multiple of 256.
        norm_eps: of the norms between the blocks. (The one inside the mixer has 1e-5 whatever is said here, as in the peer's layer.)
        attn: softmax layers: ``{"layers": [...], "num_heads": ..., "num_kv_heads", "qkv_bias", "window_size", "rope_theta"}``, or a list of these.

    Keys of older and newer configurations that change nothing (``fuse_norm``, ``mode``, ...) are kept and ignored.

    Raises:
        ValueError: a value that cannot be. NotImplementedError: ``attnres_block_size``, an activation other than swish.
    """

    model_type = "gsa"
    keys_to_ignore_at_inference = [CACHE]

    hidden_size: int = 2048
    num_hidden_layers: int = 24
    num_heads: int = 4
    num_kv_heads: int | None = None
    num_slots: int | None = 64
    expand_k: int | float = 1.0
    expand_v: int | float = 1.0
    gate_logit_normalizer: int | float | None = 8
    feature_map: str = "swish"
    use_short_conv: bool = False
    conv_size: int = 4
    elementwise_affine: bool | None = True
    norm_eps: float = 1e-6
    hidden_ratio: int | float | None = 4
    intermediate_size: int | None = None
    hidden_act: str = "swish"
    attn: Any = None
    vocab_size: int = 32000
    max_position_embeddings: int | None = 2048
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        for wrong, right in MISSPELT.items():
            if wrong in kwargs:
                value = kwargs.pop(wrong)
                if getattr(self, right) == 1:                                # both may be there; then the right one holds
                    setattr(self, right, value)
        if kwargs.get("attnres_block_size") is not None:
            raise NotImplementedError("attnres_block_size: attention residuals are not supported; use a model without them")
        if self.hidden_act not in ("swish", "silu"):
            raise NotImplementedError(f"hidden_act: expected 'swish', given {self.hidden_act!r}")
        self.gate_logit_normalizer = 8 if self.gate_logit_normalizer is None else self.gate_logit_normalizer
        for entry in self._attention():
            if not isinstance(entry, dict) or "layers" not in entry or "num_heads" not in entry:
                raise ValueError(f"attn: expected a dictionary with 'layers' and 'num_heads', or a list of such, given {entry!r}")
            if any(not isinstance(i, int) or not 0 <= i < self.num_hidden_layers for i in entry["layers"]):
                raise ValueError(f"attn: expected layers from 0 to {self.num_hidden_layers - 1}, given {entry['layers']}")
        super().__post_init__(**kwargs)

    def _attention(self) -> list[Any]:
        return self.attn if isinstance(self.attn, list) else [] if self.attn is None else [self.attn]

    def softmax_layer(self, i: int) -> dict[str, Any] | None:
        """The settings of layer ``i`` if it is a softmax layer."""
        return next(({**ATTENTION, **entry} for entry in self._attention() if i in entry["layers"]), None)

    @property
    def mlp_size(self) -> int:
        if self.intermediate_size is not None:
            return self.intermediate_size
        return -(-int(self.hidden_size * (self.hidden_ratio or 4) * 2 / 3) // 256) * 256

    @classmethod
    def register_for_auto_class(cls, *args: Any, **kwargs: Any) -> None:
        """As that of the models: a saved model brings its own module."""

    # other libraries ask by these names
    @property
    def num_attention_heads(self) -> int:
        return self.num_heads

    @property
    def num_key_value_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_dim(self) -> int:
        return int(self.hidden_size * self.expand_k) // self.num_heads


class GatedMLP(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class SoftmaxAttention(nn.Module):
    """The softmax layers of hybrid models: rotary positions, all earlier tokens or a window of them."""

    def __init__(self, config: GSAConfig, settings: dict[str, Any], layer_idx: int) -> None:
        super().__init__()
        size, self.num_heads = config.hidden_size, settings["num_heads"]
        kv_heads = settings["num_kv_heads"] or self.num_heads
        if size % self.num_heads or self.num_heads % kv_heads:
            raise ValueError(f"attn: num_heads = {self.num_heads} must divide hidden_size = {size} and be a multiple of num_kv_heads = {kv_heads}")
        self.head_dim, self.layer_idx = size // self.num_heads, layer_idx
        self.window, self.rope_theta = settings["window_size"], settings["rope_theta"]
        bias = settings["qkv_bias"]
        self.q_proj = nn.Linear(size, size, bias=bias)
        self.k_proj = nn.Linear(size, kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(size, kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(size, size, bias=False)

    def forward(self, x: Tensor, tokens: Tokens, attention_mask: Tensor | None, cache: Any) -> Tensor:
        mask, cu_seqlens = tokens
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        seen = 0 if cache is None else cache.get_seq_length(self.layer_idx)
        q, k = self._rotate(q, k, seen)
        scale = self.head_dim ** -0.5
        if self.window is not None:
            state: Any = None if cache is None else layer_state(cache, self.layer_idx, GSACacheLayer)
            o, kept = window_attention(q, k, v, self.window, scale, mask, None if state is None else state.window, cu_seqlens, keep=state is not None)
            if state is not None:
                state.window, state.seen = kept, seen + x.shape[1]
        elif cache is None:
            o = causal_attention(q, k, v, scale, mask, cu_seqlens)
        else:
            k, v = (y.transpose(1, 2) for y in cache.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_idx))
            if attention_mask is not None and attention_mask.shape[1] != k.shape[1]:
                raise ValueError(f"attention_mask: a model with full softmax layers needs the mask of all {k.shape[1]} tokens, "
                                 f"given {list(attention_mask.shape)}")
            o = attention_over(q, k, v, scale, None if attention_mask is None else attention_mask.bool())
        return self.o_proj(o.flatten(-2))

    def _rotate(self, q: Tensor, k: Tensor, seen: int) -> tuple[Tensor, Tensor]:
        """Only differences of positions count: padding and packed sequences need nothing of their own."""
        n = self.head_dim // 2
        frequency = self.rope_theta ** (-torch.arange(n, device=q.device, dtype=torch.float32) / n)
        angle = torch.arange(seen, seen + q.shape[1], device=q.device, dtype=torch.float32)[:, None, None] * frequency
        cos, sin = angle.cos(), angle.sin()

        def turn(x: Tensor) -> Tensor:
            a, b = x.float().chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)

        return turn(q), turn(k)


class GSABlock(GradientCheckpointingLayer):
    """Norm, mixer, norm, MLP."""

    def __init__(self, config: GSAConfig, layer_idx: int) -> None:
        super().__init__()
        softmax = config.softmax_layer(layer_idx)
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attn: nn.Module
        if softmax is not None:
            self.attn = SoftmaxAttention(config, softmax, layer_idx)
        else:
            assert config.gate_logit_normalizer is not None
            self.attn = GatedSlotAttention(
                hidden_size=config.hidden_size, num_heads=config.num_heads, num_kv_heads=config.num_kv_heads, num_slots=config.num_slots,
                expand_k=config.expand_k, expand_v=config.expand_v, feature_map=config.feature_map, use_short_conv=config.use_short_conv,
                conv_size=config.conv_size, gate_logit_normalizer=config.gate_logit_normalizer, elementwise_affine=bool(config.elementwise_affine),
                norm_eps=1e-5, layer_idx=layer_idx)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.mlp_size)

    @takes_cache
    def forward(self, x: Tensor, tokens: Tokens, attention_mask: Tensor | None = None, past_key_values: Any = None) -> Tensor:
        y = self.attn_norm(x)
        if isinstance(self.attn, GatedSlotAttention):
            y = self.attn(y, tokens.mask, past_key_values, cu_seqlens=tokens.cu_seqlens)[0]
        else:
            y = self.attn(y, tokens, attention_mask, past_key_values)
        x = x + y
        return x + self.mlp(self.mlp_norm(x))


class GSAPreTrainedModel(GSAModelMixin, PreTrainedModel):
    config: GSAConfig
    config_class = GSAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GSABlock"]
    _skip_keys_device_placement = [CACHE]
    _input_embed_layer = "embeddings"
    _can_record_outputs = {"hidden_states": GSABlock}


class GSAModel(GSAPreTrainedModel):
    """The model without its head. See :class:`GSAForCausalLM`."""

    def __init__(self, config: GSAConfig) -> None:
        super().__init__(config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([GSABlock(config, i) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @takes_cache
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """input_ids ``[B, T]`` or inputs_embeds ``[B, T, hidden_size]``. Padding: ``attention_mask [B, T]`` (``[B, seen + T]`` with a cache). Packing
        (B = 1): any one of ``cu_seq_lens_q [N + 1]`` (also by the name ``cu_seqlens``), ``seq_idx [1, T]``, or ``position_ids`` that restart."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        x = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if kwargs.get("cu_seqlens") is not None:
            kwargs["cu_seq_lens_q"] = kwargs["cu_seqlens"]
        call = Call(x.shape[0], x.shape[1], attention_mask, position_ids, past_key_values, use_cache, kwargs, train=self.training)
        if past_key_values is None and (self.config.use_cache if call.use_cache is None else call.use_cache):
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None:
            for i, layer in enumerate(self.layers):                          # transformers would put a layer for keys and values there
                if not isinstance(layer.attn, SoftmaxAttention) or layer.attn.window is not None:
                    layer_state(past_key_values, i, GSACacheLayer)
        for layer in self.layers:
            x = layer(x, tokens=call.tokens, attention_mask=attention_mask, **{CACHE: past_key_values})
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), **{CACHE: past_key_values})


class GSAForCausalLM(GSAPreTrainedModel, GenerationMixin):
    """A GSA language model. ``generate`` with a cache of constant size (hybrids with full softmax layers excepted)."""

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}

    def __init__(self, config: GSAConfig) -> None:
        super().__init__(config)
        self.model = GSAModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As :class:`GSAModel`. ``labels [B, T]``, -100 where there is none: adds the loss. ``logits_to_keep``: the last so many positions, 0 for all."""
        outputs: Any = self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values,
                                  inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None if labels is None else self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions,
                                      **{CACHE: getattr(outputs, CACHE)})
