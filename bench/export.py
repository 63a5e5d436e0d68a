"""A compressed model as a folder of its own: what `bench compress` does.

The model is compressed by the very job that `bench run` would start, in the same environment and
cache, so the folder holds the artefact that a leaderboard's row was measured on. The tokenizer and
lineage.json are put beside it.
"""

import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from bench import model_folder, models, run
from bench.errors import UsageError
from bench.job import PARENT
from bench.launch import Report, launch
from compress import registry


def export(request: run.Request, folder: Path, report: Report) -> int:
    """Compress `request.model` by its one method into `folder`; the bytes written.

    Only settings that can change the artefact count. Raises UsageError if `folder` is there
    already or the request names several methods, ValueError if the method fails or is skipped.
    """
    if folder.exists():
        raise UsageError(f"{folder} is there already; choose a new folder")
    tasks = run.plan(replace(request, limit=1, metrics="size"))
    parent_wanted = registry.parse_list(request.methods)[0][0] == PARENT
    wanted = tasks[:1] if parent_wanted else tasks[1:]
    if len(wanted) != 1 or (parent_wanted and len(tasks) > 1):
        raise UsageError(f"one folder holds what one method makes; {request.methods!r} names more")
    [task] = wanted
    run.check_blocks([task])
    record = launch(task, report)
    if record["status"] != "ok":
        raise ValueError(record["error"])
    model = models.Model(task.job.model, task.folder, task.job.revision)
    lineage = {
        "source": f"{registry.describe(task.job.method, task.job.settings)} of {model.alias}",
        "origin": {"base": {"alias": model.alias, "revision": model.revision}},
        "method": task.job.method,
        "settings": task.job.settings,
        "calibration": task.job.calibration,
        "commit": record["commit"],
        "packages": record["packages"],
        "of_base": models.lineage(model),
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        made = Path(temporary) / "made"
        shutil.copytree(task.artefact / "model", made)
        if task.env is None:  # what another library wrote is its own affair
            model_folder.complete(made, models.tokenizer(model), lineage)
        os.rename(made, folder)  # whole or not at all
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
