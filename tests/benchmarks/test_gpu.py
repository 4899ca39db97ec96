from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.mark.slow
class TestGpuBenchmark:
    def test_every_part_runs_at_toy_size(self, tmp_path: Path) -> None:
        out = tmp_path / "gpu.json"
        # Compiling needs a C++ compiler and half a minute; the eager backend runs the same code path.
        environment = {**os.environ, "TORCH_COMPILE_DISABLE": "1"}
        command = [sys.executable, str(SCRIPT), "--toy", "--out", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr
        results = json.loads(out.read_text())
        assert not [name for name in results if name.endswith("_error")], done.stderr
        for part in ("eager", "compiled"):
            assert len(results[part]) == 2
            for row in results[part]:
                assert 0 < row["mfu"]["6N"] < row["mfu"]["causal"] < row["mfu"]["PaLM"]
        assert {row["loss"].split(",")[0] for row in results["loss"]} == {"ours", "native", "all logits"}
        assert "tflops" in next(row for row in results["attention"] if row["kernel"] == "math")
        assert "| train step, compiled" in done.stdout
