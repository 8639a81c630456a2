"""What the model knows: the plans that keep it, the rows and texts that measure it, the table of what was measured."""
