"""Training and fine-tuning: Algorithm 1, the recipe, and the run folder."""
