"""What is done at a boundary, one file per task."""
