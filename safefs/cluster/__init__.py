"""What the nodes of a cluster share: records with compare-and-swap, and leases (docs/decisions/0005-locks.md)."""
