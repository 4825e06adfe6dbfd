"""`wavefleet report`: what a run did, as one page that opens offline. Reads files only; no torch."""
