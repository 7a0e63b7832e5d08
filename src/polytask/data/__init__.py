"""What is read. The datasets are registered by importing ``polytask.data.datasets``."""
