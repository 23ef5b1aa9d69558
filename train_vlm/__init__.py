"""Programs that make weights: drawn training pictures, shards, alignment and fine-tuning of the vision language model."""
