"""Carrying out a plan: streamed, journalled, resumable."""
