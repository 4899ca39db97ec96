"""Namespaces, limits and verdict of the sandbox, as a separate program that imports the standard library only.

There are three processes. The launcher enters new namespaces and waits. Its child is the first process of the new PID
namespace: it builds the file system, starts a fresh interpreter for code and tests (`plmtune.sandbox.program`), waits
for the verdict and reports it. When it ends, the kernel ends all other processes of the namespace. The interpreter has
no capabilities: it cannot trace, read or signal the process that waits for it.

`pathlib`, `contextlib`, `typing`, `json`, `socket` and `signal` take longer to import than most code takes to run.
"""

# ruff: noqa: PTH102, PTH101, PTH103, PTH110, PTH112, PTH114, PTH115, PTH120, PTH123, PTH211, SIM105
from __future__ import annotations

import _signal
import _socket
import ctypes
import fcntl
import marshal
import os
import resource
import select
import struct

from plmtune.sandbox.program import KEY_BYTES, READY, STUB

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# linux/sched.h: mount, cgroup, UTS, IPC, user, process and network namespaces
NAMESPACES = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
MS_BIND, MS_REC, MS_PRIVATE, MS_NOSUID, MS_NODEV = 0x1000, 0x4000, 0x40000, 0x2, 0x4
MNT_DETACH = 2
AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = -100, 0x8000, 1  # the other MOUNT_ATTRs are as MS_
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
CAPABILITY_VERSION = 0x20080522
MOUNT_SETATTR = 442  # the same on every machine, unlike:
PIVOT_ROOT = 155 if os.uname().machine == "x86_64" else 41

SIOCSIFFLAGS, IFF_UP = 0x8914, 1

NOBODY = 65534
NEW_ROOT = "/proc"  # a folder that every Linux has; the mount is visible in the sandbox only
PLACES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo")
DEVICES = ("null", "zero", "full", "random", "urandom")
# Threads of OpenBLAS, and malloc's arenas a thread, would take the address space that a process may have.
ENVIRONMENT = {
    "HOME": "/tmp",
    "MALLOC_ARENA_MAX": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
    "USER": "nobody",
}
NAMES = {"hosts": "127.0.0.1 localhost\n", "nsswitch.conf": "hosts: files\n"}
_ENDING = 1.0  # seconds that the code may take to end after it has closed the verdict's pipe
_PERIOD = 0.02  # seconds between two checks whether it has ended
_REASON_BYTES = 8000


class Missing(Exception):
    """A feature that this machine lacks."""


def main(order: dict[str, Any], outlet: int) -> None:
    """Run an order, and report to a file descriptor."""
    os.set_inheritable(outlet, False)

    def report(**facts: Any) -> None:
        os.write(outlet, ascii(facts).encode() + b"\n")

    try:
        (launch if order["isolated"] else supervise)(order, report)
    except Missing as error:
        report(missing=str(error))


def launch(order: dict[str, Any], report: Any) -> None:
    """Enter the namespaces and wait until their first process has ended."""
    _call("prctl", PR_SET_PDEATHSIG, _signal.SIGKILL)
    os.umask(0o022)
    try:
        _write("/proc/self/oom_score_adj", "1000")  # the first to end where memory is short
    except OSError:
        pass
    enter_namespaces()
    watch, alive = os.pipe()
    first = os.fork()
    if first:
        os.waitpid(first, 0)
        return
    os.close(alive)
    try:
        _call("prctl", PR_SET_PDEATHSIG, _signal.SIGKILL)
        _signal.signal(_signal.SIGINT, _signal.SIG_IGN)  # the kernel blocks the others for a namespace's first process
        if not select.select([watch], [], [], 0)[0]:  # otherwise the launcher died before the prctl
            # The only address of the network namespace: 127.0.0.1.
            loop_back = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM)
            fcntl.ioctl(loop_back.fileno(), SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))
            loop_back.close()
            build_root(order["prefix"], order["packages"], order["disk_bytes"])
            _call("prctl", PR_SET_DUMPABLE, 0)  # the code cannot read its memory
            supervise(order, report)
    except Missing as error:
        report(missing=str(error))
    except OSError as error:
        report(missing=f"its file system cannot be built ({error})")
    finally:
        os._exit(0)


def enter_namespaces() -> None:
    """Enter new namespaces, with the same user ids inside.

    As root, the ids of nobody are mapped too, and the code runs as nobody: the kernel limits the number of processes of
    every user but root. Only a process outside of the new user namespace may map ids other than its own, so a second
    process writes the maps.
    """
    uid, gid, launcher = os.geteuid(), os.getegid(), os.getpid()
    more = f"{NOBODY} {NOBODY} 1\n" if uid == 0 else ""
    entered, notify = os.pipe()
    mapper = os.fork()
    if not mapper:
        os.close(notify)
        try:
            if os.read(entered, 1):
                if uid:
                    _write(f"/proc/{launcher}/setgroups", "deny")
                _write(f"/proc/{launcher}/uid_map", f"{uid} {uid} 1\n{more}")
                _write(f"/proc/{launcher}/gid_map", f"{gid} {gid} 1\n{more}")
        finally:
            os._exit(0)
    os.close(entered)
    try:
        _call("unshare", NAMESPACES, what=_why_no_namespaces())
        os.write(notify, b"!")
    finally:
        os.close(notify)
        os.waitpid(mapper, 0)
    try:
        if not _read("/proc/self/uid_map"):
            raise Missing("user ids cannot be mapped into a user namespace")
        # No nested namespaces: they would restore capabilities.
        _write("/proc/sys/user/max_user_namespaces", "0")
    except OSError as error:
        raise Missing(f"user namespaces cannot be set up ({error})") from error
    try:
        _write("/proc/sys/kernel/shmmni", "0")  # no System V shared memory: it outlives its processes and their limits
    except OSError:
        pass  # an older kernel


def build_root(prefix: str, packages: dict[str, str], disk_bytes: int) -> None:
    """Replace the file system by Python and the system's libraries, read-only, and an empty /tmp."""
    if prefix.startswith("/tmp/"):
        raise Missing(f"Python is installed in {prefix}, and /tmp is an empty folder in the sandbox")
    _mount("none", "/", "", MS_REC | MS_PRIVATE)
    _mount("tmpfs", NEW_ROOT, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    bound: list[str] = []
    for place in (prefix, *PLACES):
        if not os.path.exists(place) or any(f"{place}/".startswith(f"{other}/") for other in bound):
            continue  # absent, or in a folder that is there already
        bound.append(place)
        if os.path.islink(place):  # /lib is usr/lib on most systems
            os.makedirs(os.path.dirname(f"{NEW_ROOT}{place}"), exist_ok=True)
            os.symlink(os.readlink(place), f"{NEW_ROOT}{place}")
        else:
            _bind(place, place)
    for package, target in packages.items():
        _bind(package, target)
    os.mkdir(f"{NEW_ROOT}/tmp")
    os.mkdir(f"{NEW_ROOT}/dev")
    os.symlink("/tmp", f"{NEW_ROOT}/dev/shm")
    os.makedirs(f"{NEW_ROOT}/etc", exist_ok=True)
    for name, text in NAMES.items():
        _write(f"{NEW_ROOT}/etc/{name}", text)
    devices = [f"/dev/{name}" for name in DEVICES if os.path.exists(f"/dev/{name}")]
    for device in devices:
        _write(f"{NEW_ROOT}{device}", "")
    os.chmod(f"{NEW_ROOT}/dev", 0o111)  # used by name, never listed
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY | MS_NOSUID | MS_NODEV, 0, 0, 0)
    size = ctypes.sizeof(attributes)
    _call("syscall", MOUNT_SETATTR, AT_FDCWD, NEW_ROOT.encode(), AT_RECURSIVE, ctypes.byref(attributes), size)
    for device in devices:
        _mount(device, f"{NEW_ROOT}{device}", "", MS_BIND)
    _mount("tmpfs", f"{NEW_ROOT}/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"size={disk_bytes},nr_inodes=4096,mode=777")
    os.chdir(NEW_ROOT)
    # Both arguments are ".": the old root is then mounted over the new one, and is unmounted (see pivot_root(2)).
    _call("syscall", PIVOT_ROOT, b".", b".")
    _call("umount2", b".", MNT_DETACH)
    os.chdir("/tmp")


def supervise(order: dict[str, Any], report: Any) -> None:
    """Start the code, send it the tests, wait for the verdict, and report it."""
    (inlet, to_code), (verdict, outlet) = os.pipe(), os.pipe()
    process = os.fork()
    if not process:
        try:
            _be_code(order, inlet, outlet)
        except (OSError, ValueError, Missing) as error:
            print(error, flush=True)
        finally:
            os._exit(0)
    code = Code(process, to_code, verdict)
    os.close(inlet)
    os.close(outlet)
    key, nonce = os.urandom(KEY_BYTES), os.urandom(KEY_BYTES)
    tests = order["tests"].encode("utf-8", "surrogatepass")
    tested = bool(tests.strip())
    program = {"program": order["program"], "code": order["code"], "tested": tested, "key": key, "path": order["path"]}
    if code.receive(len(READY)) != READY:
        return
    report(ready=True)
    code.send(marshal.dumps(program), b"" if tested else nonce)
    said = code.receive(KEY_BYTES) if tested else b""
    if said == key:
        code.send(tests, nonce)
        said = b""
    if not (tested and said):
        said = code.receive(2 * KEY_BYTES)
    if said == key + nonce:
        facts: dict[str, Any] = {"exit_code": 0, "finished": True}
    else:
        reason = (said + code.receive(_REASON_BYTES)).decode(errors="backslashreplace")
        facts = {"exit_code": code.ended(), "finished": False, "reason": reason}
    if code.status is None:
        os.kill(code.process, _signal.SIGKILL)
    if order["isolated"]:
        try:
            os.kill(-1, _signal.SIGKILL)  # processes that could still write
        except ProcessLookupError:
            pass  # there is no other process
    report(**facts)


class Code:
    """The process of the code, and the pipes to and from it."""

    def __init__(self, process: int, to_code: int, verdict: int) -> None:
        self.process, self.to_code, self.verdict = process, to_code, verdict
        self.status: int | None = None

    def send(self, text: bytes, more: bytes = b"") -> None:
        """Write the length of a text, the text, and more bytes."""
        data = len(text).to_bytes(4, "little") + text + more
        try:
            while data:
                data = data[os.write(self.to_code, data) :]
        except BrokenPipeError:
            pass  # the process has ended

    def receive(self, count: int) -> bytes:
        """Read so many bytes, or fewer if the process ends before."""
        received = b""
        while len(received) < count:
            ended = self._has_ended()
            if select.select([self.verdict], [], [], 0 if ended else _PERIOD)[0]:
                piece = os.read(self.verdict, count - len(received))
                if not piece:
                    break
                received += piece
            elif ended:
                break
        return received

    def ended(self) -> int | None:
        """The exit code, as in `subprocess`; None for a process that has closed its pipe and still runs."""
        for _ in range(int(_ENDING / _PERIOD)):
            if self._has_ended():
                break
            select.select([], [], [], _PERIOD)
        return None if self.status is None else os.waitstatus_to_exitcode(self.status)

    def _has_ended(self) -> bool:
        while self.status is None:
            try:
                process, status = os.waitpid(-1, os.WNOHANG)  # orphans come here too
            except ChildProcessError:
                break
            if not process:
                break
            if process == self.process:
                self.status = status
        return self.status is not None


def _be_code(order: dict[str, Any], inlet: int, outlet: int) -> None:
    """Replace this process by a fresh interpreter, which receives its program through a pipe."""
    os.set_inheritable(inlet, True)
    os.set_inheritable(outlet, True)
    limit(order)
    if order["isolated"]:
        _drop_capabilities()
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
    python = order["python"]
    # Without `-I`, which would make the hash seed random; the environment is ENVIRONMENT alone.
    os.execve(python, [python, "-P", "-s", "-S", "-u", "-c", STUB, str(inlet), str(outlet)], ENVIRONMENT)


def _drop_capabilities() -> None:
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    # A user other than root keeps capabilities in the namespace until execve.
    _call("capset", (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)())


def limit(order: dict[str, Any]) -> None:
    """Set the resource limits of this process and its children."""
    limits = {
        resource.RLIMIT_AS: order["memory_bytes"],
        resource.RLIMIT_CPU: int(order["seconds"]) + 2,
        resource.RLIMIT_FSIZE: order["disk_bytes"],
        resource.RLIMIT_NOFILE: 256,
        resource.RLIMIT_CORE: 0,
    }
    if order["isolated"]:
        # The two processes above it count as well where they have the same user.
        limits[resource.RLIMIT_NPROC] = order["processes"] + (2 if os.geteuid() else 0)
        limits[resource.RLIMIT_MSGQUEUE] = 0
    for which, wanted in limits.items():
        _, hard = resource.getrlimit(which)
        value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(which, (value, value))


def _why_no_namespaces() -> str:
    settings = {"kernel.unprivileged_userns_clone": "0", "user.max_user_namespaces": "0"}
    for setting, forbids in {**settings, "kernel.apparmor_restrict_unprivileged_userns": "1"}.items():
        place = f"/proc/sys/{setting.replace('.', '/')}"
        if os.path.exists(place) and _read(place) == forbids:
            return f"namespaces are not allowed (sysctl {setting} is {forbids})"
    return "namespaces are not allowed (a container's seccomp profile may forbid them)"


def _read(path: str) -> str:
    with open(path) as file:
        return file.read().strip()


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _bind(place: str, target: str) -> None:
    """Bind-mount a file or a folder in the new root."""
    target = f"{NEW_ROOT}{target}"
    folder = os.path.isdir(place)
    os.makedirs(target if folder else os.path.dirname(target), exist_ok=True)
    if not folder:
        _write(target, "")
    _mount(place, target, "", MS_BIND | MS_REC)


def _mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    texts = [text.encode() for text in (source, target, kind, options)]
    _call("mount", *texts[:3], ctypes.c_ulong(flags), texts[3], what=target)


def _call(name: str, *arguments: Any, what: str = "") -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments):
        error = ctypes.get_errno()
        raise Missing(f"{what or name}: {os.strerror(error)}")
