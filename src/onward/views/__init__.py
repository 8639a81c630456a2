"""What shows a run and its files to a person. Nothing imports these but the command line."""
