"""Measuring merged models on tasks."""
