"""Cards, tables and plots."""
