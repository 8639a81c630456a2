"""How the owner trains a file: from its place in the queue to a committed boundary."""
