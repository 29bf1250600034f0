from typing import Any

from torch import Tensor

built: str
compiler: str

def set_checks(enabled: bool) -> None: ...
def checks() -> bool: ...
def step(*args: Any) -> Tensor | None: ...
