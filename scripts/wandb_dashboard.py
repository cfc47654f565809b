"""Build a W&B workspace and report of the cells that ``tracker=wandb`` logged, through W&B's own API.

    python scripts/wandb_dashboard.py ENTITY/PROJECT              # saves both in the project and prints where they are
    python scripts/wandb_dashboard.py ENTITY/PROJECT --dry-run    # prints them as JSON: no account, no network

Both hold the same panels: time to target by variant, anytime curves by variant, OHGW's settings against the score as
parallel coordinates, rungs, overhead. The workspace groups the runs by scheduler/task and variant; the report has a
part for each scheduler/task, because scores and times of different tasks cannot be averaged. Every call makes a new
workspace view and a new report. For paired statistics use ``python -m harness.report wandb:ENTITY/PROJECT``.
Needs ``pip install 'ohgw-harness[dashboard]'``.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

TITLE = "OHGW: warm starts in multi-fidelity HPO"
OHGW_SETTINGS = ("estimator", "step", "eta", "n_steps", "probe", "momentum", "momentum_space", "batch_size")
BUSY = ("startup", "warm_start", "train", "validate", "test", "checkpoint")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 done, 2 not possible (one sentence on stderr)."""
    options = _parser().parse_args(arguments)
    from harness.report.load import ResultsError

    try:
        _main(options)
    except ResultsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project", metavar="ENTITY/PROJECT", help="where the cells were logged")
    parser.add_argument("--group", action="append", metavar="SCHEDULER/TASK",
                        help="a part of the report; repeatable (default: all that the project has)")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print the specification as JSON and save nothing")
    return parser


def _main(options: argparse.Namespace) -> None:
    from harness.report.fetch import clear_errors, open_api, split_project
    from harness.report.load import ResultsError

    entity, project = split_project(options.project, f"{options.project!r} is no project: expected ENTITY/PROJECT")
    _reports()
    if options.dry_run:
        print(json.dumps(specification(entity, project, options.group or []), indent=1))
        return
    api = open_api()
    with clear_errors(options.project):
        groups = options.group or sorted({run.group for run in api.runs(options.project, per_page=200) if run.group})
        if not groups:
            raise ResultsError(f"{options.project} has no runs of tracker=wandb yet")
        view, page = workspace(entity, project), report(entity, project, groups)
        view.save()
        page.save()
    print(f"workspace: {view.url}\nreport: {page.url}")


def _reports() -> Any:
    """The package, imported only once something is to be built."""
    try:
        import wandb_workspaces.reports.v2 as wr
    except ImportError:
        from harness.report.load import ResultsError

        raise ResultsError("wandb-workspaces is not installed: `pip install 'ohgw-harness[dashboard]'`") from None
    return wr


def specification(entity: str, project: str, groups: Sequence[str]) -> dict[str, Any]:
    """What would be saved, in W&B's own form: {"workspace": ..., "report": ...}; JSON-able, made without network."""
    models = {"workspace": workspace(entity, project), "report": report(entity, project, groups, online=False)}
    return {
        name: model._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)
        for name, model in models.items()
    }


def workspace(entity: str, project: str) -> Any:
    """A ``wandb_workspaces.workspaces.Workspace`` that is not saved yet."""
    import wandb_workspaces.workspaces as ws

    return ws.Workspace(
        entity=entity,
        project=project,
        name=TITLE,
        sections=[ws.Section(name=name, panels=panels, is_open=True) for name, _, panels in parts()],
        settings=ws.WorkspaceSettings(x_axis="wallclock", max_runs=100),
        runset_settings=ws.RunsetSettings(groupby=[ws.Metric("Group"), ws.Metric("JobType")]),
    )


def report(entity: str, project: str, groups: Sequence[str], *, online: bool = True) -> Any:
    """A ``wandb_workspaces.reports.v2.Report`` with a part for each of ``groups``, or one for all runs without any.

    :param online: name the project in every run set, for which W&B's package asks the server; without, W&B takes the
        report's own project
    """
    wr = _reports()
    blocks: list[Any] = [wr.TableOfContents()]
    place = {"entity": entity, "project": project} if online else {}
    for group in groups or [""]:
        blocks.append(wr.H1(group or "All runs"))
        runs = {"filters": _only(group) if group else "", "groupby": ["JobType"]}
        for name, text, panels in parts("JobType"):
            blocks += [wr.H2(name), wr.P(text)]
            blocks.append(wr.PanelGrid(runsets=[wr.Runset(**place, name="cells", **runs)], panels=panels))
    return wr.Report(
        entity=entity,
        project=project,
        title=TITLE,
        description="Cells by OHGW variant; off is without warm starts.",
        blocks=blocks,
        width="fluid",
    )


def _only(group: str) -> str:
    """W&B's filter for one group. Its name is spelled in escapes, because the package that reads the filter changes
    operators inside names as well: it makes ``asha(eta=4)`` ``asha(eta==4)``.
    """
    spelled = "".join(f"\\U{ord(letter):08x}" for letter in group)
    return f'Metric("Group") == "{spelled}"'


def parts(groupby: str | None = None) -> list[tuple[str, str, list[Any]]]:
    """(heading, explanation, panels) of each part; ``groupby`` groups the runs in each panel, not only in the run set.

    The names are those that ``harness.tracking.WandbTracker`` logs.
    """
    return [
        ("Time to target", "Only cells that reached the target have a time: read the medians together with the share "
         "that reached it. The paired, censored comparison is in python -m harness.report.",
         time_panels(groupby)),
        ("Anytime", "Median over the cells of a variant, with their whole range.", anytime_panels(groupby)),
        ("Hyperparameters", "One line a cell: OHGW's settings against what the cell found. The table has every trial "
         "with its hyperparameters before (x) and after (x_prime) the warm start.", hyperparameter_panels()),
        ("Rungs", "Trials that reached each rung (in epochs).", rung_panels(groupby)),
        ("Overhead", "Means over the cells of a variant.", overhead_panels(groupby)),
    ]  # fmt: skip


def time_panels(groupby: str | None) -> list[Any]:
    return [
        _bars("Cells that reached the target (share)", ["t_tau/reached"], groupby, "mean", "stderr"),
        _bars("Seconds to the target (median of those that reached it)", ["t_tau/wallclock"], groupby),
        _bars("GPU-hours to the target (median of those that reached it)", ["t_tau/gpu_hours"], groupby),
    ]


def anytime_panels(groupby: str | None) -> list[Any]:
    score, test = "incumbent/validation_score", "incumbent/test_score"
    axes = {"wallclock": "seconds", "gpu_hours": "GPU-hours", "epochs": "epochs of all trials"}
    lines = [_lines(f"Best validation score against {label}", x, [score], label, groupby) for x, label in axes.items()]
    return [*lines, _lines("Test score of the best against seconds", "wallclock", [test], "seconds", groupby)]


def hyperparameter_panels() -> list[Any]:
    wr = _reports()
    columns = [wr.ParallelCoordinatesPlotColumn(wr.Config(f"ohgw.{name}"), name) for name in OHGW_SETTINGS]
    columns += [
        wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric(metric), label)
        for metric, label in {
            "warm_start_share/busy": "warm-start share of busy time",
            "best_validation_score": "best validation score",
            "incumbent_test_score": "its test score",
        }.items()
    ]
    wide = {"w": 24, "h": 12}
    return [
        wr.ParallelCoordinatesPlot(title="OHGW's settings and the score", columns=columns, layout=wr.Layout(**wide)),
        wr.WeavePanelSummaryTable(table_name="trial_table", layout=wr.Layout(y=12, **wide)),
    ]


def rung_panels(groupby: str | None) -> list[Any]:
    return [_lines("Trials that reached a rung", "wallclock", [], "seconds", groupby, metric_regex=r"^rung/[0-9]+$"),
            _lines("Trials started", "wallclock", ["trials"], "seconds", groupby)]  # fmt: skip


def overhead_panels(groupby: str | None) -> list[Any]:
    return [
        _bars("Warm starts: share of busy time and of FLOPs",
              ["warm_start_share/busy", "warm_start_share/flops"], groupby, "mean", "stderr"),
        _bars("Busy seconds by kind of work", [f"busy/{kind}" for kind in BUSY], groupby, "mean", "none"),
        _bars("Peak memory in bytes", ["peak_memory/train", "peak_memory/warm_start"], groupby, "max", "none"),
        _bars("Failed trials", ["failures"], groupby, "mean", "minmax"),
    ]  # fmt: skip


def _bars(title: str, metrics: list[str], groupby: str | None, agg: str = "median", band: str = "minmax") -> Any:
    wr = _reports()
    return wr.BarPlot(
        title=title,
        metrics=metrics,
        groupby=groupby,
        groupby_aggfunc=agg,
        groupby_rangefunc=band,
        layout=wr.Layout(w=12, h=8),
    )


def _lines(title: str, x: str, y: list[str], label: str, groupby: str | None, **more: Any) -> Any:
    wr = _reports()
    return wr.LinePlot(
        title=title,
        x=x,
        y=y,
        title_x=label,
        groupby=groupby,
        groupby_aggfunc="median",
        groupby_rangefunc="minmax",
        smoothing_type="none",
        max_runs_to_show=1000,
        layout=wr.Layout(w=12, h=8),
        **more,
    )


if __name__ == "__main__":
    sys.exit(main())
