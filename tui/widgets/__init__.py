"""The pieces of the screens. They know the conversation, never the engine."""
