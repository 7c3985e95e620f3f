"""Training from a recipe; the bundled models were made with it."""
