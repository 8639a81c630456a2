"""Checkpoints that other tools wrote: what is in them, read without running anything of theirs."""
