"""Quantised checkpoints as plain ones: a file per family of formats, and what tells them apart."""
