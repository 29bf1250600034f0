"""Gated Slot Attention as one would write it on a board: a loop over time in plain PyTorch.

Slow, differentiable, any float dtype. Every test of this package compares with it.

Per key/value head, with ``a_t = exp(g_t)``::

    Hk_t = Hk_{t-1} * a_t[None, :] + k_t s_t^T        slot keys     K x M
    p_t  = softmax(scale * Hk_t^T q_t)                              M
    Hv_t = a_t[:, None] * Hv_{t-1} + s_t v_t^T        slot values   M x V
    o_t  = Hv_t^T p_t                                               V

Source: arXiv 2409.07146, eq. 6 (GSA); arXiv 2110.02488 (ABC, the form without a gate).
"""

from __future__ import annotations

import torch
from torch import Tensor

State = tuple[Tensor, ...]


def naive_gsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor | None = None,
    g: Tensor | None = None,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, State | None]:
    """The recurrence, token by token. Arguments, shapes and results are those of :func:`gsa_ext.fused_recurrent_gsa`.

    16-bit inputs are computed in fp32; fp32 in fp32; fp64 in fp64. Differentiable any number of times.

    Raises:
        ValueError: both ``s`` and ``g`` are None, or ABC (``g=None``) is given an initial state without its ``z``.
    """
    if s is None and g is None:
        raise ValueError("s and g are both None: give g (coupled write s = 1 - exp(g)), s (ABC), or both")
    abc = g is None
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if initial_state is not None and abc and len(initial_state) != 3:
        raise ValueError("initial_state: ABC (g=None) needs (Hk, Hv, z), given a tuple of "
                         f"{len(initial_state)}; take z from the final state that was handed over")
    B, T, HQ, K = q.shape
    H, V = v.shape[2:]
    slots = s if g is None else g
    assert slots is not None
    M = slots.shape[-1]

    if cu_seqlens is None:
        sequences = [(slice(b, b + 1), slice(0, T)) for b in range(B)]
    else:
        bounds = cu_seqlens.tolist()
        sequences = [(slice(0, 1), slice(lo, hi)) for lo, hi in zip(bounds, bounds[1:])]

    outputs, finals = [], []
    for n, (row, span) in enumerate(sequences):
        def tokens(x: Tensor) -> Tensor:
            x = x[row, span].to(dtype).squeeze(0)          # noqa: B023  [t, heads, dim]
            return x.flip(0) if reverse else x
        state: list[Tensor | None]
        if initial_state is None:
            state = [q.new_zeros(H, K, M, dtype=dtype), q.new_zeros(H, M, V, dtype=dtype), None]
        else:
            state = [x[n if x.shape[0] > 1 else 0].to(dtype) for x in initial_state] + [None]
        o, final = _one_sequence(tokens(q), tokens(k), tokens(v), None if s is None else tokens(s), None if g is None else tokens(g), scale, *state[:3])
        outputs.append(o.flip(0) if reverse else o)
        finals.append(final)

    if not sequences:
        o = q.new_zeros(B, T, HQ, V, dtype=dtype)
        final_state: State = (q.new_zeros(0, H, K, M, dtype=dtype), q.new_zeros(0, H, M, V, dtype=dtype), q.new_zeros(0, H, M, dtype=dtype))
    else:
        o = torch.cat(outputs)[None] if cu_seqlens is not None else torch.stack(outputs)
        final_state = tuple(torch.stack(x) for x in zip(*finals))
    return o.to(q.dtype), (final_state[:3 if abc else 2] if output_final_state else None)


def _one_sequence(q, k, v, s, g, scale, Hk, Hv, z):
    """q [T, HQ, K], k [T, H, K], v [T, H, V], s, g [T, H, M], Hk [H, K, M], Hv [H, M, V], z [H, M] or None."""
    T, H, K = k.shape
    r = q.shape[1] // H
    V = v.shape[-1]
    o = []
    z_given = z is not None
    if g is None and not z_given:
        z = torch.full_like(Hv[..., 0], -torch.inf)
    for t in range(T):
        if g is None:                                            # ABC: s holds raw slot logits
            z, gt, st = abc_gate(z, s[t], z_given)
        else:
            gt = g[t]
            st = coupled_write(gt) if s is None else s[t]
        a = gt.exp()
        Hk = Hk * a[:, None, :] + k[t][:, :, None] * st[:, None, :]
        logits = scale * torch.einsum("hrk,hkm->hrm", q[t].view(H, r, K), Hk)
        p = logits.softmax(-1)
        Hv = Hv * a[:, :, None] + st[:, :, None] * v[t][:, None, :]
        o.append(torch.einsum("hrm,hmv->hrv", p, Hv).reshape(H * r, V))
    out = torch.stack(o) if o else q.new_zeros(0, H * r, V)
    if z is None:
        z = Hv.new_zeros(Hv.shape[:2])
    return out, (Hk.clone(), Hv.clone(), z.clone())


def coupled_write(g: Tensor) -> Tensor:
    """``s = 1 - exp(g)``, without cancellation near 0; and with a derivative ``-exp(g)`` that does not round to 0 at strong gates, as that of expm1 does."""
    return torch.where(g > -1, -torch.expm1(g), 1 - g.exp())


def abc_gate(z: Tensor, e: Tensor, z_given: bool) -> tuple[Tensor, Tensor, Tensor]:
    """ABC's gate for one token: ``z' = logaddexp(z, e)``, ``g = z - z'``, ``s = exp(e - z')``; returns ``(z', g, s)``.

    Raw logits of -inf write nothing and leave a slot alone, also while its z is still -inf. The first write of a slot whose z was
    not handed over has g = 0 (there is nothing to forget).
    """
    silent = e == -torch.inf
    empty = z == -torch.inf
    e0, z0 = e.masked_fill(silent, 0), z.masked_fill(empty, 0)             # keeps inf - inf out of the graph
    both = torch.logaddexp(z0, e0)
    znew = torch.where(silent, z, torch.where(empty, e, both))
    g = torch.where(silent, 0, torch.where(empty, -torch.inf if z_given else 0.0, z0 - both))
    s = torch.where(silent, 0, torch.where(empty, 1.0, (e0 - both).exp()))
    return znew, g, s
