"""First drafts of a recipe and of a file of tasks, from what lies in folders."""

from eutectic.drafting.draft import Draft, draft

__all__ = ["Draft", "draft"]
