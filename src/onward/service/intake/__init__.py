"""From bytes to the queue: files are found, brought in, checked, refused or accepted."""
