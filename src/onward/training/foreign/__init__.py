"""Checkpoints that other tools wrote: their content, read without running any of their code."""
