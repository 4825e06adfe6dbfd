"""How an attempt ended: the starts of a run, the evidence, and the rules that make a verdict of it."""
