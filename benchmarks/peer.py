"""flash-linear-attention, where it is installed, and its tuning made shorter.

Its kernels time up to 48 configurations each for every new number of heads, dimension, dtype and batch, compiling one after the other; what they found is
kept in TRITON_CACHE_DIR. Here the configurations of a kernel are compiled beside each other first (they are timed one by one, as ever), and fp16 inputs
take what was found for bf16 ones, whose tiles are as wide, where that is known.
"""

from __future__ import annotations

import functools
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from typing import Any

PEER = "flash-linear-attention"


@functools.cache
def fla() -> Any:
    """``fla.ops.gsa``, or None."""
    try:
        import fla.ops.gsa
    except ImportError:
        return None
    shorten_tuning()
    return fla.ops.gsa


def peer_version() -> str:
    if fla() is None:
        return f"{PEER}: absent (pip install '.[bench]')"
    for name in (PEER, "fla-core"):
        try:
            return f"{PEER} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            pass
    return f"{PEER} {sys.modules['fla'].__version__}"


def shorten_tuning() -> None:
    from triton import AsyncCompileMode
    from triton.runtime.autotuner import Autotuner

    time_one, look_up = Autotuner._bench, Autotuner.check_disk_cache
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))

    def _bench(self: Any, *args: Any, config: Any, **meta: Any) -> Any:
        configs = self.prune_configs(meta)
        if config is configs[0]:
            with AsyncCompileMode(pool, ignore_errors=True):
                for each in configs:
                    self.fn.run(*args, **{**meta, **each.all_kwargs(), "warmup": True})
        return time_one(self, *args, config=config, **meta)

    def check_disk_cache(self: Any, key: tuple[Any, ...], configs: list[Any], bench: Any) -> bool:
        def absent() -> None:
            raise LookupError

        wide = tuple("torch.bfloat16" if x == "torch.float16" else x for x in key)
        if wide != key:
            try:
                look_up(self, wide, configs, absent)
                self.cache[key] = self.cache[wide]
                return True
            except LookupError:
                pass
        return look_up(self, key, configs, bench)

    Autotuner._bench, Autotuner.check_disk_cache = _bench, check_disk_cache
