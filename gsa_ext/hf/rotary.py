"""The rotary position embedding of most families, in fewer passes over memory than as they write it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor


@functools.cache
def is_half_rotation(apply: Callable[..., tuple[Tensor, Tensor]]) -> bool:
    """Whether a family's function is ``x * cos + [-x2, x1] * sin``, x1 and x2 being the halves of x: found out by calling it."""
    generator = torch.Generator("cpu").manual_seed(0)
    q, k, cos, sin = (torch.randn(1, 3, *size, generator=generator, device="cpu", dtype=torch.float64) for size in ((2, 8), (1, 8), (8,), (8,)))
    with torch.no_grad():
        try:
            found = apply(q, k, cos, sin, unsqueeze_dim=2)
        except (TypeError, RuntimeError, ValueError, IndexError):
            return False
        want = [x * cos[:, :, None] + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin[:, :, None] for x in (q, k)]
        return all(a.shape == b.shape and torch.allclose(a.double(), b, rtol=0, atol=1e-5) for a, b in zip(found, want))


@functools.cache
def is_half_rotation_to_the_bit(apply: Callable[..., tuple[Tensor, Tensor]]) -> bool:
    """Whether it is that with the roundings of bf16 as well, so that a kernel may do it instead (:class:`~gsa_ext.layer.Rotary`)."""
    q, k, cos, sin = (torch.linspace(-2 - i, 3, 8, dtype=torch.bfloat16, device="cpu").view(1, 1, 1, 8) for i in range(4))
    with torch.no_grad():
        try:
            found = apply(q, k, cos[0], sin[0], unsqueeze_dim=2)
        except (TypeError, RuntimeError, ValueError, IndexError):
            return False
    return all(map(torch.equal, found, (x * cos + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin for x in (q, k))))


def rotate_halves(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q ``[B, T, HQ, D]``, k ``[B, T, H, D]``; cos, sin ``[B or 1, T, n]``, n <= D: the first n dimensions are turned, of both in one kernel. Returns their
    shapes and dtypes; cos and sin get no gradient. In 16 bits ``x * cos`` is rounded, too, as the families do."""
    return torch.ops.gsa.rotate(q, k, cos, sin)
