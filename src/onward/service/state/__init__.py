"""The state on disk: committed, settled at a start, retained, rolled back, adopted."""
