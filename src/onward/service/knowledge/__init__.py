"""What the model knows: the plans that preserve it, the rows and texts that measure it, the table of measurements."""
