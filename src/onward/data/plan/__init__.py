"""Which rows a step trains, as pure functions of the run's position."""
