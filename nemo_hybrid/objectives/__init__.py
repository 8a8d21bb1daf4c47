"""What a run minimises: from a batch to named parts of a loss. Mathematics only."""
