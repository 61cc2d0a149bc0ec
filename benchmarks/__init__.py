"""Measures safefs side by side with the bare directory and with other FUSE filesystems: `make bench`."""
