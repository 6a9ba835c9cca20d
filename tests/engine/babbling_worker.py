"""A worker that says what no engine says: for a client that must not trust it."""

import socket
import sys
import time

with socket.socket(fileno=int(sys.argv[1])) as connection:
    connection.recv(1)  # the start
    connection.sendall((7).to_bytes(4, "little") + b"babbles")
    time.sleep(60)
