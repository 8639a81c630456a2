"""What would stop a run on a machine, found before it does."""
