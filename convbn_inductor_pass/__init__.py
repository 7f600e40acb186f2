"""Tune mode for eval-mode ConvBN blocks under torch.compile."""
