"""Talking to a committed state of a run. `engine.py` gives answers; nothing here knows of terminals or pages."""
