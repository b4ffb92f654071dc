"""The plan of a batch: what a person writes, read and checked."""
