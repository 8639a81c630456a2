"""The proof of a run, and what machine and run lack. Nothing here writes."""
