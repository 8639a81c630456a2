"""Files with which schedulers start a run: each is printed whole, for one run, with what it may need to be told."""
