"""Where a server listens: taken before anything is loaded, and only where that is safe. Pure."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import resource
import socket
import stat
from pathlib import Path

from ..errors import UsageError, cause, lines

BACKLOG = 2048


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address or name."""
    try:
        found = {str(each[4][0]) for each in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError) as error:
        raise UsageError(lines(f"--host {host} has no address: {cause(error)}")) from None
    return all(ipaddress.ip_address(each.partition("%")[0]).is_loopback for each in found)


def check_exposed(host: str, *, keys: bool, no_auth: bool) -> None:
    """Refuse an address that others reach where anyone could ask."""
    if not (keys or no_auth or is_loopback(host)):
        raise UsageError(
            lines(
                f"--host {host} is reached from other machines, and no key is asked for",
                "expected PARALLAMA_API_KEY, --api-key-file or --api-key; or --no-auth",
            )
        )


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        UsageError: the address is taken, or isn't ours.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    made = socket.socket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(BACKLOG)
    except OSError as error:
        made.close()
        taken = error.errno == errno.EADDRINUSE
        said = "is taken" if taken else f"cannot be listened on: {error.strerror}"
        hint = "expected a free port; --port 0 finds one" if taken else ""
        raise UsageError(lines(f"port {port} of {host} {said}", hint)) from None
    return made


def bound_file(path: Path) -> socket.socket:
    """A socket that listens on a Unix domain socket; one that a dead server left is removed.

    Raises:
        UsageError: it is taken, or is something else.
    """
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.exists():
            if not stat.S_ISSOCK(path.stat().st_mode):
                raise UsageError(lines(f"--uds {path} is no socket", "expected a new file's name"))
            with contextlib.suppress(ConnectionRefusedError):
                made.connect(str(path))
                raise UsageError(lines(f"--uds {path} is taken by another server"))
            path.unlink()
        made.bind(str(path))
        made.listen(BACKLOG)
    except OSError as error:
        made.close()
        raise UsageError(lines(f"--uds {path} cannot be listened on: {cause(error)}")) from None
    except UsageError:
        made.close()
        raise
    return made


def url_of(made: socket.socket) -> str:
    """Where a socket is reached."""
    if made.family == socket.AF_UNIX:
        return f"unix:{made.getsockname()}"
    host, port = made.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def allow_connections() -> None:
    """Let the process have as many connections open as the system allows."""
    least, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if least < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 1 << 16), most))
