"""The `tinychat` command: one file a command group; each imports what it needs only when it runs."""
