"""What a rank computes on. `get_platform()` finds it; docs/devices.md says how to add one."""

from flagscale_like.runtime.platforms.base import Platform
from flagscale_like.runtime.platforms.choice import Surveyed, choose, get_platform, prepared, survey
from flagscale_like.runtime.platforms.table import CHIPS, Chip

__all__ = ["CHIPS", "Chip", "Platform", "Surveyed", "choose", "get_platform", "prepared", "survey"]
