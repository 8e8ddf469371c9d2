"""What an agent can tell about its machine without torch. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def collect(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Facts about this machine; `asked` says which."""
    return {}
