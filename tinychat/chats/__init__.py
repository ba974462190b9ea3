"""Chats on disk: the store, keeping one while it is spoken, exporting it."""
