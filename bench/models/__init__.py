"""Networks that the benchmarks define themselves, from the descriptions in the papers.

Each module is named after what its networks are for and needs nothing beyond PyTorch.
"""
