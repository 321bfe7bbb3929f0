"""Data for models: rows from files, their columns, labels, images and texts, batches of them."""
