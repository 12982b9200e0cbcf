"""NBD: the wire, the handshake and the transmission without I/O, and the server with it."""
