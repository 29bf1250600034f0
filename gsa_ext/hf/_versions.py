"""Which transformers there is: one that is too new is refused before anything of it is used, and what a cache is called in this one."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import transformers

F = TypeVar("F", bound=Callable[..., Any])

_version = tuple(int(x) for x in transformers.__version__.split(".")[:2])
if _version >= (5, 25):
    raise ImportError(f"gsa_ext.hf works with transformers 5.17 to 5.24, found {transformers.__version__}: pip install 'transformers<5.25'")

#: What models and their layers call a cache, as an argument and in what they return. gsa_ext itself calls it ``past_key_values`` everywhere.
CACHE = "cache" if _version >= (5, 24) else "past_key_values"


def own_names(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments that may have the cache by the name ``CACHE``, with ``past_key_values`` for it."""
    if CACHE not in kwargs:
        return kwargs
    return {name: x for name, x in kwargs.items() if name != CACHE} | {"past_key_values": kwargs[CACHE]}


def takes_cache(forward: F) -> F:
    """For a function with an argument ``past_key_values``: it can be given by the name ``CACHE``, too, as transformers gives it."""

    @functools.wraps(forward)
    def taking(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **own_names(kwargs))

    return cast(F, taking)
