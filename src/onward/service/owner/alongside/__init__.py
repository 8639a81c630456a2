"""What runs alongside the work of the owner: a thread of jobs, signs of life, two processes."""
