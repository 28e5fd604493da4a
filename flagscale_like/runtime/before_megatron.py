"""What happens once, before megatron-core is imported: `flagscale_like/__init__.py` calls it then."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

from flagscale_like.errors import PlatformError
from flagscale_like.runtime import device_shim
from flagscale_like.runtime.platforms import choose, prepared

# The modules of megatron-core that load Weights & Biases wherever it is installed: a second of every start, and a wrapper
# around stdout. It is for megatron-core's own timers and inference server, which are not used here.
LOAD_WANDB = (
    "megatron.core.timers",
    "megatron.core.inference.contexts.dynamic_context",
    "megatron.core.inference.engines.dynamic_engine",
)


@contextlib.contextmanager
def hidden(name: str) -> Iterator[None]:
    """Have a package that is not loaded yet look as if it were not installed."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # ty: ignore[invalid-assignment]  # what Python itself documents for this
    try:
        yield
    finally:
        del sys.modules[name]


class _WithoutWandb(MetaPathFinder):
    """Loads the modules of LOAD_WANDB without Weights & Biases."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in LOAD_WANDB:
            return None
        return device_shim.loaded_by(PathFinder.find_spec(name, path, target), self._load)

    @staticmethod
    def _load(load: Callable[[ModuleType], None], module: ModuleType) -> None:
        with hidden("wandb"):
            load(module)


def prepare() -> None:
    """Choose the platform, call its hook, and switch megatron-core's fusions off where it does not compile them.

    No device is made current. A platform that cannot be chosen changes nothing: `get_platform` raises its error later, where
    a command can show it.
    """
    sys.meta_path.insert(0, _WithoutWandb())
    try:
        platform = prepared(choose())
    except PlatformError:
        return
    if not platform.compiles:
        device_shim.without_fusions()
