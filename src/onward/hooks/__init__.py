"""What is done at a boundary: one file each."""
