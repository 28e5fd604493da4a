"""How the functions of other packages refuse what the kernels here do not compute."""

from typing import Any

from torch import Tensor


def refuse(function: str, **given: tuple[Any, Any]) -> None:
    """Raise NotImplementedError if an argument, given as name=(value, the value that it may have), has another value."""
    for name, (value, allowed) in given.items():
        if value is not allowed and value != allowed:
            shown = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise NotImplementedError(
                f"{function}: {name} ({shown}) must be {allowed!r}: flagscale_kernels does not compute it"
            )
