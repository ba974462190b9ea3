"""The chat itself, and what opens over it; a style sheet lies beside each."""
