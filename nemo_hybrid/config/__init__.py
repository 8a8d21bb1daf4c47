"""Options and the shape of a model: what they are, and how they are read. Nothing imports torch."""
