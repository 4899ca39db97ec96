"""Tests that nobody calls are called, or told to be never run; those that call themselves stay as they are."""

import gc
import threading
import time

import pytest

from plmtune.sandbox import NoSandbox, execute, run_python, with_calls

CHECK = "def check(candidate):\n    assert candidate(2) == 4\n"
CASE = "import unittest\nclass Case(unittest.TestCase):\n    def test_f(self): self.assertEqual(f(2), 4)\n"
FUNCTION = "def test_f():\n    assert f(2) == 4\n"

ADDED = {
    FUNCTION: "test_f()",
    "async def test_f():\n    assert await f(2) == 4": "__import__('asyncio').run(test_f())",
    "import mock\n@mock.patch('a.b')\ndef test_f(b): assert f(2) == 4": "test_f()",
    "class TestF:\n    def test_a(self): assert f(2) == 4\n    def helper(self, x): pass": "TestF().test_a()",
    CASE: "__import__('unittest').main(argv=['tests'], defaultTest=['Case'])",
    CASE.replace("unittest.TestCase", "TestCase"): "__import__('unittest').main(argv=['tests'], defaultTest=['Case'])",
    CASE + "class More(Case):\n    pass\n": "__import__('unittest').main(argv=['tests'], defaultTest=['Case', 'More'])",
    FUNCTION + "assert f(1) == 2": "test_f()",
}
KEPT = [
    "assert f(2) == 4",
    "import math",
    "",
    CHECK + "check(f)",
    FUNCTION + "test_f()",
    FUNCTION + "for test in [test_f]: test()",
    FUNCTION + "for name in list(globals()):\n    if name.startswith('test'): globals()[name]()",
    FUNCTION + "run('test_f')",
    CASE + "unittest.main()",
    CASE + "if __name__ == '__main__':\n    unittest.main()",
    CASE + "unittest.TextTestRunner().run(unittest.defaultTestLoader.loadTestsFromTestCase(Case))",
    CASE + "Case('test_f').debug()",
    "from unittest import TestCase, main\n" + CASE + "main()",
    "class Item:\n    def __init__(self): self.x = 1\nassert total([Item()]) == 1",
    "def f(:",
    "def unfinished():\n    x = '''",
]
NEVER = {
    CHECK: "they define check and call nothing",
    CHECK + "METADATA = {'author': 'x'}\nf = lambda: check(1)": "they define check and call nothing",
    FUNCTION + "def run(): test_f()": "they define test_f and call nothing",
    "class Checks:\n    def all(self): assert f(2) == 4": "they define Checks and call nothing",
    "def test_f(tmp_path): assert f(2) == 4\nassert f(1) == 2": "test_f needs arguments",
    "class TestF:\n    def setup_method(self): self.x = 2\n    def test_a(self): assert f(self.x)": "TestF needs arg",
}


@pytest.mark.parametrize("tests", ADDED)
def test_what_nobody_calls_is_called(tests: str) -> None:
    assert with_calls(tests) == (f"{tests}\n{ADDED[tests]}\n", None)


@pytest.mark.parametrize("tests", KEPT)
def test_what_runs_stays_as_it_is(tests: str) -> None:
    assert with_calls(tests) == (tests, None)


@pytest.mark.parametrize("tests", NEVER)
def test_what_cannot_be_called_is_named(tests: str) -> None:
    assert (with_calls(tests).never or "").startswith(NEVER[tests])
    result = run_python("def f(x): return 2 * x", tests=tests)
    assert not result.passed and str(result.reason).startswith(f"its tests are never run: {NEVER[tests]}")


@pytest.mark.parametrize("tests", [FUNCTION, CASE, "class TestF:\n    def test_a(self): assert f(2) == 4\n"])
def test_called_tests_give_the_verdict(tests: str) -> None:
    try:
        assert run_python("def f(x): return 2 * x", tests=tests).passed
    except NoSandbox as error:
        pytest.skip(str(error))
    assert not run_python("def f(x): return x", tests=tests).passed


def test_threads_that_read_tests_and_reports_do_not_disturb_each_other() -> None:
    """CPython's constructor of syntax trees fails where a collection of garbage lets another thread make one."""

    def let_others_run(phase: str, info: dict[str, int]) -> None:
        if threading.current_thread() is threading.main_thread():
            time.sleep(0.001)

    started, done = threading.Event(), threading.Event()

    def read_reports() -> None:
        while not done.is_set():
            execute._facts([b"{'exit_code': 0}\n"])
            started.set()
            time.sleep(0.0001)  # a lock is not fair

    reader, thresholds = threading.Thread(target=read_reports), gc.get_threshold()
    gc.callbacks.append(let_others_run)
    gc.set_threshold(200)
    reader.start()
    started.wait()
    try:
        for number in range(20):
            tests = f"def test_{number}():\n    assert " + " + ".join(["1"] * 400)
            assert with_calls(tests).text.startswith(tests)
    finally:
        done.set()
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(let_others_run)
        reader.join()
