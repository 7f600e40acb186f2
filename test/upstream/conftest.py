"""The changes' tests need a patched torch: ``python -m test.upstream`` runs them."""

collect_ignore_glob = ["changes/*"]
