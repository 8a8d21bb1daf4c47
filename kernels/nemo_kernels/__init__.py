"""Operations of the model family: a PyTorch reference each, and faster paths beside it."""
