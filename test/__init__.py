"""Tests; a package for ``python -m test.upstream`` alone, for which Python's own would be taken."""
