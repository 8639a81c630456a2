"""What is told to the world outside: the log, notifications, the systemd unit."""
