"""Optimizers as named methods: whoever reads the state of an optimizer asks its method."""
