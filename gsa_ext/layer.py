"""``GatedSlotAttention``, the token mixer of the paper, and the constant-size cache that any GSA layer decodes with. Needs torch alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gsa_ext.ops import chunk_gsa, conv_step_of_token, step_of_token
from gsa_ext.ops import silu_norm as silu_norm_op


class SlotState:
    """What one layer remembers between calls: the slots, the last inputs of its short convolutions, and how many tokens went by.

    Its size does not depend on how many those were. The methods are those that Hugging Face asks of a cache layer; the number of tokens
    includes padding.

    Attributes:
        slots: ``(Hk [B, H, K, M], Hv [B, H, M, V])`` in fp32 (fp64 for fp64 models), or None before the first token.
        conv: for q, k and v the last ``conv_size - 1`` inputs ``[B, conv_size - 1, D]``, or None.
        seen: number of tokens seen.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, **kwargs: Any) -> None:
        self.clear()

    def clear(self) -> None:
        self.slots: tuple[Tensor, Tensor] | None = None
        self.conv: tuple[Tensor, ...] | None = None
        self.seen = 0

    reset = clear

    @property
    def is_initialized(self) -> bool:
        return self.slots is not None

    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
        return sum(x.numel() * x.element_size() for x in (*(self.slots or ()), *(self.conv or ())))

    def tensors(self) -> dict[str, Tensor]:
        """Everything held but ``seen``, by name: what ``gsa_ext.state`` saves and :meth:`restore` takes."""
        named = dict(zip(("hk", "hv"), self.slots or ()))
        return {**named, **{f"conv.{i}": x for i, x in enumerate(self.conv or ())}}

    def restore(self, tensors: dict[str, Tensor], seen: int) -> None:
        self.clear()
        if "hk" in tensors:
            self.slots = (tensors["hk"], tensors["hv"])
        conv = [tensors[name] for name in sorted(tensors) if name.startswith("conv.")]
        self.conv = tuple(conv) or None
        self.seen = seen

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1                                       # unbounded

    get_max_cache_shape = get_max_length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._over_batch(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._over_batch(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._over_batch(lambda x: x[indices.to(x.device)].contiguous())

    def crop(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            "a GSA cache cannot be cropped: slots do not remember single tokens, so tokens cannot be taken back. "
            "Assisted (speculative) decoding and prompt lookup are not possible with GSA layers; generate without them."
        )

    def activate_past_recording(self) -> None:
        self.crop()                                     # asked for by assisted decoding, so that it can crop later

    def offload(self) -> None:
        """Nothing to do: the state is small and read at every token."""

    prefetch = offload

    def _over_batch(self, f: Any) -> None:
        if self.slots is not None:
            self.slots = (f(self.slots[0]), f(self.slots[1]))
        if self.conv is not None:
            self.conv = tuple(f(x) for x in self.conv)


class SlotCache:
    """The states of a model's GSA layers by ``layer_idx``: ``past_key_values`` for models that do not use transformers."""

    def __init__(self) -> None:
        self.layers: list[Any] = []

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.layers[layer_idx].get_seq_length() if layer_idx < len(self.layers) else 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for layer in self.layers:
            layer.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        for layer in self.layers:
            layer.batch_repeat_interleave(repeats)

    def reset(self) -> None:
        for layer in self.layers:
            layer.reset()


def layer_state(cache: Any, layer_idx: int | None, kind: type[SlotState] = SlotState) -> SlotState:
    """The state of layer ``layer_idx`` in ``cache``, put there if that place is still empty.

    ``cache`` is anything with a list ``layers``: a :class:`SlotCache`, or a cache of transformers, whose unused key/value layer is replaced.

    Raises:
        ValueError: no ``layer_idx``, or the layer of the cache already holds keys and values. TypeError: not a cache.
    """
    layers = getattr(cache, "layers", None)
    if not isinstance(layers, list):
        raise TypeError(f"past_key_values: expected a gsa_ext.layer.SlotCache or a transformers Cache, given {type(cache).__name__}")
    if layer_idx is None:
        raise ValueError("layer_idx is None: a layer that is used with a cache must know its place; pass layer_idx=0, 1, ... to its constructor")
    replicate = getattr(cache, "layer_class_to_replicate", None) or kind
    while len(layers) <= layer_idx:
        layers.append(kind() if len(layers) == layer_idx else replicate())
    if not isinstance(layers[layer_idx], SlotState):
        if layers[layer_idx].get_seq_length() > 0:
            raise ValueError(f"past_key_values: layer {layer_idx} already holds keys and values, but is a GSA layer; start from an empty cache")
        layers[layer_idx] = kind()
    return layers[layer_idx]


def token_mask(attention_mask: Tensor, batch: int, tokens: int, seen: int = 0) -> Tensor:
    """The columns of a 0/1 padding mask ``[B, T]`` or ``[B, seen + T]`` that belong to the current tokens, as bool ``[B, T]``."""
    if attention_mask.ndim != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] not in (tokens, seen + tokens):
        expected = f"[B, T] = [{batch}, {tokens}]" + (f" or [B, seen + T] = [{batch}, {seen + tokens}]" if seen else "")
        raise ValueError(f"attention_mask: expected a padding mask of zeros and ones of shape {expected}, given {list(attention_mask.shape)}; "
                         "masks between pairs of tokens mean nothing to a recurrent layer")
    return attention_mask[:, attention_mask.shape[1] - tokens:].bool()


class Rotary(NamedTuple):
    """A rotation of q and k, not yet applied: their first n components by ``x cos + (-x2, x1) sin``, where x1 and x2 are the halves of x."""

    cos: Tensor                             # [B or 1, T, n]
    sin: Tensor
    apply: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]      # q, k -> q, k: the same, wherever it is not done inside a kernel

    def in_kernel(self, q: Tensor) -> bool:
        return self.cos.ndim == 3 and self.cos.dtype == q.dtype and self.cos.shape[-1] % 2 == 0


def slot_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate_logits: Tensor,
    gate_normalizer: float,
    scale: float | None = None,
    mask: Tensor | None = None,
    state: SlotState | None = None,
    cu_seqlens: Tensor | None = None,
    silu_qk: bool = False,
    silu_v: bool = False,
    rotary: Rotary | None = None,
    lowest_logit: float | None = None,
) -> Tensor:
    """Gated Slot Attention with a coupled write, padding, and a state that is carried on: what every GSA layer does between its projections.
    A single token with a state is one kernel.

    Args:
        q: ``[B, T, HQ, K]``; k: ``[B, T, H, K]``; v: ``[B, T, H, V]``; gate_logits: ``[B, T, H, M]``, for gates :func:`log_gate` of it and ``gate_normalizer``.
        scale: factor on the slot logits, None for ``K ** -0.5``.
        mask: bool ``[B, T]``, False at padding: such a token leaves the slots as they are, bit for bit.
        state: read and replaced by the state after the last token. It carries no gradient.
        cu_seqlens: ``[N + 1]``, packed sequences (B = 1). With a state, which must be fresh, the last sequence's is kept.
        silu_qk, silu_v: silu on q and k, on v.
        rotary: what is done to q and k before that.
        lowest_logit: gate logits below it count as it.

    Returns:
        ``[B, T, HQ, V]`` in q's dtype. At padding its values are finite and mean nothing.
    """
    if cu_seqlens is not None and state is not None and state.slots is not None:
        raise ValueError("packed sequences cannot continue a cache that holds tokens; start from an empty cache, or pass the sequences one by one")
    T, gradients = q.shape[1], torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, gate_logits))
    if T == 1 and state is not None and cu_seqlens is None and not gradients:
        if state.slots is None:
            (B, _, H, K), V, M = k.shape, v.shape[-1], gate_logits.shape[-1]
            dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
            state.slots = (q.new_zeros(B, H, K, M, dtype=dtype), q.new_zeros(B, H, M, V, dtype=dtype))
        cos = sin = None
        if rotary is not None and rotary.in_kernel(q):
            cos, sin = rotary.cos, rotary.sin
        elif rotary is not None:
            q, k = rotary.apply(q, k)
        if lowest_logit is not None:
            gate_logits = gate_logits.clamp(min=lowest_logit)
        o = step_of_token(q, k, v, None, gate_logits, *state.slots, None, scale, None, mask, gate_normalizer, cos, sin, silu_qk, silu_v)
        state.seen += 1
        return o

    if rotary is not None:
        q, k = rotary.apply(q, k)
    g = log_gate(gate_logits, gate_normalizer, lowest_logit, mask)
    if silu_qk:
        q, k = F.silu(q), F.silu(k)
    if silu_v:
        v = F.silu(v)
    if state is None:
        return chunk_gsa(q, k, v, None, g, scale, cu_seqlens=cu_seqlens)[0]
    o, final = chunk_gsa(q, k, v, None, g, scale, initial_state=state.slots, output_final_state=True, cu_seqlens=cu_seqlens)
    assert final is not None
    hk, hv = (x.detach() for x in final)
    state.slots = (hk, hv) if cu_seqlens is None else (hk[-1:].clone(), hv[-1:].clone())
    state.seen += T
    return o


def linears(x: Tensor, *modules: nn.Module) -> list[Tensor]:
    """``module(x)`` of each. Where all are plain linear maps, what they send back to x in backward is summed inside the matrix products instead of in
    passes of its own over something as large as x; and autocast's copy of x in 16 bits is made once instead of for each. A compiler makes one pass
    of the sums, and of these products copies."""
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and x.requires_grad and all(_plain(m) for m in modules)):
        return [module(x) for module in modules]
    parameters = [p for m in modules for p in (m.weight, m.bias)]
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, parameters = x.to(dtype), [None if p is None else p.to(dtype) for p in parameters]
    if any(p is not None and p.dtype != x.dtype for p in parameters):
        return [module(x) for module in modules]
    return list(_Linears.apply(x, *parameters))


def _plain(module: Any, kind: type[nn.Module] = nn.Linear) -> bool:
    """Whether calling ``module`` is what ``kind`` does and nothing else: no adapter, quantisation, hook or sharded weight."""
    return (isinstance(module, kind) and type(module).forward is kind.forward and type(module.weight) in (nn.Parameter, Tensor, type(None))
            and "forward" not in module.__dict__
            and not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks))


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor | None) -> tuple[Tensor, ...]:      # type: ignore[override]
        weights, biases = parameters[::2], parameters[1::2]
        ctx.save_for_backward(x, *weights)
        ctx.biased = [bias is not None for bias in biases]
        return tuple(F.linear(x, weight, bias) for weight, bias in zip(weights, biases))     # type: ignore[arg-type]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:                     # type: ignore[override]
        x, *weights = ctx.saved_tensors
        rows, dx = x.reshape(-1, x.shape[-1]), None
        found: list[Tensor | None] = []
        for i, (grad, weight) in enumerate(zip(grads, weights)):
            grad = grad.reshape(-1, grad.shape[-1])
            dx = grad @ weight if dx is None else dx.addmm_(grad, weight)
            found.append(grad.T @ rows if ctx.needs_input_grad[1 + 2 * i] else None)
            found.append(grad.sum(0) if ctx.biased[i] and ctx.needs_input_grad[2 + 2 * i] else None)
        return dx.view(x.shape) if dx is not None else None, *found


def log_gate(logits: Tensor, normalizer: float, lowest: float | None = None, mask: Tensor | None = None) -> Tensor:
    """``logsigmoid(logits) / normalizer`` in fp32 (fp64 stays fp64): in 16 bits the write strength ``1 - exp(g)`` would vanish for slow slots.

    logits ``[B, T, ...]``; below ``lowest`` they count as it and get no gradient. mask: bool ``[B, T]``; where it is False g and the write strength are 0.
    """
    if not torch.compiler.is_compiling():  # a compiler sees through the formula
        return torch.ops.gsa.log_gate(logits, normalizer, lowest, mask)
    if lowest is not None:
        logits = logits.clamp(min=lowest)
    g = F.logsigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32)))
    g = g if normalizer == 1 else g / normalizer
    return g if mask is None else g.masked_fill(~mask.view(*mask.shape, *(1,) * (g.ndim - 2)), 0.0)


class RMSNorm(nn.Module):
    """``x / rms(x) * weight`` over the last dimension, computed in fp32, returned in x's dtype. ``weight`` is absent without ``elementwise_affine``."""

    def __init__(self, size: int, eps: float = 1e-5, elementwise_affine: bool = True, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.weight: nn.Parameter | None
        self.register_parameter("weight", nn.Parameter(torch.ones(size, device=device, dtype=dtype)) if elementwise_affine else None)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is None or self.weight.dtype == x.dtype:
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)    # one kernel
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * self.weight).to(x.dtype)


def silu_norm(o: Tensor, norm: nn.Module) -> Tensor:
    """``norm(silu(o))``; where ``norm`` is a plain :class:`RMSNorm` with a weight of o's dtype, in one pass forward and one backward, rounded once."""
    if torch.compiler.is_compiling() or not _plain(norm, RMSNorm):       # a compiler sees through the formula
        return norm(F.silu(o))
    weight: Any = norm.weight
    if weight is not None and weight.dtype != o.dtype:
        return norm(F.silu(o))
    return silu_norm_op(o, weight, norm.eps)


class LinearReLU(nn.Module):
    """The learned feature map of T2R (arXiv 2103.13076): ``relu(W x)`` per head. The weight is called ``layer.weight``."""

    def __init__(self, size: int, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(size, size, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layer(x))


class ShortConv(nn.Conv1d):
    """Depthwise causal convolution over time, then silu. Tokens of other packed sequences are not seen.

    Weight ``[D, 1, W]`` as in ``nn.Conv1d``, the current token's factor last.
    """

    def __init__(self, channels: int, width: int, bias: bool = False, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__(channels, channels, width, groups=channels, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor, history: Tensor | None = None, segment: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """x ``[B, T, D]``; history: the inputs before x, ``[B, W - 1, D]``; segment: ``[T]``, the number of the sequence a token belongs to."""
        T, back = x.shape[1], self.kernel_size[0] - 1
        weight = self.weight[:, 0].to(x.dtype)
        x = F.pad(x, (0, 0, back, 0)) if history is None else torch.cat([history.to(x.dtype), x], dim=1)
        y = x[:, back:] * weight[:, back]
        for d in range(1, min(back, T - 1 if history is None else back) + 1):
            past = x[:, back - d:back - d + T]
            if segment is not None:
                same = F.pad(segment[d:] == segment[:-d], (d, 0), value=history is not None)
                past = past * same[None, :, None]
            y = y + past * weight[:, back - d]
        return F.silu(y if self.bias is None else y + self.bias.to(y.dtype))

    def step(self, x: Tensor, history: Tensor, mask: Tensor | None = None) -> Tensor:
        """One token ``[B, 1, D]``, one kernel: ``history`` takes it in, in place, but where ``mask [B, 1]`` is False."""
        return conv_step_of_token(x, history, self.weight, self.bias, mask)


class GatedSlotAttention(nn.Module):
    """Gated Slot Attention, the token mixer of arXiv 2409.07146, section 3.

    ``q, k = phi(W x)``, ``v = silu(W x)``, ``g = logsigmoid(W_f x) / tau`` in fp32, write strength ``1 - exp(g)``, and
    ``y = W_o RMSNorm(silu(o))`` with one norm over all heads. Time linear, memory constant in the length of the sequence.

    Args:
        hidden_size: width of the model.
        num_heads: query heads. num_kv_heads: key/value heads (None: as many); query head i reads the slots of head ``i // (num_heads // num_kv_heads)``.
        num_slots: slots M per key/value head; None means the head dimension of q and k.
        expand_k, expand_v: total width of q (of v, per query head) as a multiple of ``hidden_size``.
        feature_map: phi: "swish" (silu), "relu", or "t2r" (``relu(W x)`` per head, one learned W for q and k).
        use_short_conv, conv_size, conv_bias: depthwise causal convolutions with silu after the q, k and v projections (``q_conv1d`` and so on).
        gate_logit_normalizer: tau.
        scale: factor on the slot logits.
        elementwise_affine, norm_eps: of the output norm ``g_norm``.
        layer_idx: place in a model; needed when a cache is used.

    Parameters are named ``q_proj, k_proj, v_proj, f_proj, o_proj, g_norm``.

    Raises:
        ValueError: sizes that do not divide, an unknown feature map, wrong mask shapes.
    """

    def __init__(
        self,
        *,
        hidden_size: int = 1024,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        num_slots: int | None = None,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        feature_map: str = "swish",
        use_short_conv: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        gate_logit_normalizer: float = 8,
        scale: float | None = 1.0,
        elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        layer_idx: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_heads: expected a multiple of num_kv_heads = {num_kv_heads}, given {num_heads}")
        dims = {}
        for name, expand in (("expand_k", expand_k), ("expand_v", expand_v)):
            dim = hidden_size * expand / num_heads
            if dim < 1 or dim != int(dim):
                raise ValueError(f"{name}: the head dimension hidden_size * {name} / num_heads = {hidden_size} * {expand} / {num_heads} is {dim:g}, not whole")
            dims[name] = int(dim)
        if num_slots is not None and num_slots < 1:
            raise ValueError(f"num_slots: expected at least 1, or None for the head dimension, given {num_slots}")
        if use_short_conv and conv_size < 1:
            raise ValueError(f"conv_size: expected at least 1, given {conv_size}")
        if not gate_logit_normalizer > 0:
            raise ValueError(f"gate_logit_normalizer: expected a positive number, given {gate_logit_normalizer}")
        if feature_map not in ("swish", "relu", "t2r"):
            raise ValueError(f"feature_map: expected 'swish', 'relu' or 't2r', given {feature_map!r}")
        self.hidden_size, self.num_heads, self.num_kv_heads = hidden_size, num_heads, num_kv_heads
        self.head_k_dim, self.head_v_dim = dims["expand_k"], dims["expand_v"]
        self.num_slots = self.head_k_dim if num_slots is None else num_slots
        self.use_short_conv, self.conv_size = use_short_conv, conv_size
        self.gate_logit_normalizer, self.scale, self.layer_idx = gate_logit_normalizer, scale, layer_idx

        where: dict[str, Any] = {"device": device, "dtype": dtype}
        q_dim, k_dim, v_dim = num_heads * self.head_k_dim, num_kv_heads * self.head_k_dim, num_kv_heads * self.head_v_dim
        self.q_proj = nn.Linear(hidden_size, q_dim, bias=False, **where)
        self.k_proj = nn.Linear(hidden_size, k_dim, bias=False, **where)
        self.v_proj = nn.Linear(hidden_size, v_dim, bias=False, **where)
        self.f_proj = nn.Linear(hidden_size, num_kv_heads * self.num_slots, bias=False, **where)
        if use_short_conv:
            self.q_conv1d = ShortConv(q_dim, conv_size, conv_bias, **where)
            self.k_conv1d = ShortConv(k_dim, conv_size, conv_bias, **where)
            self.v_conv1d = ShortConv(v_dim, conv_size, conv_bias, **where)
        self.feature_map = {"swish": nn.SiLU, "relu": nn.ReLU}[feature_map]() if feature_map != "t2r" else LinearReLU(self.head_k_dim, **where)
        self.g_norm = RMSNorm(num_heads * self.head_v_dim, norm_eps, elementwise_affine, **where)
        self.o_proj = nn.Linear(num_heads * self.head_v_dim, hidden_size, bias=False, **where)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None, Any]:
        """Mixes the tokens of ``hidden_states [B, T, hidden_size]``; T may be 1 (decode), a part of a prompt, or all of it.

        Args:
            attention_mask: ``[B, T]`` or, with a cache, ``[B, seen + T]``; 0 at padding, which may be anywhere and changes nothing for the other tokens.
            past_key_values: a :class:`SlotCache` or a transformers Cache, updated in place; no gradient flows through it.
            use_cache: without ``past_key_values``, start a new :class:`SlotCache`.
            cu_seqlens: ``[N + 1]`` int32 or int64: packed sequences, B = 1.

        Returns:
            ``(y [B, T, hidden_size], None, past_key_values)``, as attention layers do. Other keyword arguments are ignored.
        """
        B, T, _ = hidden_states.shape
        if past_key_values is None and use_cache:
            past_key_values = SlotCache()
        state = None if past_key_values is None else layer_state(past_key_values, self.layer_idx)
        mask = None if attention_mask is None else token_mask(attention_mask, B, T, 0 if state is None else state.seen)

        order = None
        if self.use_short_conv and mask is not None and T > 1:           # a convolution must see neighbours: real tokens first, padding behind
            order = mask.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
            hidden_states = hidden_states.gather(1, order[..., None].expand_as(hidden_states))
            mask = mask.gather(1, order)

        q, k, v, gate_logits = linears(hidden_states, self.q_proj, self.k_proj, self.v_proj, self.f_proj)
        if self.use_short_conv:
            q, k, v = self._convolve((q, k, v), state, mask, cu_seqlens)
        q = q.view(B, T, self.num_heads, self.head_k_dim)
        k = k.view(B, T, self.num_kv_heads, self.head_k_dim)
        v = v.view(B, T, self.num_kv_heads, self.head_v_dim)
        swish = isinstance(self.feature_map, nn.SiLU)
        if not swish:
            q, k = self.feature_map(q), self.feature_map(k)
        gate_logits = gate_logits.view(B, T, self.num_kv_heads, self.num_slots)

        o = slot_attention(q, k, v, gate_logits, self.gate_logit_normalizer, self.scale, mask, state, cu_seqlens, swish, True).flatten(-2)
        y = self.o_proj(silu_norm(o, self.g_norm))
        if order is not None:
            y = torch.empty_like(y).scatter(1, order[..., None].expand_as(y), y)
        return y, None, past_key_values

    def _convolve(self, qkv: tuple[Tensor, ...], state: SlotState | None, mask: Tensor | None, cu_seqlens: Tensor | None) -> list[Tensor]:
        """The three short convolutions; padding, if any, is at the end. Keeps the last real inputs in ``state``."""
        T, convs = qkv[0].shape[1], (self.q_conv1d, self.k_conv1d, self.v_conv1d)
        if T == 1 and state is not None and cu_seqlens is None and not (torch.is_grad_enabled() and any(x.requires_grad for x in (*qkv, *self.parameters()))):
            if state.conv is None:
                state.conv = tuple(x.new_zeros(x.shape[0], self.conv_size - 1, x.shape[-1]) for x in qkv)
            if all(x.dtype == held.dtype == conv.weight.dtype and held.is_contiguous() for x, held, conv in zip(qkv, state.conv, convs)):
                return [conv.step(x, held, mask) for conv, x, held in zip(convs, qkv, state.conv)]
        segment = None if cu_seqlens is None else torch.searchsorted(cu_seqlens[1:].contiguous(), torch.arange(T, device=cu_seqlens.device), right=True)
        past = None if state is None else state.conv
        histories = past or (None,) * 3
        out = [conv(x, history, segment) for conv, x, history in zip(convs, qkv, histories)]
        if state is not None:
            back = self.conv_size - 1
            state.conv = tuple(self._tail(x.detach(), history, mask, segment, back) for x, history in zip(qkv, histories))
        return out

    @staticmethod
    def _tail(x: Tensor, history: Tensor | None, mask: Tensor | None, segment: Tensor | None, back: int) -> Tensor:
        if segment is not None:
            x = x * (segment == segment[-1:])[None, :, None]             # the next token continues the last sequence
        x = F.pad(x, (0, 0, back, 0)) if history is None else torch.cat([history.to(x.dtype), x], dim=1)
        if mask is None:
            return x[:, x.shape[1] - back:].clone()
        last = mask.sum(1)[:, None] + torch.arange(back, device=x.device)
        return x.gather(1, last[..., None].expand(-1, -1, x.shape[-1]))
