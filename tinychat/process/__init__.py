"""The engine as a process of its own, and the side that talks to it."""
