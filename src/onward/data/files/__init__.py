"""Training files: from bytes to the rows that stand in them."""
