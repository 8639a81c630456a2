"""The state on disk: committed, settled at a start, kept, taken back, adopted."""
