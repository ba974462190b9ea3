"""Sources of models and their place on disk: aliases, downloads, the folder of installed models."""
