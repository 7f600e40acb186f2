"""The paper's experiments, small, on data that comes inside a package. One module, one claim."""
