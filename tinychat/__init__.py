"""tinychat: chat with a language model on your own machine."""
