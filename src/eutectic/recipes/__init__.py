"""Recipes: what to merge and how, checked before any work."""
