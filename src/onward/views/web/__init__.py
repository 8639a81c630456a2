"""What the two servers, the page and the interface over HTTP, have in common."""
