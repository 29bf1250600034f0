from collections.abc import Callable

from torch import Tensor

built: str
compiler: str

def set_checks(enabled: bool) -> None: ...
def checks() -> bool: ...
def short_way(name: str, bits: int) -> Callable[..., Tensor | None]: ...
