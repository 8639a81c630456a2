"""The pages that `docs/generate.py` makes from the code."""
