"""The generator of the demo's stories, what writes the bundled texts with it, and what trained the bundled model on it."""
