"""Training from a recipe: the bundled model is made by nothing else."""
