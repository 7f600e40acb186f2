"""What the passes read graphs in aten IR with, and write them with."""
