"""Where models come from and where they are kept: aliases, downloads, the folder of installed models."""
