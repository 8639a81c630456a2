"""What a row says: its format, its messages, and the proof that they are trained as it says."""
