"""Whether a client takes what is written to it, by the system's own books; knows no HTTP."""

import asyncio
import fcntl
import socket
import struct
import termios
from typing import NamedTuple

_TCP_INFO_BYTES, _BYTES_ACKED = 192, 120  # of struct tcp_info, include/uapi/linux/tcp.h


class Unread(NamedTuple):
    """How far a client has come."""

    progress: int  # another number whenever the client has taken something
    is_waiting: bool  # whether there is anything for it to take


def look(transport: asyncio.Transport) -> Unread:
    """See how far the client of a TCP connection has come. Raises OSError for a closed one.

    What lies in the transport's own buffer says little: the system asks for more when a good part
    of its own is free, megabytes later, and under TLS the transport knows one buffer of two.
    """
    num_bytes = transport.get_write_buffer_size()
    if not hasattr(socket, "TCP_INFO"):  # not on macOS: where a client is slow, it takes longer
        return Unread(num_bytes, num_bytes > 0)
    connection = transport.get_extra_info("socket")
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    if len(info) < _TCP_INFO_BYTES:  # a system before Linux 4.10
        return Unread(num_bytes, num_bytes > 0)
    (num_acked,) = struct.unpack_from("Q", info, _BYTES_ACKED)
    (num_queued,) = struct.unpack("i", fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4)))
    return Unread(num_acked, num_queued > 0 or num_bytes > 0)
