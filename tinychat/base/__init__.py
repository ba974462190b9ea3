"""Ground floor, which everything else may use: errors, events, files, the machine."""
