"""A committed state behind OpenAI's interface, over the chat's engine."""
