"""Statistics of one expert over its proxy data: collected once, used by many methods."""

from eutectic.statistics.add import add_statistics
from eutectic.statistics.collect import collect
from eutectic.statistics.core_rows import CoreRows, core_rows
from eutectic.statistics.statistics_file import StatisticsFile, load_statistics

__all__ = [
    "CoreRows",
    "StatisticsFile",
    "add_statistics",
    "collect",
    "core_rows",
    "load_statistics",
]
