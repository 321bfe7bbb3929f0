"""Many checkpoints of many shards are read within the system's limit of open files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

PROGRAM = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
from pathlib import Path
from eutectic.checkpoint.opening import open_reader
folder = Path(sys.argv[1])
readers = [open_reader(folder) for _ in range(40)]
for reader in readers:
    for name in reader.entries:
        assert reader.read(name).numel() == 4
print("read")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no such limit there")
def test_forty_checkpoints_of_twenty_shards_in_128_files(tmp_path: Path) -> None:
    names = {f"w{i}": f"model-{i:05}-of-00020.safetensors" for i in range(20)}
    for name, file in names.items():
        (tmp_path / file).write_bytes(save({name: torch.ones(2, 2)}))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.stdout == "read\n", done.stderr
