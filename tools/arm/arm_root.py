"""A Debian arm64 user land on an x86 machine: made of Debian's packages, run by qemu's user-mode emulation.

What runs in it is real: the aarch64 wheels of the runtimes, with the integer kernels that an Arm board runs. So parity and accuracy
found here hold there. Times do not: the emulator takes 20 to 100 times as long, and differently for every instruction.

    python tools/arm/arm_root.py build                       # once, as root, on Debian; some minutes
    python tools/arm/arm_root.py run -- python3 -c 'import onnxruntime; print(onnxruntime.__version__)'
    python tools/arm/arm_root.py run --cpu cortex-a53 --bind out:/data -- python3 /data/agent.py --bundle /data/net.zsq.tar
    python tools/arm/arm_root.py list                        # what is in it

Debian's packages come from the mirror that this machine's apt uses, the wheels from the index that its pip uses. The root lies in
``ZSQ_ARM_ROOT``, or in the user's cache folder. Needed: the packages debootstrap, qemu-user-static and openssh-server, and to be root.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from zsq_deploy.errors import UsageError, ZsqError

__all__ = ["CPUS", "Cpu", "build", "command", "default_root", "find_root", "ready", "run"]

HERE = Path(__file__).resolve().parent
STAMP = "zsq-arm.json"
FORMAT = 1
USER = "device"
USER_ID = 1000
INSIDE = "/mnt/device"
"""Where :func:`command` shows the root to what it starts."""
PACKAGES = ("python3",)
WHEELS = ("numpy", "onnxruntime")


@dataclass(frozen=True)
class Cpu:
    """An Arm processor that the emulator plays.

    Attributes:
        name: As the emulator calls it.
        part: Its part number in ``/proc/cpuinfo``, by which runtimes recognize it.
        features: Its features there.
        summary: What is telling about it.
    """

    name: str
    part: str
    features: str
    summary: str

    def cpuinfo(self, cores: int = 2) -> str:
        """The text of ``/proc/cpuinfo``; it says that the processor is emulated."""
        lines = []
        for core in range(cores):
            lines += [
                f"processor\t: {core}",
                "BogoMIPS\t: 100.00",
                f"Features\t: {self.features}",
                "CPU implementer\t: 0x41",
                "CPU architecture: 8",
                "CPU variant\t: 0x0",
                f"CPU part\t: {self.part}",
                "CPU revision\t: 4",
                "",
            ]
        return "\n".join([*lines, f"Hardware\t: {self.name}, emulated by qemu", ""])


_OLD = "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
_DOT = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
CPUS: Mapping[str, Cpu] = {
    cpu.name: cpu
    for cpu in (
        Cpu("cortex-a53", "0xd03", _OLD, "Armv8.0: no dot products (Raspberry Pi 3, many phones)"),
        Cpu("cortex-a76", "0xd0b", _DOT, "Armv8.2: dot products (Raspberry Pi 5, phones since 2018)"),
        Cpu("max", "0xd40", f"{_DOT} sve i8mm bf16", "Armv8.6: 8-bit matrix products, SVE (as Neoverse V1)"),
    )
}
DEFAULT_CPU = "cortex-a76"

_MAGIC = r"\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00"
_MASK = r"\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff"
_BINFMT = Path("/proc/sys/fs/binfmt_misc")


def default_root() -> Path:
    """``ZSQ_ARM_ROOT``, or ``zsq-deploy/arm64`` in the user's cache folder."""
    override = os.environ.get("ZSQ_ARM_ROOT")
    if override:
        return Path(override).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME")
    base = Path(cache) if cache and Path(cache).is_absolute() else Path.home() / ".cache"
    return base / "zsq-deploy" / "arm64"


def find_root(folder: Path | None = None) -> Path:
    """The finished root.

    Raises:
        ZsqError: It was not built, was not finished, or this machine cannot run it.
    """
    root = folder or default_root()
    remedy = "build it, as root: make arm-root"
    try:
        stamp = json.loads((root / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ZsqError("there is no Arm root here", where=str(root), remedy=remedy) from error
    if stamp.get("format") != FORMAT:
        raise ZsqError("the Arm root is of another version", where=str(root), remedy=f"remove the folder and {remedy}")
    ready()
    return root


def ready() -> None:
    """Make sure that this machine can enter the root: be root, have the tools, and start Arm programs by the emulator.

    Raises:
        UsageError: Something is missing.
    """
    if os.geteuid() != 0:
        raise UsageError(
            "only root can enter the Arm root (it mounts and changes the root folder)",
            remedy="run this as root, in a container or a virtual machine if you like",
        )
    _tool("unshare", "util-linux")
    _emulation()


def _tool(name: str, package: str) -> str:
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found is None:
        raise UsageError(f"the program {name} is missing", remedy=f"apt-get install {package}")
    return found


def _emulation() -> None:
    """Have the kernel start Arm programs by qemu, here and in other root folders (flag F)."""
    if not (_BINFMT / "status").exists():
        subprocess.run(["mount", "-t", "binfmt_misc", "binfmt_misc", str(_BINFMT)], check=False, capture_output=True)
    if (_BINFMT / "qemu-aarch64").exists():
        return
    emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if emulator is None:
        raise UsageError("the emulator qemu-aarch64-static is missing", remedy="apt-get install qemu-user-static")
    try:
        (_BINFMT / "register").write_text(f":qemu-aarch64:M::{_MAGIC}:{_MASK}:{emulator}:F", encoding="ascii")
    except OSError as error:
        raise UsageError(
            f"the kernel does not take a new program format ({error.strerror})",
            where=str(_BINFMT),
            remedy="load the module binfmt_misc, or run this where it can be mounted",
        ) from error


def command(
    root: Path, argv: Sequence[str], *, cpu: str = DEFAULT_CPU, binds: Mapping[str, str] | None = None
) -> list[str]:
    """The command line that starts `argv` in the root, in namespaces of its own: its mounts and processes end with it.

    Args:
        root: A finished root (see :func:`find_root`).
        argv: A program in the root, and its arguments.
        cpu: The processor that the emulator plays, of :data:`CPUS`.
        binds: Folders that the program sees as well: folder here -> place in the root.
    """
    steps = []
    for source, place in (binds or {}).items():
        where = INSIDE + place
        steps.append(
            f"mkdir -p {_quoted(where)} && mount --bind {_quoted(str(Path(source).resolve()))} {_quoted(where)}"
        )
    script = " && ".join([*steps, f'exec chroot {INSIDE} "$@"'])
    environment = {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
        "QEMU_CPU": CPUS[cpu].name,
    }
    words = [f"{name}={value}" for name, value in environment.items()]
    return [*namespaces(root, cpu), "/bin/sh", "-c", script, "sh", "/usr/bin/env", "-i", *words, *argv]


def namespaces(root: Path, cpu: str) -> list[str]:
    """The front of a command line whose rest runs outside the root, but sees it at :data:`INSIDE`, made ready."""
    described = root / f"cpuinfo.{cpu}"
    described.write_text(CPUS[cpu].cpuinfo(), encoding="ascii")
    own = ["--mount", "--propagation", "private", "--pid", "--fork", "--kill-child=KILL"]
    return [_tool("unshare", "util-linux"), *own, str(HERE / "enter.sh"), str(root.resolve()), str(described.resolve())]


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def run(
    root: Path,
    argv: Sequence[str],
    *,
    cpu: str = DEFAULT_CPU,
    binds: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a program in the root and wait for it; what it says is kept."""
    line = command(root, argv, cpu=cpu, binds=binds)
    return subprocess.run(line, check=False, capture_output=True, text=True, timeout=timeout)


# ---------------------------------------------------------------------------------------------------------------------
# building
# ---------------------------------------------------------------------------------------------------------------------


def _mirror() -> tuple[str, str, str]:
    """Address, code name and keyring of Debian's main archive, as this machine's apt has them."""
    line = [
        "apt-get",
        "indextargets",
        "--format",
        "$(ORIGIN)|$(COMPONENT)|$(REPO_URI)|$(CODENAME)",
        "Created-By: Packages",
    ]
    found = subprocess.run(line, check=True, capture_output=True, text=True).stdout
    release = dict(
        row.split("=", 1) for row in Path("/etc/os-release").read_text(encoding="utf-8").splitlines() if "=" in row
    )
    wanted = release.get("VERSION_CODENAME", "").strip('"')
    for row in found.splitlines():
        origin, component, address, name = row.split("|")
        if origin == "Debian" and component == "main" and name == wanted:
            return address, name, "/usr/share/keyrings/debian-archive-keyring.gpg"
    raise UsageError(
        "apt knows no archive of Debian's own packages here",
        where="/etc/apt/sources.list.d",
        remedy="build the root on Debian, after apt-get update",
    )


def _step(title: str, argv: Sequence[str], log: Path) -> None:
    started = time.perf_counter()
    print(f"{title} ...", flush=True)
    with log.open("a", encoding="utf-8") as file:
        code = subprocess.run(
            argv, check=False, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        ).returncode
    if code:
        raise ZsqError(
            f"{title}: exit code {code}", where=str(log), remedy="read the end of that file, mend it, build again"
        )
    print(f"{title}: {time.perf_counter() - started:.0f} s", flush=True)


def _wheels(place: Path, python: str, wheels: Sequence[str]) -> list[str]:
    """The command that unpacks aarch64 wheels into a folder; nothing of them is run."""
    platforms = [f"manylinux_2_{minor}_aarch64" for minor in range(17, 37)] + ["manylinux2014_aarch64"]
    options = ["--quiet", "--disable-pip-version-check", "--no-compile", "--only-binary=:all:", "--upgrade"]
    line = [sys.executable, "-m", "pip", "install", *options, "--implementation", "cp", "--python-version", python]
    return [*line, *(word for name in platforms for word in ("--platform", name)), "--target", str(place), *wheels]


def build(root: Path, wheels: Sequence[str] = WHEELS, *, force: bool = False) -> None:
    """Make the root: debootstrap's first stage here, the second one in it, then the wheels.

    Args:
        root: The folder; a finished one is left alone.
        wheels: Requirements, as pip takes them; a bare ``onnxruntime`` is pinned to the version that is installed here.
        force: Remove what is there and build anew.

    Raises:
        ZsqError: A tool is missing, or a step failed.
    """
    ready()
    if (root / STAMP).exists() and not force:
        print(f"{root}: built already (--force builds it again)")
        return
    debootstrap = _tool("debootstrap", "debootstrap")
    address, suite, keyring = _mirror()
    if root.exists() and any(root.iterdir()) and not ((root / STAMP).exists() or (root / "debootstrap").is_dir()):
        raise UsageError("this folder holds something else", where=str(root), remedy="name an empty folder")
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    log = root.parent / f"{root.name}.log"
    log.write_text("", encoding="utf-8")
    stage = [debootstrap, "--arch=arm64", "--foreign", "--variant=minbase", f"--keyring={keyring}"]
    _step("packages", [*stage, f"--include={','.join(PACKAGES)}", suite, str(root), address], log)
    # Nothing has to survive a power cut here, and dpkg's waiting for the disk is most of the time on a busy machine.
    (root / "etc" / "dpkg" / "dpkg.cfg.d").mkdir(parents=True, exist_ok=True)
    (root / "etc" / "dpkg" / "dpkg.cfg.d" / "zsq").write_text("force-unsafe-io\nno-debsig\n", encoding="ascii")
    _step("second stage, emulated", command(root, ["/debootstrap/debootstrap", "--second-stage"]), log)
    with (root / "etc" / "passwd").open("a", encoding="ascii") as file:
        file.write(f"{USER}:*:{USER_ID}:{USER_ID}:a device:/home/{USER}:/bin/sh\n")
    home = root / "home" / USER
    home.mkdir(parents=True)
    os.chown(home, USER_ID, USER_ID)
    (root / "tmp").chmod(0o1777)
    python = next(root.glob("usr/bin/python3.[0-9]*")).name.removeprefix("python")
    wanted = [_pinned(name) for name in wheels]
    _step("wheels", _wheels(root / "usr/local/lib" / f"python{python}" / "dist-packages", python, wanted), log)
    stamp = {"format": FORMAT, "suite": suite, "python": python, "wheels": wanted}
    (root / STAMP).write_text(json.dumps(stamp, indent=1) + "\n", encoding="utf-8")
    print(f"{root}: ready")


def _pinned(requirement: str) -> str:
    if requirement != "onnxruntime":
        return requirement
    return f"onnxruntime=={importlib.metadata.version('onnxruntime')}"


_LIST = """
import importlib.metadata as m, platform
print(platform.machine(), 'python', platform.python_version())
print('\\n'.join(sorted(f'{d.name} {d.version}' for d in m.distributions())))
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; an exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "--root", type=Path, default=None, help="folder of the root (default: ZSQ_ARM_ROOT or the cache)"
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    making = verbs.add_parser("build", help="make the root")
    making.add_argument("--force", action="store_true", help="remove one that is there")
    making.add_argument(
        "--wheel", action="append", default=[], help="a further wheel, or onnxruntime==VERSION (repeatable)"
    )
    running = verbs.add_parser("run", help="run a program in it")
    running.add_argument("--cpu", choices=tuple(CPUS), default=DEFAULT_CPU)
    running.add_argument(
        "--bind", action="append", default=[], metavar="FOLDER:PLACE", help="a folder that it sees (repeatable)"
    )
    running.add_argument("argv", nargs="+")
    verbs.add_parser("list", help="what is in it")
    options = parser.parse_args(argv)
    root = options.root or default_root()
    try:
        if options.verb == "build":
            named = {word.split("=", 1)[0] for word in options.wheel}
            build(root, [*(name for name in WHEELS if name not in named), *options.wheel], force=options.force)
            return 0
        find_root(root)
        if options.verb == "list":
            return subprocess.run(command(root, ["python3", "-c", _LIST]), check=False).returncode
        binds = dict(word.rsplit(":", 1) for word in options.bind)
        return subprocess.run(command(root, options.argv, cpu=options.cpu, binds=binds), check=False).returncode
    except ZsqError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
