"""Behaves as Python does, but the process is forked by fork_server.py: forked_python.py SOCKET ARGUMENTS…

Signals go on to the process, and its end is this one's end. Nothing but the standard library is imported.
"""

import json
import os
import signal
import socket
import struct
import sys


def start(address: str, arguments: list[str]) -> socket.socket:
    """A connection whose process has the streams of this one; they are closed here, so that pipes end with it."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    message = json.dumps({"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}).encode()
    message = struct.pack("i", len(message)) + message
    sent = socket.send_fds(connection, [message], [0, 1, 2])
    connection.sendall(message[sent:])
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    return connection


def hear(connection: socket.socket) -> int:
    content = connection.recv(4, socket.MSG_WAITALL)
    if len(content) < 4:
        sys.exit(70)  # the server is gone
    return struct.unpack("i", content)[0]


def main() -> None:
    connection = start(sys.argv[1], sys.argv[2:])
    process = hear(connection)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda number, _: os.kill(process, number))
    code = hear(connection)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main()
