"""A compressed model as a folder of its own: what `bench compress` does.

The model is compressed by the job that `bench run` starts for the same settings, in the same
environment and cache, and its artefact is copied. The tokenizer and lineage.json are put beside it.
"""

import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from bench import model_folder, models, run
from bench.chosen import GROUPS
from bench.errors import UsageError
from bench.launch import Report, launch
from compress import registry


def compress_folder(request: run.Request, folder: Path, report: Report) -> int:
    """Compress `request.model` by its one method into `folder`; the bytes written.

    Only settings that can change the artefact count. Raises UsageError if `folder` is there
    already or the request names several methods, ValueError if the method fails or is skipped.
    """
    if folder.exists():
        raise UsageError(f"{folder} is there already; choose a new folder")
    named = [name for name, _ in registry.parse_list(request.methods)]
    if len(named) != 1 or named[0] in GROUPS:
        raise UsageError(f"one folder holds what one method makes, not {request.methods!r}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    task = run.plan(replace(request, metrics="size"))[-1]  # the first is the parent
    record = launch(task, report, measure=False)
    if record["status"] != "ok":
        log = record.get("log_tail")
        raise ValueError(record["error"] + (f"\n\nthe end of its log:\n{log}" if log else ""))
    model = models.Model(task.job.model, task.folder, task.job.revision)
    lineage = {
        "source": f"{registry.describe(task.job.method, task.job.settings)} of {model.alias}",
        "origin": {"base": {"alias": model.alias, "revision": model.revision}},
        "method": task.job.method,
        "settings": task.job.settings,
        "calibration": task.job.calibration,
        "commit": record["commit"],
        "dirty": record["dirty"],
        "packages": record["packages"],
        "of_base": models.lineage(model),
    }
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        made = Path(temporary) / "made"
        shutil.copytree(task.artefact / "model", made)
        # The config of what another library wrote is its own affair.
        foreign = registry.get(task.job.method).foreign
        finish = model_folder.add_tokenizer if foreign else model_folder.complete
        finish(made, models.tokenizer(model), lineage)
        os.rename(made, folder)  # whole or not at all
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
