"""Files with which schedulers start a run: each is printed whole, for one run, with comments on what to fill in."""
