"""How the library makes, sees, asks and owns a run: what `onward.run.Run` is made of."""
