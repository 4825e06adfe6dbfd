"""The command `wavefleet`: runs, processes and clusters. Never imports torch."""
