"""Training files: from bytes to the rows in them."""
