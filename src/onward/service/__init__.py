"""What moves a run: intake, the worker's journey through a file, commits, going back, proof."""
