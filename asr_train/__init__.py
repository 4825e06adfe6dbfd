"""Wavefleet's training program: prepare, train, evaluate, export, transcribe."""

__version__ = "0.1.0"
