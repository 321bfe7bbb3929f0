"""Merged models that keep low-rank experts and route every sample."""
