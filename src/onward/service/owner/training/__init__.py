"""How the owner trains a file: from its place in the queue to the boundary that is committed."""
