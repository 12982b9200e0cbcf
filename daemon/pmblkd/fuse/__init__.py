"""FUSE: what file operations mean here, and the library that delivers them."""
