"""From recorded speech to padded tensors: sources, text, corpus, plan, batches."""
