"""An OpenSSH server of one's own on loopback, and a wire to it that can be cut or go dead."""

from __future__ import annotations

import contextlib
import getpass
import os
import select
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

USER = getpass.getuser()


def find_sshd() -> str | None:
    """The server's program, which is often not on a user's path."""
    return shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/sbin")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def keygen(path: Path, *more: str) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path), *more], check=True, timeout=30)


def programs() -> dict[int, str]:
    """All programs of this machine by their command lines."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return found


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


class Server:
    """sshd as the user of the tests, with its own host key, that lets one key in."""

    def __init__(self, program: str, place: Path) -> None:
        self.place = place
        self.port = free_port()
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None
        keygen(place / "host")
        keygen(place / "user")
        shutil.copy(place / "user.pub", place / "authorized")

    @property
    def host_key(self) -> str:
        """Kind and key."""
        return " ".join((self.place / "host.pub").read_text().split()[:2])

    @property
    def fingerprint(self) -> str:
        said = subprocess.run(
            ["ssh-keygen", "-lf", str(self.place / "host.pub")], capture_output=True, text=True, check=True, timeout=30
        )
        return said.stdout.split()[1]

    def configuration(self, *, sftp: bool = True) -> Path:
        """Write the server's configuration."""
        lines = [
            f"Port {self.port}",
            "ListenAddress 127.0.0.1",
            f"HostKey {self.place / 'host'}",
            f"AuthorizedKeysFile {self.place / 'authorized'}",
            "StrictModes no",
            "UsePAM no",
            "PidFile none",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "PermitRootLogin prohibit-password",
            "MaxStartups 100",
            *(["Subsystem sftp internal-sftp"] if sftp else []),
        ]
        file = self.place / "sshd_config"
        # Newer servers lock a source out that breaks off often, which is what these tests do.
        for more in (["PerSourcePenalties no"], []):
            file.write_text("\n".join([*lines, *more]) + "\n")
            if not subprocess.run([self._program, "-t", "-f", str(file)], capture_output=True, timeout=30).returncode:
                break
        return file

    def start(self, *, sftp: bool = True) -> None:
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, parents=True, exist_ok=True)  # where it puts off its rights
        log = (self.place / "log").open("ab")
        self._process = subprocess.Popen(
            [self._program, "-D", "-e", "-f", str(self.configuration(sftp=sftp))], stdout=log, stderr=log
        )
        end = time.monotonic() + 20
        while time.monotonic() < end:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as one:
                if one.recv(4):
                    return
            assert self._process.poll() is None, (self.place / "log").read_text()
            time.sleep(0.05)
        raise AssertionError("sshd does not answer")

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(10)
            self._process = None

    def kill(self) -> None:
        """End the server and all its sessions at once, with whatever runs in them."""
        assert self._process is not None
        ours, grown = {self._process.pid}, True
        while grown:
            more = {pid for pid in programs() if _parent(pid) in ours} | ours
            grown, ours = more != ours, more
        for pid in ours:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait(10)
        self._process = None

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def furnish(self, home: Path, *, known: bool = True) -> None:
        """A home with the user's key; loopback on every port is known."""
        (home / ".ssh").mkdir(parents=True, mode=0o700)
        for name in ("user", "user.pub"):
            shutil.copy(self.place / name, home / ".ssh" / name.replace("user", "id_ed25519"))
        if known:
            (home / ".ssh" / "known_hosts").write_text(f"127.0.0.1,[127.0.0.1]:* {self.host_key}\n")


class Wire:
    """A TCP proxy: every connection of a client goes to the server, until it is cut."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.connections = 0
        self.dead = False
        """Nothing gets through any more."""
        self.limits: dict[int, int] = {}
        """Connection number -> bytes from the client after which it is cut."""
        self._open: list[tuple[socket.socket, socket.socket]] = []
        self._frozen: set[int] = set()
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, *, dead: bool = False) -> None:
        """Cut every connection at once; `dead`: for good."""
        self.dead = self.dead or dead
        with self._lock:
            pairs, self._open = self._open, []
        for pair in pairs:
            for one in pair:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

    def freeze(self) -> None:
        """Pull the cable: the connections stay open, and nothing comes through them any more."""
        with self._lock:
            self._frozen.update(id(pair) for pair in self._open)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            if self.dead:
                client.close()
                continue
            try:
                server = socket.create_connection(("127.0.0.1", self._target), 10)
            except OSError:
                client.close()
                continue
            pair = (client, server)
            with self._lock:
                self._open.append(pair)
            threading.Thread(target=self._pump, args=(pair, self.limits.get(self.connections)), daemon=True).start()

    def _pump(self, pair: tuple[socket.socket, socket.socket], limit: int | None) -> None:
        client, server = pair
        passed = 0
        with contextlib.suppress(OSError, ValueError):
            while True:
                ready, _, _ = select.select([client, server], [], [], 0.05)
                if id(pair) in self._frozen:
                    continue
                for one in ready:
                    data = one.recv(65536)
                    if not data:
                        return self._end(pair)
                    (server if one is client else client).sendall(data)
                    passed += len(data) if one is client else 0
                    if limit is not None and passed >= limit:
                        return self._end(pair)
        return self._end(pair)

    @staticmethod
    def _end(pair: tuple[socket.socket, socket.socket]) -> None:
        for one in pair:
            one.close()

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *error: object) -> None:
        self._listener.close()
        self.cut(dead=True)


class Said:
    """Progress that remembers what was said, and does something when it hears a word."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.moved: list[float] = []
        self._when: list[tuple[str, Callable[[], None]]] = []

    def when(self, word: str, act: Callable[[], None]) -> None:
        """Do something the first time that a line with this word is said; ``copy``: the first time that a piece was copied."""
        self._when.append((word, act))

    def _hear(self, text: str) -> None:
        for entry in [one for one in self._when if one[0] in text]:
            self._when.remove(entry)
            entry[1]()

    def say(self, message: str) -> None:
        self.lines.append(message)
        self._hear(message)

    @contextlib.contextmanager
    def task(self, title: str, total: float):
        outer = self

        class _Task:
            def advance(self, steps: float = 1, **values: object) -> None:
                outer.moved.append(steps)
                outer._hear(f"copy {title}")

        yield _Task()

    def text(self) -> str:
        return "\n".join(self.lines)
