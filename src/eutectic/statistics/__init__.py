"""Statistics of one expert over its proxy data: collected once, used by many methods."""

from eutectic.statistics.add import add_statistics
from eutectic.statistics.collect import collect
from eutectic.statistics.statistics_file import StatisticsFile, load_statistics

__all__ = ["StatisticsFile", "add_statistics", "collect", "load_statistics"]
