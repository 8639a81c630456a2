"""How a model computes: Onward's replacements for parts of its forward and backward pass."""
