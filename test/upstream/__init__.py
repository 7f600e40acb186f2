"""Changes to PyTorch that a pull request could bring, and a runner that applies and tests them."""
