"""The model: one file per mixer, each short enough to read beside the paper it implements."""
