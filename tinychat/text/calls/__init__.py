"""Calls of tools in what a model writes: one file a kind of syntax, `families` says who writes which."""
