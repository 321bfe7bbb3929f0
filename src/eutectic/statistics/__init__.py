"""Statistics of one expert over its proxy data: collected once, used by many methods."""
