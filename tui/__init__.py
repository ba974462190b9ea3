"""The chat screen (Textual). Uses tinychat's public API only."""
