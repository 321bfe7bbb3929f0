"""Files: what a checkpoint holds, reading and writing it."""
