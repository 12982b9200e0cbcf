"""FUSE: what file operations mean here, the libraries that deliver them, and mounts."""
