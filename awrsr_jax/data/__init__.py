"""Raw files -> `Corpus` -> batches."""
