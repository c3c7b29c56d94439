"""Runs files of mergekit with mergekit: python mergekit_run.py FOLDER. Needs its environment.

Each NUMBER.yaml of FOLDER is merged into theirsNUMBER. Prints one line of JSON: by number what mergekit refused, if so.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge

folder = Path(sys.argv[1])
os.chdir(folder)
refused = {}
for file in sorted(folder.glob("*.yaml")):
    try:
        config = MergeConfiguration.model_validate(yaml.safe_load(file.read_text()))
        options = MergeOptions(write_model_card=False, random_seed=0, quiet=True)
        run_merge(config, str(folder / f"theirs{file.stem}"), options=options)
    except (ValueError, RuntimeError, KeyError) as error:
        refused[file.stem] = f"{type(error).__name__}: {error}"
print(json.dumps(refused))
