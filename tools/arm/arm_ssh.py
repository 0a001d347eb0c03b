"""A real OpenSSH server on loopback whose sessions land in the Arm root: what ``zsq bench --device ssh://...`` meets on a board.

    python tools/arm/arm_ssh.py --cpu cortex-a53       # prints how to reach it, and serves until it is interrupted

The server is this machine's own ``sshd``. After the login it changes its root folder to the Arm root (``ChrootDirectory``), so the
shell, Python and every file that is copied are the board's. The user is an ordinary one, logs in with a key that is made for the
occasion, and exists only in the server's own mount namespace. Nothing of the system is changed, and all of it ends with the server.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

from arm_root import CPUS, DEFAULT_CPU, INSIDE, USER, USER_ID, default_root, find_root, namespaces  # noqa: E402

from zsq_deploy.errors import UsageError, ZsqError  # noqa: E402

__all__ = ["Server", "serve"]

ALIAS = "arm-board"
_START = 30.0

_SCRIPT = """
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/sshd
mount --bind "$1" /etc/passwd
shift
exec "$@"
"""


@dataclass
class Server:
    """A running server.

    Attributes:
        port: Where it listens, on 127.0.0.1.
        home: A home folder whose ``.ssh`` knows key, host key and the alias ``arm-board``: ``HOME=... ssh arm-board``.
        log: What the server says.
    """

    port: int
    home: Path
    log: Path
    _arguments: list[str]
    _process: subprocess.Popen[bytes]

    @property
    def address(self) -> str:
        """What to give to ``--device``."""
        return f"ssh://{USER}@127.0.0.1:{self.port}"

    def environment(self) -> dict[str, str]:
        """This process's environment, with the home folder above."""
        return {**os.environ, "HOME": str(self.home)}

    def stop(self) -> None:
        """End the server, its sessions and everything that runs in them, at once: what a pulled cable does."""
        if self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)  # its namespace of processes dies with it
        self._process.wait()

    def start(self) -> None:
        """Start it, again after :meth:`stop`, on the same port with the same keys.

        Raises:
            ZsqError: It ended, or does not answer.
        """
        if self._process.poll() is None:
            return
        self._process = _launch(self._arguments, self.log)
        _await(self)


def _launch(arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as out:
        return subprocess.Popen(
            list(arguments), stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )


def _await(server: Server) -> None:
    end = time.monotonic() + _START
    while time.monotonic() < end:
        if server._process.poll() is not None:
            break
        try:
            with socket.create_connection(("127.0.0.1", server.port), timeout=1) as line:
                if line.recv(4) == b"SSH-":
                    return
        except OSError:
            time.sleep(0.1)
    server.stop()
    raise ZsqError("the SSH server does not start", where=str(server.log), remedy="read the end of that file")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _key(path: Path) -> str:
    line = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(path)]
    subprocess.run(line, check=True, stdin=subprocess.DEVNULL)
    return path.with_suffix(".pub").read_text(encoding="ascii").strip()


@contextmanager
def serve(root: Path, *, cpu: str = DEFAULT_CPU) -> Iterator[Server]:
    """A server whose sessions land in the root.

    Args:
        root: A finished root (see :func:`arm_root.find_root`).
        cpu: The processor of the board, of :data:`arm_root.CPUS`.

    Raises:
        UsageError: OpenSSH is not installed.
        ZsqError: The server does not start.
    """
    sshd = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if sshd is None or shutil.which("ssh-keygen") is None:
        raise UsageError("OpenSSH's server is missing", remedy="apt-get install openssh-server")
    with tempfile.TemporaryDirectory(prefix="zsq-arm-ssh-") as temporary:
        folder = Path(temporary)
        folder.chmod(0o711)  # the server reads the authorized keys as the user
        port = _free_port()
        host_key = _key(folder / "host")
        home = folder / "home"
        (home / ".ssh").mkdir(parents=True, mode=0o700)
        user_key = _key(home / ".ssh" / "id_ed25519")
        known = f"[127.0.0.1]:{port} {host_key}\n"
        (home / ".ssh" / "known_hosts").write_text(known, encoding="ascii")
        settings = {
            "Host": ALIAS,
            "  HostName": "127.0.0.1",
            "  Port": str(port),
            "  User": USER,
            "  IdentityFile": str(home / ".ssh" / "id_ed25519"),
            "  UserKnownHostsFile": str(home / ".ssh" / "known_hosts"),
        }
        (home / ".ssh" / "config").write_text(
            "".join(f"{key} {value}\n" for key, value in settings.items()), encoding="utf-8"
        )
        (folder / "authorized_keys").write_text(user_key + "\n", encoding="ascii")
        users = [
            row
            for row in Path("/etc/passwd").read_text(encoding="utf-8").splitlines()
            if not row.startswith(f"{USER}:")
        ]
        (folder / "passwd").write_text(
            "\n".join([*users, f"{USER}:*:{USER_ID}:{USER_ID}:a device:/home/{USER}:/bin/sh", ""]), encoding="utf-8"
        )
        (folder / "sshd_config").write_text(
            "\n".join(
                [
                    f"ListenAddress 127.0.0.1:{port}",
                    f"HostKey {folder / 'host'}",
                    f"AuthorizedKeysFile {folder / 'authorized_keys'}",
                    "StrictModes no",  # the keys lie in a temporary folder
                    "PidFile none",
                    "UsePAM no",
                    "PasswordAuthentication no",
                    "KbdInteractiveAuthentication no",
                    f"AllowUsers {USER}",
                    f"ChrootDirectory {INSIDE}",
                    "Subsystem sftp internal-sftp",
                    f"SetEnv QEMU_CPU={CPUS[cpu].name} LANG=C.UTF-8",
                    "",
                ]
            ),
            encoding="ascii",
        )
        # The server dies with this process, however that ends.
        tied = ["setpriv", "--pdeathsig", "KILL", "--"]
        arguments = [*tied, *namespaces(root, cpu), "/bin/sh", "-euc", _SCRIPT, "sh", str(folder / "passwd")]
        arguments += [sshd, "-D", "-e", "-f", str(folder / "sshd_config")]
        log = folder / "sshd.log"
        server = Server(port, home, log, arguments, _launch(arguments, log))
        try:
            _await(server)
            yield server
        finally:
            server.stop()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; an exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "--root", type=Path, default=None, help="folder of the root (default: ZSQ_ARM_ROOT or the cache)"
    )
    parser.add_argument("--cpu", choices=tuple(CPUS), default=DEFAULT_CPU)
    options = parser.parse_args(argv)
    try:
        with serve(find_root(options.root or default_root()), cpu=options.cpu) as server:
            print(f"HOME={server.home} zsq bench OUT --device {server.address}", flush=True)
            with suppress(KeyboardInterrupt):
                signal.pause()
    except ZsqError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
