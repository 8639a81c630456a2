"""The processes that train one run together on several devices."""
