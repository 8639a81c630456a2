"""The commands: each parses its options, calls `Run` or a view, and prints."""
