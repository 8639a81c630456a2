"""What moves a run, in five rooms: `intake`, `state`, `owner`, `proof`, `outside`; the files here are their ground."""
