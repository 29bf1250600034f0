"""Softmax attention over a sliding window, in time and memory linear in the number of tokens, and the few keys and values that decoding needs of it."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from gsa_ext.layer import Rotary
from gsa_ext.ops import window_step_of_token

FEWER_HEADS: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}     # torch 2.11 takes them anyway


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

    On the GPU in 16 bits this is one kernel, torch's FlashAttention, wherever :func:`_flash_takes` says so: it reads q, k and v where they are, and its
    backward adds up dq in the order in which blocks finish, so not the same bits every time, unless ``torch.use_deterministic_algorithms`` is on.

    Args:
        q: ``[B, T, HQ, K]``; k: ``[B, T, H, K]``; v: ``[B, T, H, V]``, q and k rotated; query head i reads key/value head ``i // (HQ // H)``.
        mask: bool ``[B, T]``, False at padding, which may be anywhere.
        past: what an earlier call kept. cu_seqlens: ``[N + 1]``, packed sequences (B = 1, no past).
        keep: return the state after the last token; it carries no gradient.

    Returns:
        ``(o [B, T, HQ, V], state or None)``. At padding the values of o are finite and mean nothing.
    """
    (B, T), back = q.shape[:2], window - 1
    order = None
    if mask is not None and T > 1:                                           # tokens first, padding behind: neighbours in the window are neighbours in memory
        order = mask.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[:, :, None, None]
        q, k, v = (x.gather(1, order.expand_as(x)) for x in (q, k, v))

    held = k, v
    if keep or past is not None:                                             # `back` earlier ones, then the current ones
        earlier = [x.new_zeros(B, back, *x.shape[2:]) for x in held] if past is None else past[:2]
        held = tuple(torch.cat([old.to(x.dtype), x], 1) for old, x in zip(earlier, held))    # type: ignore[assignment]
    keys, values = (k, v) if past is None else held
    filled = None if past is None else past.filled
    attend = _flash if _flash_takes(q, keys, values) else _in_blocks
    o = attend(q, keys, values, window, scale, filled, cu_seqlens)
    if order is not None:
        o = torch.empty_like(o).scatter(1, order.expand_as(o), o)

    state = None
    if keep:
        if mask is None:
            last = [x[:, T:].detach().clone() for x in held]
            count: int | Tensor = T
        else:
            count = mask.sum(1)
            at = (count[:, None] + torch.arange(back, device=k.device))[:, :, None, None]
            last = [x.detach().gather(1, at.expand(-1, -1, *x.shape[2:])) for x in held]
        before = torch.zeros(B, dtype=torch.int64, device=k.device) if filled is None else filled
        state = WindowState(last[0], last[1], (before + count).clamp(max=back))
    return o, state


def _flash_takes(q: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether :func:`_flash` takes these: in 16 bits, K = V a multiple of 8 of at most 256, on a GPU that can and may (:func:`_flash_here`)."""
    D = q.shape[-1]
    return (q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.dtype == keys.dtype == values.dtype and q.numel() > 0
            and values.shape[-1] == D and D % 8 == 0 and D <= 256 and _flash_here(q.device.index))


@torch.compiler.assume_constant_result
def _flash_here(device: int) -> bool:
    """Not where it is switched off: ``torch.nn.attention.sdpa_kernel`` or ``torch.backends.cuda.enable_flash_sdp``."""
    return (torch.version.cuda is not None and torch.backends.cuda.is_flash_attention_available() and torch.backends.cuda.flash_sdp_enabled()
            and torch.cuda.get_device_capability(device) >= (8, 0))


def _flash(q: Tensor, keys: Tensor, values: Tensor, window: int, scale: float, filled: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """As :func:`_in_blocks`. The longest sequence has at most T tokens: asking which it is would wait for the GPU."""
    lengths = _flash_lengths(q, keys, filled, cu_seqlens)
    rows = [_flash_rows(x) for x in (q, keys, values)]
    o: Any = varlen_attn(rows[0], rows[1], rows[2], *lengths, q.shape[1], keys.shape[1], scale=scale, window_size=(window - 1, 0), **FEWER_HEADS)
    return o.unflatten(0, q.shape[:2])


def _flash_lengths(q: Tensor, keys: Tensor, filled: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where the sequences of queries and of keys start and end, int32. The last query of a sequence sees up to its last key, the one before up to the key
    before. The places of a past that hold no token are a sequence of their own, without queries."""
    if cu_seqlens is not None:
        cu = cu_seqlens.to(torch.int32)
        return cu, cu
    (B, T), L = q.shape[:2], keys.shape[1]
    cu = torch.arange(0, B * T + 1, T, dtype=torch.int32, device=q.device)
    if filled is None:
        return cu, cu
    starts = torch.arange(0, B * L + 1, L, dtype=torch.int32, device=q.device)
    tokens = starts[:-1] + (L - T - filled).to(torch.int32)
    return cu.repeat_interleave(2)[:-1], torch.cat([torch.stack([starts[:-1], tokens], 1).flatten(), starts[-1:]])


def _flash_rows(x: Tensor) -> Tensor:
    """``[B, T, heads, D]`` -> ``[B T, heads, D]`` whose vectors can be read 16 bytes at a time: a view, but of inputs that nobody has. (A compiler does not say
    where a tensor begins.)"""
    x = x.flatten(0, 1)
    start = 0 if torch.compiler.is_compiling() else x.storage_offset()
    return x if x.stride(-1) == 1 and all(n % 8 == 0 for n in (start, *x.stride()[:-1])) else x.clone(memory_format=torch.contiguous_format)


def _in_blocks(q: Tensor, keys: Tensor, values: Tensor, window: int, scale: float, filled: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Blocks of queries, each with a copy of the keys that any of them sees.

    q: ``[B, T, HQ, K]``; keys, values: ``[B, T, H, ...]`` or, with ``filled [B]``, ``[B, window - 1 + T, H, ...]``, of whose first ``window - 1`` the last
    ``filled`` are tokens. Returns ``[B, T, HQ, V]``.
    """
    (B, T, HQ, _), H, back, device = q.shape, keys.shape[2], window - 1, q.device
    size = max(1, min(T, window))
    blocks = -(-T // size)
    lead, extra = back if filled is None else 0, blocks * size - T

    number = torch.zeros(1, T, dtype=torch.int64, device=device)             # of the sequence a token belongs to; -1: no token
    if cu_seqlens is not None:
        number = torch.searchsorted(cu_seqlens[1:].contiguous(), torch.arange(T, device=device), right=True)[None]
    held = torch.zeros(1, 1, dtype=torch.int64, device=device) if filled is None else filled[:, None]
    numbers = torch.cat([((torch.arange(back, device=device) >= back - held).long() - 1).expand(B, back), number.expand(B, T)], 1)
    i, j = torch.arange(size, device=device)[:, None], torch.arange(size + back, device=device)
    seen = F.pad(numbers, (0, extra)).unfold(1, size + back, size)[:, :, None]                        # [B, blocks, 1, size + back]
    own = F.pad(numbers[:, back:], (0, extra)).unflatten(1, (blocks, size))[..., None]
    visible = (i <= j) & (j <= i + back) & (seen == own)                                              # [B, blocks, size, size + back]
    allowed = visible.flatten(0, 1)[:, None].repeat(1, 1, HQ // H, 1)

    if lead or extra:                                                        # F.pad by nothing copies, too
        q, keys, values = (F.pad(x, (0, 0, 0, 0, 0 if x is q else lead, extra)) for x in (q, keys, values))
    kb, vb = (x.unfold(1, size + back, size).permute(0, 1, 2, 4, 3).flatten(0, 1) for x in (keys, values))
    qb = q.unflatten(1, (blocks, size)).unflatten(3, (H, HQ // H))                                    # [B, blocks, size, H, r, K]
    qb = qb.permute(0, 1, 3, 4, 2, 5).flatten(3, 4).flatten(0, 1)                                     # [B blocks, H, r size, K]
    o = F.scaled_dot_product_attention(qb, kb, vb, attn_mask=allowed, scale=scale)
    o = o.unflatten(2, (HQ // H, size)).unflatten(0, (B, blocks)).permute(0, 1, 4, 2, 3, 5)           # [B, blocks, size, H, r, V]
    return o.reshape(B, blocks * size, HQ, -1)[:, :T]


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
        cos, sin = rotary.cos, rotary.sin
    keys, values, filled = past
    if not (q.dtype == k.dtype == v.dtype == keys.dtype == values.dtype and keys.is_contiguous() and values.is_contiguous() and filled.is_contiguous()):
        return None
    return window_step_of_token(q, k, v, keys, values, filled, scale, mask, cos, sin), past


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
