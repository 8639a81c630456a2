"""How a model computes: what Onward puts in place of parts of its forward and backward pass."""
