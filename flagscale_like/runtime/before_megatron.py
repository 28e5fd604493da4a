"""What happens once, before megatron-core is imported: `flagscale_like/__init__.py` calls it then."""

from __future__ import annotations

from flagscale_like.errors import PlatformError
from flagscale_like.runtime import device_shim
from flagscale_like.runtime.platforms import choose, prepared


def prepare() -> None:
    """Choose the platform, call its hook, and switch megatron-core's fusions off where it does not compile them.

    No device is made current. A platform that cannot be chosen changes nothing: `get_platform` raises its error later, where
    a command can show it.
    """
    try:
        platform = prepared(choose())
    except PlatformError:
        return
    if not platform.compiles:
        device_shim.without_fusions()
