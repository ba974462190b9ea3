"""A network: its config, its ops, its weights, and where they are read from."""
