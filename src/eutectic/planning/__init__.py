"""From a recipe and headers to one treatment per tensor."""
