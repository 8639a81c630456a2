"""From bytes to the queue: files are found, moved in, checked, and accepted or refused."""
