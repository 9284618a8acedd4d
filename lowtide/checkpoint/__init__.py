"""The checkpoint: its file format, the hook into diffusers, provenance, facts of a packed model, another schedule."""
