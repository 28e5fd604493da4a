"""Which platform this process runs on: the built-in ones, the rows of the table, and plug-ins."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

from flagscale_like.errors import PlatformError
from flagscale_like.runtime.launched import local_rank
from flagscale_like.runtime.platforms.base import Platform
from flagscale_like.runtime.platforms.cpu import CpuPlatform
from flagscale_like.runtime.platforms.cuda import CudaPlatform
from flagscale_like.runtime.platforms.table import CHIPS, Chip, platform_of

GROUP = "flagscale_like.platforms"
VARIABLE = "FLAGSCALE_LIKE_DEVICE"


@dataclass(frozen=True)
class Candidate:
    """A platform that may be chosen. `origin` says where it is from; `load` raises PlatformError where it is broken."""

    name: str
    origin: str
    load: Callable[[], type[Platform]]


def candidates() -> dict[str, Candidate]:
    """Every platform by name. A plug-in takes the place of a row of the table.

    Raises:
        PlatformError: two plug-ins have one name, or one is called as a built-in platform is.
    """
    built_in = (CpuPlatform, CudaPlatform)
    found = {p.name: Candidate(p.name, "built in", functools.partial(_itself, p)) for p in built_in}
    found |= {chip.name: Candidate(chip.name, "table", functools.partial(platform_of, chip)) for chip in CHIPS}
    plug_ins: dict[str, EntryPoint] = {}
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        if entry.name in (p.name for p in built_in):
            raise PlatformError(f"{_origin(entry)} gives a platform named {entry.name}, which is built in: rename it")
        other = plug_ins.setdefault(entry.name, entry)
        if other.value != entry.value:
            raise PlatformError(
                f"{_origin(other)} and {_origin(entry)} both give a platform named {entry.name}: uninstall one"
            )
        found[entry.name] = Candidate(entry.name, _origin(entry), functools.partial(_load, entry))
    return found


def choose() -> type[Platform]:
    """The platform that FLAGSCALE_LIKE_DEVICE names; where it is unset, the one that this machine has, else the CPU.

    Raises:
        PlatformError: the name is unknown, its device is not there, a plug-in is broken, or two claim the machine.
    """
    known = candidates()
    wanted = os.environ.get(VARIABLE, "")
    if wanted:
        if wanted not in known:
            raise PlatformError(f"{VARIABLE} is {wanted!r}, which no platform is called: use one of {', '.join(known)}")
        platform = known[wanted].load()
        if (reason := platform.missing()) is not None:
            raise PlatformError(f"{VARIABLE} is {wanted}, but {reason}: see `flagscale-like doctor`")
        return platform
    loaded = [candidate.load() for candidate in known.values()]
    claims = [platform for platform in loaded if platform.claims and platform.missing() is None]
    if any(platform.torch_type == "cuda" for platform in claims if platform is not CudaPlatform):
        claims = [platform for platform in claims if platform is not CudaPlatform]  # it passes for CUDA, and is not
    if len(claims) > 1:
        names = [platform.name for platform in claims]
        raise PlatformError(f"{' and '.join(names)} both have devices here: choose one, as in {VARIABLE}={names[0]}")
    return claims[0] if claims else CpuPlatform


@functools.cache
def prepared(platform: type[Platform]) -> type[Platform]:
    """`platform`, with its environment variables set and its hook called."""
    for name, value in platform.environment.items():
        os.environ.setdefault(name, value)
    platform.prepare()
    return platform


@functools.cache
def get_platform() -> Platform:
    """Find this rank's device and make it current. FLAGSCALE_LIKE_DEVICE=cpu hides the others.

    Raises:
        PlatformError: as `choose`; or there is no device for this local rank, or no backend for its collectives.
    """
    chosen = prepared(choose())
    if (reason := chosen.missing_backend()) is not None:
        raise PlatformError(f"the platform is {chosen.name}, but {reason}: see `flagscale-like doctor`")
    place = local_rank()
    if not chosen.ranks_share_device and place >= chosen.count():
        visible = f" ({chosen.visible_env})" if chosen.visible_env in os.environ else ""
        raise PlatformError(
            f"local rank {place} has no {chosen.name} device: {chosen.count()} visible{visible}; "
            f"start fewer processes a node"
        )
    platform = chosen(place)
    platform.make_current()
    return platform


@dataclass(frozen=True)
class Surveyed:
    """A candidate on this machine: `reason` is why it cannot be used; None where it can, by `devices` devices."""

    name: str
    origin: str
    platform: type[Platform] | None
    devices: int
    reason: str | None


def survey() -> list[Surveyed]:
    """Every candidate, looked at.

    Raises:
        PlatformError: see `candidates`.
    """
    found = []
    for candidate in candidates().values():
        try:
            platform = candidate.load()
        except PlatformError as error:
            found.append(Surveyed(candidate.name, candidate.origin, None, 0, str(error)))
            continue
        reason = platform.missing()
        devices = 0 if reason else platform.count()
        found.append(Surveyed(candidate.name, candidate.origin, platform, devices, reason))
    return found


def _itself(platform: type[Platform]) -> type[Platform]:
    return platform


def _origin(entry: EntryPoint) -> str:
    return f"package {entry.dist.name}" if entry.dist is not None else f"entry point {entry.value}"


@functools.cache
def _load(entry: EntryPoint) -> type[Platform]:
    """The Platform class, or the row, that an entry point names."""
    try:
        found = entry.load()
    except Exception as error:  # a plug-in's import can fail in any way; the user gets its words in one line
        lines = str(error).splitlines() or [""]
        raise PlatformError(
            f"{_origin(entry)} cannot be imported ({type(error).__name__}: {lines[0]}): "
            f"mend or uninstall it, or choose another platform with {VARIABLE}"
        ) from error
    if isinstance(found, Chip):
        found = platform_of(found)
    if not (isinstance(found, type) and issubclass(found, Platform)):
        raise PlatformError(f"{_origin(entry)}: {entry.value} is neither a Platform class nor a Chip")
    if found.name != entry.name:
        raise PlatformError(f"{_origin(entry)}: {entry.value} is named {found.name!r}, its entry point {entry.name!r}")
    return found
