"""What a run measures, before anybody makes a table of it."""

from collections import defaultdict
from dataclasses import dataclass, field


@dataclass(slots=True)
class Figures:
    """What was measured: under each name, one value a round."""

    values: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    pooled: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Latencies of single calls, of all rounds."""
    shares: dict[str, dict[str, float]] = field(default_factory=dict)
    """For each format, the part of a call's CPU that each package takes."""
    versions: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    """Who could not be measured, and why."""
    seconds: float = 0.0
    load: float = 0.0
    quick: bool = False
