"""Softmax attention over a sliding window, in time and memory linear in the number of tokens, and the few keys and values that decoding needs of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gsa_ext.layer import Rotary


class WindowState(NamedTuple):
    """The last tokens that the next one will see: of constant size, filled from the end."""

    keys: Tensor                            # [B, window - 1, H, K], rotated
    values: Tensor                          # [B, window - 1, H, V]
    filled: Tensor                          # [B] int64, how many of them are tokens


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    scale: float,
    mask: Tensor | None = None,
    past: WindowState | None = None,
    cu_seqlens: Tensor | None = None,
    keep: bool = False,
) -> tuple[Tensor, WindowState | None]:
    """Every token attends to itself and the ``window - 1`` tokens before it; padding does not count.

    Args:
        q: ``[B, T, HQ, K]``; k: ``[B, T, H, K]``; v: ``[B, T, H, V]``, q and k rotated; query head i reads key/value head ``i // (HQ // H)``.
        mask: bool ``[B, T]``, False at padding, which may be anywhere.
        past: what an earlier call kept. cu_seqlens: ``[N + 1]``, packed sequences (B = 1, no past).
        keep: return the state after the last token; it carries no gradient.

    Returns:
        ``(o [B, T, HQ, V], state or None)``. At padding the values of o are finite and mean nothing.
    """
    B, T, HQ, _ = q.shape
    H, back = k.shape[2], window - 1
    order = None
    if mask is not None and T > 1:                                           # tokens first, padding behind: neighbours in the window are neighbours in memory
        order = mask.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[:, :, None, None]
        q, k, v = (x.gather(1, order.expand_as(x)) for x in (q, k, v))

    # keys and values: `back` earlier ones, then the current ones
    if past is None:
        past = WindowState(k.new_zeros(B, back, *k.shape[2:]), v.new_zeros(B, back, *v.shape[2:]), torch.zeros(B, dtype=torch.int64, device=k.device))
    keys, values = torch.cat([past.keys.to(k.dtype), k], 1), torch.cat([past.values.to(v.dtype), v], 1)
    place = torch.arange(back, device=k.device)
    number = torch.zeros(1, T, dtype=torch.int64, device=k.device)           # of the sequence a token belongs to; -1: no token
    if cu_seqlens is not None:
        number = torch.searchsorted(cu_seqlens[1:].contiguous(), torch.arange(T, device=k.device), right=True)[None]
    numbers = torch.cat([(place >= back - past.filled[:, None]).long() - 1, number.expand(B, T)], 1)

    # blocks of queries, each with the keys that any of them sees
    size = max(1, min(T, window))
    blocks = -(-T // size)
    extra = blocks * size - T
    i, j = torch.arange(size, device=k.device)[:, None], torch.arange(size + back, device=k.device)
    seen = F.pad(numbers, (0, extra)).unfold(1, size + back, size)[:, :, None]                        # [B, blocks, 1, size + back]
    own = F.pad(numbers[:, back:], (0, extra)).unflatten(1, (blocks, size))[..., None]
    visible = (i <= j) & (j <= i + back) & (seen == own)                                              # [B, blocks, size, size + back]
    padded = [F.pad(x, (0, 0, 0, 0, 0, extra)) if extra else x for x in (q, keys, values)]            # F.pad by nothing copies, too
    kb, vb = (x.unfold(1, size + back, size).permute(0, 1, 2, 4, 3).flatten(0, 1) for x in padded[1:])
    qb = padded[0].unflatten(1, (blocks, size)).unflatten(3, (H, HQ // H))                            # [B, blocks, size, H, r, K]
    qb = qb.permute(0, 1, 3, 4, 2, 5).flatten(3, 4).flatten(0, 1)                                     # [B blocks, H, r size, K]
    allowed = visible.flatten(0, 1)[:, None].repeat(1, 1, HQ // H, 1)
    o = F.scaled_dot_product_attention(qb, kb, vb, attn_mask=allowed, scale=scale)
    o = o.unflatten(2, (HQ // H, size)).unflatten(0, (B, blocks)).permute(0, 1, 4, 2, 3, 5)           # [B, blocks, size, H, r, V]
    o = o.reshape(B, blocks * size, HQ, -1)[:, :T]
    if order is not None:
        o = torch.empty_like(o).scatter(1, order.expand_as(o), o)

    state = None
    if keep:
        if mask is None:
            last = keys[:, T:].detach().clone(), values[:, T:].detach().clone()
            count: int | Tensor = T
        else:
            count = mask.sum(1)
            at = (count[:, None] + place)[:, :, None, None]
            last = tuple(x.detach().gather(1, at.expand(-1, -1, *x.shape[2:])) for x in (keys, values))      # type: ignore[assignment]
        state = WindowState(*last, (past.filled + count).clamp(max=back))
    return o, state


def window_step(
    q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, mask: Tensor | None = None, past: WindowState | None = None, rotary: Rotary | None = None,
) -> tuple[Tensor, WindowState] | None:
    """:func:`window_attention` of one token, without gradients, as one kernel that rotates q and k itself and moves the state on in place; None where that
    is not possible."""
    if past is None:
        where: dict[str, Any] = {"dtype": k.dtype, "device": k.device}
        (B, _, H, K), V, back = k.shape, v.shape[-1], window - 1
        past = WindowState(torch.zeros(B, back, H, K, **where), torch.zeros(B, back, H, V, **where), torch.zeros(B, dtype=torch.int64, device=k.device))
    cos, sin = None, None
    if rotary is not None:
        if not rotary.in_kernel(q):
            return None
        cos, sin = rotary.cos[:, 0], rotary.sin[:, 0]
    if any(x.dtype != q.dtype for x in (k, v, past.keys, past.values)) or not all(x.is_contiguous() for x in past):
        return None
    token = None if mask is None else mask[:, 0]
    return torch.ops.gsa.window_step(q[:, 0], k[:, 0], v[:, 0], *past, scale, token, cos, sin)[:, None], past


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """Softmax attention to all earlier tokens. Shapes as in :func:`window_attention`; time quadratic in T."""
    T, r = q.shape[1], q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), k.repeat_interleave(r, 2).transpose(1, 2), v.repeat_interleave(r, 2).transpose(1, 2)
    if mask is None and cu_seqlens is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)
    t = torch.arange(T, device=q.device)
    allowed = (t[:, None] >= t)[None]
    if cu_seqlens is not None:
        number = torch.searchsorted(cu_seqlens[1:].contiguous(), t, right=True)
        allowed = allowed & (number[:, None] == number)
    if mask is not None:
        allowed = allowed & (mask[:, None] | torch.eye(T, dtype=torch.bool, device=q.device))         # padding sees itself: finite
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed[:, None], scale=scale).transpose(1, 2)


def attention_over(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Softmax attention of the last T tokens ``q [B, T, HQ, K]`` to all L tokens ``k, v [B, L, H, ...]``. mask: bool ``[B, L]``, False at padding."""
    T, L, r = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    place = torch.arange(L, device=q.device)
    own = place[L - T:, None]
    allowed = (own >= place)[None]
    if mask is not None:
        allowed = allowed & (mask[:, None] | (own == place))                                          # padding sees itself: finite
    q, k, v = q.transpose(1, 2), k.repeat_interleave(r, 2).transpose(1, 2), v.repeat_interleave(r, 2).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed[:, None], scale=scale).transpose(1, 2)
