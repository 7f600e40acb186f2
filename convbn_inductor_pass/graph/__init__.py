"""Tools for reading and writing graphs in aten IR."""
