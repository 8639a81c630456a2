"""What leaves the process: the log, notifications, the systemd unit."""
