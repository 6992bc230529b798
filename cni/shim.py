#!/usr/bin/python3 -IS
"""The plugin's binary: hands the request to meshd as it came, or does it locally where meshd is down.

Installed with the three settings below filled in. It imports two built-in modules, for an interpreter with
`socket` and `json` takes twice as long to start.

To the daemon, with the descriptor of CNI_NETNS beside it if that opens:

    "CECNI1" | token 16 hex | length of variables u32 | length of stdin u32 | K=V NUL K=V NUL ... | stdin

and back: exit status u8 | length u32 | what to print.
"""

import _socket
import posix

SOCKET = "/run/crossedge/cni.sock"
PYTHON = "/usr/bin/python3"
ROOT = "/"
VERSIONS = b'"0.1.0","0.2.0","0.3.0","0.3.1","0.4.0","1.0.0","1.1.0"'
ABOUT = b"crossedge: CNI plugin of the crossedge mesh; CNI protocol versions supported: "
TIMEOUT = 60.0
ANSWER_LIMIT = 1 << 24


def fail(code: int, message: str) -> int:
    """Print an error as the specification has it; return the exit status."""
    message = message.replace('"', "'")
    posix.write(1, f'{{"cniVersion":"1.1.0","code":{code},"msg":"{message}"}}\n'.encode())
    return 1


def read(descriptor: int) -> bytes:
    """Return all that can be read."""
    parts = []
    while part := posix.read(descriptor, 65536):
        parts.append(part)
    return b"".join(parts)


def receive(sock: _socket.socket, length: int) -> bytes:
    """Return exactly so many bytes; raises `OSError` where the daemon ends first."""
    data = b""
    while len(data) < length:
        part = sock.recv(length - len(data))
        if not part:
            raise OSError("meshd ended")
        data += part
    return data


def ask(token: bytes, variables: bytes, stdin: bytes, netns: int) -> int:
    """Have the daemon do it; return the exit status. Raises `OSError` where it did not, or did not say so."""
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    sock.settimeout(TIMEOUT)
    sock.connect(SOCKET)
    head = b"CECNI1" + token + len(variables).to_bytes(4, "big") + len(stdin).to_bytes(4, "big")
    native = netns.to_bytes(4, "big" if _socket.htons(1) == 1 else "little") if netns >= 0 else b""
    rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, native)] if native else []
    sock.sendmsg([head], rights)
    sock.sendall(variables + stdin)
    answer = receive(sock, 5)
    length = int.from_bytes(answer[1:], "big")
    if length > ANSWER_LIMIT:
        raise OSError("no answer of meshd's")
    output = receive(sock, length)
    while output:
        output = output[posix.write(1, output) :]
    return answer[0]


def local(token: bytes, stdin: bytes) -> None:
    """Become the plugin that needs no daemon."""
    copy = posix.memfd_create("stdin", 0)
    rest = stdin
    while rest:
        rest = rest[posix.write(copy, rest) :]
    posix.lseek(copy, 0, 0)
    posix.dup2(copy, 0)
    environment = dict(posix.environ)
    environment[b"CROSSEDGE_CNI_TOKEN"] = token
    posix.execve(PYTHON, [PYTHON, "-I", "-m", "crossedge.cni.local", "--root", ROOT], environment)


def main() -> int:
    """Serve one request; return the exit status."""
    environment = posix.environ
    command = environment.get(b"CNI_COMMAND", b"")
    if not command:
        posix.write(2, ABOUT + VERSIONS.replace(b'"', b"").replace(b",", b", ") + b"\n")
        return 0
    if command == b"VERSION":
        posix.write(1, b'{"cniVersion":"1.1.0","supportedVersions":[' + VERSIONS + b"]}\n")
        return 0
    try:
        stdin = read(0)
    except OSError as error:
        return fail(5, "error reading from stdin: " + str(error))
    token = posix.urandom(8).hex().encode()
    netns = -1
    if path := environment.get(b"CNI_NETNS"):
        try:
            netns = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC | posix.O_NONBLOCK)
        except OSError:
            netns = -1
    variables = b"".join(k + b"=" + v + b"\0" for k, v in environment.items() if k.startswith(b"CNI_"))
    try:
        return ask(token, variables, stdin, netns)
    except PermissionError:
        return fail(104, f"{SOCKET} refuses user {posix.geteuid()}: the plugin must be run by root")
    except OSError:
        pass
    try:
        local(token, stdin)
    except OSError as error:
        return fail(50, "meshd does not run, and " + PYTHON + " cannot be started: " + str(error))
    return 1


if __name__ == "__main__":
    posix._exit(main())
