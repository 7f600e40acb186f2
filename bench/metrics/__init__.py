"""What is measured of a workload: bytes saved for backward, times and peaks, the largest batch."""
