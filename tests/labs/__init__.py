"""Real shared filesystems for tests (filesystems.py)."""
