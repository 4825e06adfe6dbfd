"""Limits that jobs meet on a real Slurm: of time, of memory; a person's scancel; an utterance that no step survives."""
