"""The inside of `plmtune.sandbox`, a program of its own that knows the standard library alone.

Five processes. The launcher enters new namespaces and waits. Its child is the first process of the new process
namespace: it builds the file system, starts the others, reports how they ended, and with its end the kernel ends all
that is left. The judge (`plmtune.sandbox_judge`) is forked from it and runs the tests. The code runs in a fresh
interpreter (`plmtune.sandbox_candidate`), in a process namespace within, whose first process waits for it: there the
judge has no number by which it could be signalled, traced or read, whether this was started by root or not; and what
the code leaves behind ends with that namespace. Judge and code have no rights.

`pathlib`, `contextlib`, `typing`, `json` and `signal` take longer to import than most code takes to run.
"""

# ruff: noqa: PTH102, PTH103, PTH110, PTH112, PTH114, PTH115, PTH120, PTH123, PTH211, SIM105
from __future__ import annotations

import ctypes
import os
import resource
import select
import sys

from plmtune.sandbox_judge import STUB
from plmtune.sandbox_judge import main as judge

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
CLONE_NEWPID = 0x20000000
CAPABILITY_VERSION = 0x20080522
MOUNT_SETATTR = 442  # the same on every machine, unlike:
PIVOT_ROOT = 155 if os.uname().machine == "x86_64" else 41

SIGKILL = 9
NOBODY = 65534
NEW_ROOT = "/dev"  # a folder that every Linux has; hidden from the sandbox alone
_ENDING = 1.0  # seconds that the code may take to end once it has closed the pipe to its tests
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")


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
    _call("prctl", PR_SET_PDEATHSIG, SIGKILL)
    os.umask(0o022)
    enter_namespaces()
    watch, alive = os.pipe()
    first = os.fork()
    if first:
        os.waitpid(first, 0)
        return
    os.close(alive)
    try:
        _call("prctl", PR_SET_PDEATHSIG, SIGKILL)
        if not select.select([watch], [], [], 0)[0]:  # else the launcher died before it could be noticed
            build_root(order["prefix"], order["disk_bytes"])
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


def build_root(prefix: str, disk_bytes: int) -> None:
    """Make a file system of Python and the system's libraries, read-only, and an empty /tmp the only one there is."""
    _mount("none", "/", "", MS_REC | MS_PRIVATE)
    _mount("tmpfs", NEW_ROOT, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for place in _needed(prefix):
        target = f"{NEW_ROOT}{place}"
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(place):  # /lib is usr/lib, mostly
            os.symlink(os.readlink(place), target)
            continue
        if os.path.isdir(place):
            os.makedirs(target, exist_ok=True)
        else:
            _write(target, "")
        _mount(place, target, "", MS_BIND | MS_REC)
    os.mkdir(f"{NEW_ROOT}/tmp")
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY | MS_NOSUID | MS_NODEV, 0, 0, 0)
    size = ctypes.sizeof(attributes)
    _call("syscall", MOUNT_SETATTR, AT_FDCWD, NEW_ROOT.encode(), AT_RECURSIVE, ctypes.byref(attributes), size)
    _mount("tmpfs", f"{NEW_ROOT}/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"size={disk_bytes},nr_inodes=4096,mode=777")
    os.chdir(NEW_ROOT)
    # Onto itself: the old root then lies above the new one, and is taken away (pivot_root(2)).
    _call("syscall", PIVOT_ROOT, b".", b".")
    _call("umount2", b".", MNT_DETACH)
    os.chdir("/tmp")


def supervise(order: dict[str, Any], report: Any) -> None:
    """Start the tests and the code, wait for the verdict, and report it."""
    to_code, to_judge, verdict, ended = os.pipe(), os.pipe(), os.pipe(), os.pipe()
    tester = _fork(lambda: _be_judge(order, to_judge[0], to_code[1], verdict[1]))
    for fd in (to_code[1], to_judge[0], verdict[1]):  # nobody else has them
        os.close(fd)
    if order["isolated"]:
        _call("unshare", CLONE_NEWPID, what="a process namespace within")
    first = _fork(lambda: _be_first(order, to_code[0], to_judge[1], ended[1]))
    for fd in (to_code[0], to_judge[1], ended[1]):
        os.close(fd)
    said = b""
    facts: dict[bytes, bytes] = {}
    while not facts.keys() & {b"finished", b"reason", b"gone"}:
        if verdict[0] not in select.select([verdict[0], ended[0]], [], [])[0]:
            facts[b"gone"] = b""  # the code has ended: no verdict that is still to come could be a good one
            break
        piece = os.read(verdict[0], 4096)
        if not piece:
            break  # the tests have ended without one
        *lines, said = (said + piece).split(b"\n")
        for fact, _, what in (line.partition(b" ") for line in lines):
            facts[fact] = what
            if fact == b"ready":
                report(ready=True)
    os.kill(tester, SIGKILL)
    _, how = os.waitpid(tester, 0)
    if b"ready" not in facts:
        return
    status = None
    # The pipe to the judge may have been closed by code that goes on.
    if b"gone" in facts and select.select([ended[0]], [], [], _ENDING)[0]:
        status = int(os.read(ended[0], 16) or str(SIGKILL))
    os.kill(first, SIGKILL)
    os.waitpid(first, 0)
    if order["isolated"]:
        try:
            os.kill(-1, SIGKILL)  # whoever could still write
        except ProcessLookupError:
            pass  # it is alone
    if b"finished" in facts:
        report(exit_code=0, finished=True)
    elif b"reason" in facts:
        report(exit_code=1, finished=False, reason=facts[b"reason"].decode("unicode_escape"))
    elif status is not None:
        report(exit_code=os.waitstatus_to_exitcode(status), finished=False)
    elif b"gone" not in facts:
        code = os.waitstatus_to_exitcode(how)
        report(exit_code=code, finished=False, reason=f"its tests ended before their end, with exit status {code}")
    else:
        report(exit_code=1, finished=False, reason="broke off from its tests")


def _be_judge(order: dict[str, Any], inlet: int, outlet: int, verdict: int) -> None:
    """Run the tests."""
    os.dup2(os.pipe()[0], 0)  # stdin is the code's
    for fd in range(3, 64):
        if fd not in (inlet, outlet, verdict):
            try:
                os.close(fd)
            except OSError:
                continue
    limit(order)
    if order["isolated"]:
        _give_up_rights()
    if sys.platform == "linux":
        _call("prctl", PR_SET_DUMPABLE, 0)  # not to be looked into, even where there is no namespace
    judge(inlet, outlet, verdict, order["candidate"], order["code"], order["tests"])


def _be_first(order: dict[str, Any], inlet: int, outlet: int, ended: int) -> None:
    """Start the code and say how it ended. In a namespace of its own, all that is left ends with this process."""
    code = _fork(lambda: _be_code(order, inlet, outlet))
    os.close(inlet)
    os.close(outlet)
    while True:
        process, status = os.wait()  # orphans come here too
        if process == code:
            os.write(ended, str(status).encode())
            return


def _be_code(order: dict[str, Any], inlet: int, outlet: int) -> None:
    """Become an interpreter that knows nothing but the code."""
    os.set_inheritable(inlet, True)
    os.set_inheritable(outlet, True)
    limit(order)
    if order["isolated"]:
        _give_up_rights()
    python = order["python"]
    os.execve(python, [python, "-I", "-S", "-u", "-c", STUB, str(inlet), str(outlet)], {})


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
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    if order["isolated"]:
        # The tests' process counts too and, where they are of the same user, the three that started it and the code.
        limits[resource.RLIMIT_NPROC] = order["processes"] + (4 if os.geteuid() else 1)
        limits[resource.RLIMIT_MSGQUEUE] = 0
    for which, wanted in limits.items():
        _, hard = resource.getrlimit(which)
        value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(which, (value, value))


def _needed(prefix: str) -> list[str]:
    """The interpreter's installation and the libraries it may load, none of them inside of another."""
    found: list[str] = []
    for place in (prefix, *LIBRARIES):
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


def _mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    texts = [text.encode() for text in (source, target, kind, options)]
    _call("mount", *texts[:3], ctypes.c_ulong(flags), texts[3], what=target)


def _call(name: str, *arguments: Any, what: str = "") -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments):
        error = ctypes.get_errno()
        raise Missing(f"{what or name}: {os.strerror(error)}")
