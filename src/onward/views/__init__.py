"""Presents a run and its files to people. Only the command line imports these packages."""
