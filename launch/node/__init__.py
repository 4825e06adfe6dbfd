"""One node: what it has, whether it may train, where its ranks run and meet, what they do when they hang."""
