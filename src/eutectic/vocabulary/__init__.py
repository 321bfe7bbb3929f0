"""Tokens and their rows: tokenizer files, policies for vocabularies, what is written."""
