"""What the tests share: real mounts, clients in C, and small helpers."""
