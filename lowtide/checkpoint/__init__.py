"""The checkpoint: format, hook into diffusers, provenance, facts of a model, other schedules."""
