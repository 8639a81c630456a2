"""The proof of a run, and the diagnosis of run and machine. Nothing here changes the run's state."""
