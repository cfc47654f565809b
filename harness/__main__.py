"""The command line: ``python -m harness [options] [key=value ...]``.

Exit codes: 0 every cell is finished, 1 a cell failed, 2 the command line is wrong (nothing was run), 3 another command
is still running some of the cells, 130 interrupted (with launch=slurm: the jobs go on).
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: the end, without a traceback

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from backends.context import UserError
from harness import sweep
from harness.compose import CONF, Conf
from harness.schema import GROUPS, Key, known_keys, near
from harness.sweep import Plan

EXIT_WRONG, EXIT_INTERRUPTED = 2, 130

USAGE = """\
usage: python -m harness [options] [key=value ...]

Runs every cell (task, scheduler, OHGW variant, seed) that the lists ask for, and prints the paired summary. Lists and
inclusive ranges work for every group and key, and a sweep is their product: scheduler=asha,pasha seed=0..49
(also 0..48..2 and 0..4,9). A list in brackets is one value. The same command again goes on where it stopped.

options:
  --dry-run   print the plan and its state, run nothing       --json       machine-readable output
  --cfg job   print the composed config of the first cell     --version    print the version
  -v          show what trials printed when a cell ends       -h, --help   this page
  -m          accepted, not needed: every list is a sweep
with launch=slurm, and the same arguments as when the cells were submitted:
  --status    how each cell stands (also --json)              --cancel     end the jobs of these cells
"""

EXAMPLES = """\
examples:
  python -m harness scheduler=pasha ohgw=off,on seed=0..49
  python -m harness ohgw=off,normalized ohgw.eta=0.05,0.1 ohgw.mask=[lr] task.model=mlp seed=0..9 --dry-run
  python -m harness experiment=smoke
  python -m harness scheduler=pasha ohgw=off,on seed=0..49 launch=slurm launch.partition=gpu launch.time=2:00:00
exit codes: 0 all cells finished, 1 a cell failed, 2 wrong command line (nothing was run), 3 another command is still
running some of the cells, 130 interrupted
"""

OPTIONS = (
    "--help", "--cfg", "--dry-run", "--json", "--multirun", "--verbose", "--version", "--status", "--cancel",
    "-h", "-m", "-v",
)  # fmt: skip


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def main(argv: Sequence[str] | None = None, conf: Path = CONF) -> int:
    """Run the command line ``argv`` (default: this process's arguments) and return the exit code."""
    try:
        return _main(list(sys.argv[1:] if argv is None else argv), conf)
    except UserError as error:
        print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
        return EXIT_WRONG
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `... --dry-run | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _main(argv: list[str], conf: Path) -> int:
    options, overrides = _arguments(argv)
    if options.help:
        print(help_page(Conf(conf), sweep.group_choices(overrides, Conf(conf))), end="")
        return 0
    if options.version:
        print(f"ohgw-harness {_version()}")
        return 0
    plan = sweep.make_plan(overrides, conf)
    if options.cfg:
        return _print_config(plan, options.json)
    if options.dry_run:
        return _print_plan(plan, options.json)
    if options.status or options.cancel:
        from harness.slurm import status

        status.print_cancel(plan) if options.cancel else status.print_status(plan, options.json)
        return 0
    sweep.check_data(plan)
    if plan.cells[0].config["launch"]["name"] == "slurm":
        from harness.slurm import submit

        return submit.run(plan, json_output=options.json)
    from harness.runner import run_sweep

    return run_sweep(plan, json_output=options.json, verbose=options.verbose)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("ohgw-harness")
    except PackageNotFoundError:
        return f"(not installed, run from {CONF.parent})"


def _arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split options, which start with ``-``, from overrides."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--cfg", choices=["job"], help="job")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("-v", "--verbose", action="store_true")
    parser.add_argument("--status", action="store_true")
    parser.add_argument("--cancel", action="store_true")
    parser.add_argument("--version", action="store_true")
    options, overrides = parser.parse_known_args(argv)
    for word in overrides:
        if word.startswith("-"):
            raise UserError(f"unknown option {word}{near(word, OPTIONS)}")
    return options, overrides


def help_page(source: Conf, chosen: Mapping[str, str] | None = None) -> str:
    """Groups with their choices and default, then every key with default, type, range and meaning; of a group in
    ``chosen``, the keys that its choice has."""
    chosen = chosen or {}
    default, composed = source.compose({}), source.compose(chosen)
    groups = [f"  {group:<11}{_choices(source, group, default.choices[group])}" for group in GROUPS]
    words = " ".join(f"{group}={choice}" for group, choice in chosen.items())
    title = (
        f"keys of {words}"
        if words
        else "keys (with the defaults of these groups; --help task=NAME shows those of a task)"
    )
    keys = [f"{title}:", *_key_lines(composed.get, chosen)]
    return "\n".join([USAGE, "groups (* the default):", *groups, "", *keys, "", EXAMPLES])


def _choices(source: Conf, group: str, default: str | None) -> str:
    return ", ".join(choice + "*" * (choice == default) for choice in source.choices(group))


def _key_lines(get: Any, chosen: Mapping[str, str]) -> Iterator[str]:
    for name, key in known_keys().items():
        exists, value = get(name)
        if not exists and name.split(".")[0] in chosen:
            continue
        default = f"={_default(value)}" if exists else ""
        possible = get(f"{name}s")[1] if name in ("task.model", "task.space") else None  # listed by the task's YAML
        yield f"  {name + default:<32}{key.help}{_range(key, possible)}"


def _range(key: Key, possible: Any) -> str:
    if possible:
        return f": {', '.join(possible)}"
    return f": {', '.join(key.choices) or key.allowed}" if key.choices or key.kind in (int, float) else ""


def _default(value: Any) -> str:
    return "null" if value is None else f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)


def _print_config(plan: Plan, as_json: bool) -> int:
    config = plan.cells[0].config
    if as_json:
        print(json.dumps(config, indent=1))
        return 0
    import yaml

    if len(plan.cells) > 1:
        print(f"# the first of {len(plan.cells)} cells")
    print(yaml.safe_dump(config, sort_keys=False, default_flow_style=None), end="")
    return 0


def _states(plan: Plan) -> list[str]:
    from harness.record import CellPaths

    states = []
    for cell in plan.cells:
        paths = CellPaths.of_cell(cell)
        states.append("finished" if paths.summary.exists() else "interrupted" if paths.events.exists() else "new")
    return states


def _print_plan(plan: Plan, as_json: bool) -> int:
    states = _states(plan)
    if as_json:
        print(json.dumps(sweep.as_json(plan, states), indent=1))
        return 0
    rows = [("task", "scheduler", "variant", "seed", "state", "folder")]
    rows += [
        (cell.task, cell.scheduler, cell.variant, str(cell.seed), state, cell.folder)
        for cell, state in zip(plan.cells, states, strict=True)
    ]
    for line in sweep.aligned(rows):
        print(line)
    counts = ", ".join(f"{count} {state}" for state, count in Counter(states).items())
    print(f"\n{len(plan.cells)} cells ({counts}) in {plan.folder}")
    for note in plan.notes:
        print(note)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
