"""safefs: a FUSE overlay that makes writes to shared directories safe."""

__version__ = "0.1.0"
