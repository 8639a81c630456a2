"""Trackers: the run's steps, told behind training to programs that draw them; one continuous run in each."""
