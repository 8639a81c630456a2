"""The processes that train a run together on several devices."""
