"""Trackers: sends the run's steps, behind training, to programs that draw them, as one continuous run in each."""
