"""A command per file: its options, and what it does. What takes long to import is imported there,
when the options are known to be good."""
