"""Namespaces, limits and verdict: a program of its own that knows the standard library alone.

Three processes. The launcher enters new namespaces and waits. Its child is the first process of the new process
namespace: it builds the file system, starts a fresh interpreter for code and tests (`plmtune.sandbox.program`), waits
for the verdict and reports it; with its end the kernel ends all that is left. The interpreter has no rights: it cannot
trace, read or signal the process that waits for it.

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
    from collections.abc import Callable
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
NEW_ROOT = "/proc"  # a folder that every Linux has; hidden from the sandbox alone
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
_ENDING = 1.0  # seconds that the code may take to end once it has closed the pipe of its verdict
_PERIOD = 0.02  # seconds between two looks whether it has ended
_REASON_BYTES = 8000


class Missing(Exception):
    """What this machine does not give."""


def main(order: dict[str, Any], outlet: int) -> None:
    """Do what is ordered, report to a file descriptor."""
    os.set_inheritable(outlet, False)

    def report(**facts: Any) -> None:
        os.write(outlet, ascii(facts).encode() + b"\n")

    try:
        if order["isolated"]:
            launch(order, report)
        else:
            supervise(order, report)
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
        _signal.signal(_signal.SIGINT, _signal.SIG_IGN)  # others do not reach the first process of a namespace
        if not select.select([watch], [], [], 0)[0]:  # else the launcher died before it could be noticed
            _loop_back()
            build_root(order["prefix"], order["packages"], order["disk_bytes"])
            _call("prctl", PR_SET_DUMPABLE, 0)  # not to be looked into by the code
            supervise(order, report)
    except Missing as error:
        report(missing=str(error))
    except OSError as error:
        report(missing=f"its file system cannot be built ({error})")
    finally:
        os._exit(0)


def enter_namespaces() -> None:
    """Leave this machine's namespaces; ids mean the same inside.

    Root takes nobody along, who is to run the code: the kernel limits the number of processes of all users but root.
    Only who stays outside may map an id that is not one's own.
    """
    uid, gid, launcher = os.geteuid(), os.getegid(), os.getpid()
    users = f"{uid} {uid} 1\n" + (f"{NOBODY} {NOBODY} 1\n" if uid == 0 else "")
    groups = f"{gid} {gid} 1\n" + (f"{NOBODY} {NOBODY} 1\n" if uid == 0 else "")
    entered, tell = os.pipe()
    mapper = os.fork()
    if not mapper:
        os.close(tell)
        try:
            if os.read(entered, 1):
                if uid:
                    _write(f"/proc/{launcher}/setgroups", "deny")
                _write(f"/proc/{launcher}/uid_map", users)
                _write(f"/proc/{launcher}/gid_map", groups)
        finally:
            os._exit(0)
    os.close(entered)
    try:
        _call("unshare", NAMESPACES, what=_why_no_namespaces())
        os.write(tell, b"!")
    finally:
        os.close(tell)
        os.waitpid(mapper, 0)
    try:
        if not _read("/proc/self/uid_map"):
            raise Missing("user ids cannot be mapped into a user namespace")
        # No namespaces within namespaces: they would give rights back.
        _write("/proc/sys/user/max_user_namespaces", "0")
    except OSError as error:
        raise Missing(f"user namespaces cannot be set up ({error})") from error
    try:
        _write("/proc/sys/kernel/shmmni", "0")  # no shared memory: it outlives whom it is counted against
    except OSError:
        pass  # an older kernel


def build_root(prefix: str, packages: dict[str, str], disk_bytes: int) -> None:
    """Make a file system of Python and the system's libraries, read-only, and an empty /tmp the only one there is."""
    if prefix.startswith("/tmp/"):
        raise Missing(f"Python is installed in {prefix}, and /tmp is an empty folder in the sandbox")
    _mount("none", "/", "", MS_REC | MS_PRIVATE)
    _mount("tmpfs", NEW_ROOT, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for place in _needed(prefix):
        if os.path.islink(place):  # /lib is usr/lib, mostly
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
    # Onto itself: the old root then lies above the new one, and is taken away (pivot_root(2)).
    _call("syscall", PIVOT_ROOT, b".", b".")
    _call("umount2", b".", MNT_DETACH)
    os.chdir("/tmp")


def _loop_back() -> None:
    """Let the network namespace, which has nothing else, have an address of its own: 127.0.0.1."""
    any_socket = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM)
    fcntl.ioctl(any_socket.fileno(), SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))
    any_socket.close()


def supervise(order: dict[str, Any], report: Any) -> None:
    """Start the code, send it its tests, wait for the verdict, and report it."""
    (inlet, to_code), (verdict, outlet) = os.pipe(), os.pipe()
    code = Code(_fork(lambda: _be_code(order, inlet, outlet)), to_code, verdict)
    os.close(inlet)
    os.close(outlet)
    key, nonce = os.urandom(KEY_BYTES), os.urandom(KEY_BYTES)
    tests = order["tests"].encode("utf-8", "surrogatepass")
    tested = bool(tests.strip())
    program = {"program": order["program"], "code": order["code"], "tested": tested, "key": key, "path": order["path"]}
    if code.hear(len(READY)) != READY:
        return
    report(ready=True)
    code.send(marshal.dumps(program), b"" if tested else nonce)
    said = b""
    if tested:
        said = code.hear(KEY_BYTES)
    if said == key:
        code.send(tests, nonce)
        said = b""
    if not (tested and said):
        said = code.hear(2 * KEY_BYTES)
    if said == key + nonce:
        facts: dict[str, Any] = {"exit_code": 0, "finished": True}
    else:
        reason = (said + code.hear(_REASON_BYTES)).decode(errors="backslashreplace")
        facts = {"exit_code": code.ended(), "finished": False, "reason": reason}
    code.kill()
    if order["isolated"]:
        try:
            os.kill(-1, _signal.SIGKILL)  # whoever could still write
        except ProcessLookupError:
            pass  # it is alone
    report(**facts)


class Code:
    """The process of the code, and the pipes to and from it."""

    def __init__(self, process: int, to_code: int, verdict: int) -> None:
        self.process = process
        self.to_code = to_code
        self.verdict = verdict
        self.status: int | None = None

    def send(self, text: bytes, more: bytes = b"") -> None:
        """Write a text with its length before it, and more behind it."""
        data = len(text).to_bytes(4, "little") + text + more
        try:
            while data:
                data = data[os.write(self.to_code, data) :]
        except BrokenPipeError:
            pass  # it has ended

    def hear(self, count: int) -> bytes:
        """Read so many bytes, or fewer if it ends before."""
        said = b""
        while len(said) < count:
            ended = self._has_ended()
            if select.select([self.verdict], [], [], 0 if ended else _PERIOD)[0]:
                piece = os.read(self.verdict, count - len(said))
                if not piece:
                    break
                said += piece
            elif ended:
                break
        return said

    def ended(self) -> int | None:
        """Its exit code as `subprocess` gives it; None for one that goes on though it has closed its pipe."""
        for _ in range(int(_ENDING / _PERIOD)):
            if self._has_ended():
                break
            select.select([], [], [], _PERIOD)
        return None if self.status is None else os.waitstatus_to_exitcode(self.status)

    def kill(self) -> None:
        """End it."""
        if self.status is None:
            os.kill(self.process, _signal.SIGKILL)

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
    """Become an interpreter that knows nothing but what it is sent."""
    os.set_inheritable(inlet, True)
    os.set_inheritable(outlet, True)
    limit(order)
    if order["isolated"]:
        _give_up_rights()
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
    python = order["python"]
    # Without `-I`, which would leave the seed of hashes to chance; all of the environment is ours.
    os.execve(python, [python, "-P", "-s", "-S", "-u", "-c", STUB, str(inlet), str(outlet)], ENVIRONMENT)


def _fork(then: Callable[[], None]) -> int:
    """Start a process that does one thing."""
    process = os.fork()
    if not process:
        try:
            then()
        except (OSError, ValueError, Missing) as error:
            print(error, flush=True)
        finally:
            os._exit(0)
    return process


def _give_up_rights() -> None:
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    # Who is not root keeps rights over the namespace until another program is started.
    _call("capset", (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)())


def limit(order: dict[str, Any]) -> None:
    """Bound what this process and its children may take."""
    limits = {
        resource.RLIMIT_AS: order["memory_bytes"],
        resource.RLIMIT_CPU: int(order["seconds"]) + 2,
        resource.RLIMIT_FSIZE: order["disk_bytes"],
        resource.RLIMIT_NOFILE: 256,
        resource.RLIMIT_CORE: 0,
    }
    if order["isolated"]:
        # Where they are of the same user, the two that started it count too.
        limits[resource.RLIMIT_NPROC] = order["processes"] + (2 if os.geteuid() else 0)
        limits[resource.RLIMIT_MSGQUEUE] = 0
    for which, wanted in limits.items():
        _, hard = resource.getrlimit(which)
        value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(which, (value, value))


def _needed(prefix: str) -> list[str]:
    """The interpreter's installation and the libraries it may load, none of them inside of another."""
    found: list[str] = []
    for place in (prefix, *PLACES):
        if os.path.exists(place) and not any(f"{place}/".startswith(f"{other}/") for other in found):
            found.append(place)
    return found


def _why_no_namespaces() -> str:
    for setting, forbids in (
        ("kernel/unprivileged_userns_clone", "0"),
        ("user/max_user_namespaces", "0"),
        ("kernel/apparmor_restrict_unprivileged_userns", "1"),
    ):
        try:
            if _read(f"/proc/sys/{setting}") == forbids:
                return f"namespaces are not allowed (sysctl {setting.replace('/', '.')} is {forbids})"
        except OSError:
            continue
    return "namespaces are not allowed (a container's seccomp profile may forbid them)"


def _read(path: str) -> str:
    with open(path) as file:
        return file.read().strip()


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _bind(place: str, target: str) -> None:
    """Show a file or a folder in the new root."""
    target = f"{NEW_ROOT}{target}"
    if os.path.isdir(place):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
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
