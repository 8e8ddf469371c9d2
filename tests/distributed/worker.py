"""One rank of a distributed test: joins the world, calls the function, writes what it returns."""

import importlib
import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    name, folder, arguments = sys.argv[1:]
    from bigtrain.world import World

    world = World.join("cpu", 120)
    module, function = name.split(":")
    result = getattr(importlib.import_module(module), function)(world, Path(folder), **json.loads(arguments))
    Path(folder, f"rank-{os.environ['RANK']}.json").write_text(json.dumps(result))
    world.leave()
