"""Checkpoints on disk: written, verified, loaded."""
