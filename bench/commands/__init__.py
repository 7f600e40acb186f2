"""What ``python -m bench`` runs: a function per command, whose arguments are its options."""
