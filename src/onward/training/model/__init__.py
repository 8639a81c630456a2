"""The model that is trained: its base, its adapter, how it is loaded and written."""
