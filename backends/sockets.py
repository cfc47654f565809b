"""What drivers and workers need of their sockets; imports nothing else, since every worker process loads it."""

import socket


def notice_dead_peer(sock: socket.socket) -> None:
    """A heartbeat by the kernel: a TCP peer whose machine or network is gone shows as a closed connection within 30 s,
    whether or not anything is being sent. Does nothing to Unix sockets, whose peers cannot vanish."""
    if sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4), ("TCP_USER_TIMEOUT", 30_000)):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
