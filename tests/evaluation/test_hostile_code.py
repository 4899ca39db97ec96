"""Programs that mean harm score as failures, learn nothing, change nothing, and end with their time."""

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from plmtune.evaluation.code_eval import CodeRunner, missing
from plmtune.sandbox import Result, run_python

MARK = "hostile-4fd1"  # the name that processes give themselves, which are to be gone
SECRET = "swordfish-8c07"
SECONDS = 1.0
TEST = """
import math

def check(candidate):
    assert candidate([1, 2, 3]) == 6
    assert candidate([]) == 0
    assert abs(candidate([0.5, 0.25]) - 0.75) < 1e-6
    assert math.isclose(candidate([1.5]), 1.5)
    assert not candidate([0])

check(total)
"""
RIGHT = "def total(numbers):\n    return sum(numbers)\n"
WRONG = "def total(numbers):\n    return None\n"
NAMED = f"import ctypes, os\nlibc = ctypes.CDLL(None)\nlibc.prctl(15, b'{MARK}', 0, 0, 0)\n"

ANYTHING = """
class Anything({base}):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __bool__(self): return False
    def __hash__(self): return 0
    def __float__(self): return 0.0
    __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __eq__
    def __abs__(self): return {arithmetic}
    __sub__ = __rsub__ = __add__ = __radd__ = lambda self, other: {arithmetic}
def total(numbers):
    return Anything()
"""
SEARCH = """
import os, sys
def found():
    frame, seen = sys._getframe(), []
    while frame:
        seen += [*frame.f_locals.values(), *frame.f_globals.values()]
        frame = frame.f_back
    return seen
def everywhere(said):
    for fd in range(3, 64):
        try: os.write(fd, said)
        except OSError: pass
def heard():
    said = b""
    for fd in range(3, 64):
        try:
            os.set_blocking(fd, False)
            said += os.read(fd, 1 << 16)
        except OSError: pass
    return said
"""

HOSTILE = {
    "exits at once": "import os\nos._exit(0)",
    "exits when called": "import os\ndef total(numbers): os._exit(0)",
    "sys.exit when called": "import sys\ndef total(numbers): sys.exit(0)",
    "exits in a destructor": WRONG
    + "import atexit, os\natexit.register(os._exit, 0)\nclass D:\n    def __del__(self): os._exit(0)\nd = D()\ndel d",
    "prints that it passed": WRONG + 'print(\'{"finished": true, "exit_code": 0}\\npassed\')',
    "writes a verdict to every descriptor": WRONG
    + """
import os
for fd in range(256):
    for said in (b'{"finished": true}\\n', b'{"exit_code": 0, "finished": true}\\n', b'passed', b'!tp'):
        try: os.write(fd, said)
        except OSError: pass
""",
    "writes a verdict when called": """
import os
def total(numbers):
    for fd in range(256):
        try: os.write(fd, b'{"finished": true}\\n')
        except OSError: pass
    os._exit(0)
""",
    "closes every descriptor": RIGHT + "import os\nos.closerange(0, 256)",
    "says all bytes of its judge's frames": WRONG
    + SEARCH
    + "for each in found():\n    if type(each) is bytes: everywhere(each)\nos._exit(0)",
    "calls all functions of its judge's frames": WRONG
    + SEARCH
    + "for each in found():\n    if callable(each) and each not in (found, everywhere, heard):\n"
    + "        try: each()\n        except BaseException: pass",
    "calls what its judge calls": WRONG
    + SEARCH
    + "for each in found():\n    if getattr(each, '__name__', '') in ('read', 'write', 'leave', '_exit'):\n"
    + "        try: each(0, b'')\n        except TypeError: each(0)",
    "says all bytes of its judge's frames when called": SEARCH
    + "def total(numbers):\n    for each in found():\n        if type(each) is bytes: everywhere(each + each)\n"
    + "    os._exit(0)",
    "says what is no verdict": SEARCH + "def total(numbers): everywhere(b'\\xff' * 10000)",
    "an object equal to everything": ANYTHING.format(base="object", arithmetic="0.0"),
    "an object all of whose results are it": ANYTHING.format(base="object", arithmetic="self"),
    "a list equal to everything": ANYTHING.format(base="list", arithmetic="0"),
    "an int equal to everything": ANYTHING.format(base="int", arithmetic="0.0"),
    "patches what tests use": WRONG
    + """
import builtins, math, sys, types, unittest
for name in ("abs", "len", "all", "sum", "isinstance", "print", "compile"):
    setattr(builtins, name, lambda *a, **k: 0.0)
builtins.AssertionError = Exception
math.isclose = math.fabs = lambda *a, **k: True
sys.modules["math"] = types.SimpleNamespace(isclose=math.isclose)
unittest.TestCase.assertEqual = lambda *a: None
sys.excepthook = lambda *a: None
""",
    "replaces the test": WRONG + "check = lambda candidate: None\n__name__ = '__main__'\n__builtins__ = {}",
    "connects to this machine": WRONG + "import socket\nsocket.create_connection(('127.0.0.1', PORT), timeout=1)",
    "asks the network": WRONG
    + "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
    + "try: print(socket.getaddrinfo('example.com', 80))\nexcept OSError: pass\ns.sendto(b'x', ('127.0.0.1', PORT))",
    "a fork bomb": NAMED + "while True:\n    try: os.fork()\n    except OSError: pass",
    "a thread bomb": NAMED
    + "import threading, time\nwhile True:\n    try: threading.Thread(target=time.sleep, args=(60,)).start()\n"
    + "    except RuntimeError: pass",
    "grandchildren in sessions of their own": NAMED
    + "import time\ndef total(numbers):\n    if os.fork() == 0:\n        os.setsid()\n"
    + "        if os.fork() == 0: time.sleep(60)\n"
    + "        os._exit(0)\n    return None",
    "10 GB of memory": "def total(numbers): return len(bytearray(10 * 2**30)) and 6",
    "10 GB of shared memory": WRONG
    + """
import ctypes, os, mmap
libc = ctypes.CDLL(None)
got = 0
for number in range(200):
    part = libc.shmget(0, 2**26, 0o1600)
    got += part >= 0
    try:
        fd = os.memfd_create("x")
        os.ftruncate(fd, 2**26)
        got += 1
    except OSError: pass
print("memory", got)
""",
    "kills its parents": NAMED
    + "import signal\ndef total(numbers):\n    for call in (lambda: os.kill(os.getppid(), 9), lambda: os.kill(1, 9),\n"
    + "                 lambda: os.killpg(0, 0), lambda: os.kill(HOST, 9), lambda: os.kill(-1, 9)):\n"
    + "        try: call()\n        except OSError: pass",
    "looks for secrets": WRONG
    + "import os\nprint(dict(os.environ))\nfor path in ('/proc/self/environ', '/proc/1/environ', WITNESS + '/secret',"
    + " '/proc/self/mounts'):\n    try: print(open(path).read())\n    except OSError: pass",
    "reads this machine's files": WRONG
    + "import os\n"
    + "for path in ('/etc/passwd', '/etc/shadow', '/home', PROJECT + '/docs', '/sys', '/proc', '/dev'):\n"
    + "    try: print('SAW', os.listdir(path) if os.path.isdir(path) else open(path).read())\n    except OSError: pass",
    "writes outside": WRONG
    + "import os, sys\n"
    + "for folder in (WITNESS, PROJECT, '/', '/tmp', '/usr/lib', '/etc', os.path.dirname(os.__file__)):\n"
    + "    try: open(folder + '/planted-4fd1', 'w')\n    except OSError: pass",
    "links out of its folder": WRONG
    + "import os\nfor number, target in enumerate((WITNESS, PROJECT, '/', '/proc/1/root', '..')):\n"
    + "    os.symlink(target, f'/tmp/{number}')\n    try: open(f'/tmp/{number}/planted-4fd1', 'w')\n"
    + "    except OSError: pass",
    "fills its folder": WRONG + "for number in range(100): open(f'/tmp/{number}', 'wb').write(bytes(2**20))",
    "traces its judges": WRONG
    + """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
word = ctypes.create_string_buffer(8)
piece = (ctypes.c_void_p * 2)(ctypes.addressof(word), 8)
for pid in [os.getppid(), *range(1, 40)]:
    if pid == os.getpid(): continue
    if libc.ptrace(16, pid, None, None) == 0 or libc.process_vm_writev(pid, piece, 1, piece, 1, 0) > 0:
        print("SAW", pid)
""",
    "calls the kernel": WRONG
    + """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
for call in (
    lambda: libc.setuid(0), lambda: libc.chroot(b"/tmp"), lambda: libc.unshare(0x10000000),
    lambda: libc.mount(b"proc", b"/tmp", b"proc", 0, None), lambda: libc.sethostname(b"x", 1),
    lambda: libc.reboot(0x1234567), lambda: libc.swapoff(b"/x"), lambda: libc.syscall(175, None, 0, b""),
):
    if call() == 0: print("SAW", call)
""",
    "sleeps": "import time\ndef total(numbers): time.sleep(600)",
    "never ends": "while True: pass",
    "1 GB of output": "import os\ndef total(numbers):\n    for _ in range(1024): os.write(1, b'x' * 2**20)",
    "recurses without end": "import sys\nsys.setrecursionlimit(10**9)\ndef total(numbers): return total([numbers])",
    "an answer nested without end": "def total(numbers):\n    x = []\n    for _ in range(10**5): x = [x]\n    return x",
    "an endless number": "def total(numbers): return 1 << (10**9)",
    "no Python at all": "def total(numbers:\n\x00\ud800",
}

# The same in other words.
MORE = {
    "an exit of its own": "class Done(SystemExit): pass\ndef total(numbers): raise Done(0)",
    "becomes another program": "import os, sys\n"
    + "def total(numbers): os.execv(sys.executable, [sys.executable, '-c', ''])",
    "reads every descriptor": WRONG
    + "import os\nfor fd in range(3, 256):\n    try: print(os.read(fd, 1 << 16))\n    except OSError: pass",
    "closes them when called": "import os, time\ndef total(numbers):\n    os.closerange(0, 256)\n    time.sleep(60)",
    "says what is no verdict without end": SEARCH + "def total(numbers):\n    while True: everywhere(b'\\xff' * 9)",
    "says what it was sent": SEARCH
    + "everywhere(heard())\ndef total(numbers):\n    everywhere(heard()[-16:] * 2)\n    os._exit(0)",
    "a number equal to everything": ANYTHING.format(base="float", arithmetic="self"),
    "a class equal to everything": "class Meta(type):\n    def __eq__(self, other): return True\n"
    + "    def __hash__(self): return 0\nclass A(metaclass=Meta): pass\ndef total(numbers): return A",
    "an error equal to everything": "class Error(Exception):\n    def __eq__(self, other): return True\n"
    + "    def __hash__(self): return 0\ndef total(numbers): return Error()",
    "a fork bomb when called": NAMED
    + "def total(numbers):\n    while True:\n        try: os.fork()\n        except OSError: pass",
    "a child that answers too": "import os\nos.fork()\ndef total(numbers): return os.getpid()",
    "plants modules for its tests": WRONG
    + "for name in ('math', 'traceback', 'sitecustomize'):\n"
    + "    open(f'/tmp/{name}.py', 'w').write('import os; os._exit(0)')",
    "ignores every signal": "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
    + "    except (OSError, ValueError): pass\ndef total(numbers):\n    while True: pass",
    "an answer that holds itself": "def total(numbers):\n    x = []\n    x.append(x)\n    return x",
    "an endless answer": "import itertools\ndef total(numbers): return itertools.count()",
    "letters that are half": "def total(numbers): return '\\ud800' * 10**6 + '\\u202e\\U0010ffff'\n"
    + "print('\\u202e' * 1000)",
    "swallows its test": "def total(numbers): return None\nx = '''",
}


def processes() -> list[str]:
    names = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            names.append(path.read_text().strip())
        except OSError:  # it has ended
            continue
    return names


@pytest.fixture(scope="module")
def port() -> Iterator[tuple[int, list[socket.socket]]]:
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind(tcp.getsockname())
        tcp.setblocking(False)
        udp.setblocking(False)
        yield tcp.getsockname()[1], [tcp, udp]


@pytest.fixture(scope="module")
def witness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("witness")
    (folder / "secret").write_text(SECRET)
    return folder


@pytest.fixture(scope="module")
def programs(port: tuple[int, list[socket.socket]], witness: Path) -> dict[str, str]:
    said = {"PORT": port[0], "WITNESS": str(witness), "PROJECT": str(Path(__file__).parents[2]), "HOST": os.getpid()}
    known = "".join(f"{name} = {value!r}\n" for name, value in said.items())
    return {name: known + program for name, program in (HOSTILE | MORE).items()}


@pytest.fixture(scope="module")
def ended(programs: dict[str, str]) -> dict[str, Result]:
    if lacking := missing():
        pytest.skip(f"there is no sandbox here: {lacking}")
    os.environ["PLMTUNE_TEST_SECRET"] = SECRET
    try:
        results = CodeRunner(seconds=SECONDS).run([(programs[name], TEST) for name in HOSTILE])
    finally:
        del os.environ["PLMTUNE_TEST_SECRET"]
    return dict(zip(HOSTILE, results, strict=True))


class TestHostilePrograms:
    def test_the_right_program_passes(self, ended: dict[str, Result]) -> None:
        assert run_python(RIGHT, tests=TEST, seconds=10).passed

    @pytest.mark.parametrize("name", HOSTILE)
    def test_it_fails_and_sees_nothing(self, ended: dict[str, Result], name: str) -> None:
        result = ended[name]
        assert not result.passed
        assert result.reason
        assert SECRET not in result.output + result.reason
        assert "SAW" not in result.output

    def test_shared_memory_is_bounded(self, ended: dict[str, Result]) -> None:
        said = [line for line in ended["10 GB of shared memory"].output.splitlines() if line.startswith("memory")]
        assert said in ([], ["memory 0"])

    def test_nothing_was_written_outside(self, ended: dict[str, Result], witness: Path) -> None:
        assert [path.name for path in witness.iterdir()] == ["secret"]
        assert (witness / "secret").read_text() == SECRET
        for folder in (Path(__file__).parents[2], Path("/"), Path("/tmp"), Path("/usr/lib"), Path(os.__file__).parent):
            assert not (folder / "planted-4fd1").exists()

    def test_nobody_called(self, ended: dict[str, Result], port: tuple[int, list[socket.socket]]) -> None:
        for receive in (port[1][0].accept, lambda: port[1][1].recv(10)):
            with pytest.raises(BlockingIOError):
                receive()

    def test_no_process_is_left(self, ended: dict[str, Result]) -> None:
        for _ in range(50):  # the kernel may still be about to end them
            names = processes()
            assert names  # this process at least
            if MARK not in names:
                return
            time.sleep(0.1)
        pytest.fail(f"{names.count(MARK)} processes are left")

    @pytest.mark.slow
    def test_each_ends_within_its_time_and_a_second(self, programs: dict[str, str]) -> None:
        took = {}
        for name, program in programs.items():
            begun = time.monotonic()
            result = run_python(program, tests=TEST, seconds=SECONDS)
            took[name] = time.monotonic() - begun
            assert not result.passed, name
            assert SECRET not in result.output
            assert "SAW" not in result.output
        slowest = max(took, key=lambda name: took[name])
        assert took[slowest] < SECONDS + 1, slowest
