"""Time the methods' steps against hand-written bounds and other libraries, and measure their memory.

Every contestant takes one step (or one cycle of refresh_every steps) per round, in random order; ratios are medians over
rounds. Names with a star are hand-written in plain PyTorch: gd*, the plain sum; lb*, the bound for K task gradients (one
forward, K backwards whose gradients nobody adds up, one optimizer step); lbm*, with the rows copied, their Gramian and one
combination. Peak memory is that of three steps in a process of its own, above model and batch.

Set OMP_NUM_THREADS to the number of threads to use. Other libraries: `pip install torchmto[bench]`.
"""

import re
import time
from pathlib import Path
from typing import Literal

from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt

from torchmto.cli._settings import Parser, reported


def make_parser(prog: str) -> Parser:
    """The options of `torchmto bench`."""
    parser = Parser(prog=prog, description=__doc__)
    models = "mlp,mlp512,pinn,conv,transformer,segnet"
    parser.add_argument("--models", type=str, default=models, metavar="A,B", help="Of these, and segnet_third.")
    parser.add_argument("--tasks", type=str, default="2,4,8,20,40", metavar="K,K", help="Numbers of tasks.")
    parser.add_argument(
        "--methods",
        type=str | None,
        metavar="A,B",
        help="Methods, with options if wanted, of which gradients=parameters|layerwise|representation forces an engine; "
        "torchjd/METHOD, torchjd-gramian/METHOD. All by default.",
    )
    parser.add_argument("--repeats", type=PositiveInt, default=20, metavar="N", help="Rounds.")
    parser.add_argument("--no-peers", action="store_true", help="Leave other libraries out.")
    parser.add_argument("--no-memory", action="store_true", help="Don't measure memory.")
    parser.add_argument("--device", type=str, default="cpu", help="Where: cpu, cuda, ...")
    parser.add_argument(
        "--clock", type=Literal["wall", "cpu"], default="wall", help="cpu: own processor time, on a busy machine."
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), metavar="DIR", help="The folder.")
    return parser


def run(args: Namespace) -> int:
    """Measure, print the table, write bench.json and bench.png."""
    with reported():
        _bench(args)
    return 0


def _bench(args: Namespace) -> None:
    from torchmto.checks import check_choice, check_integer, found, needed  # noqa: PLC0415  the lab takes seconds to import
    from torchmto.lab.bench.cases import CASES  # noqa: PLC0415
    from torchmto.lab.bench.contestants import bound_of, contestant_names, split_names  # noqa: PLC0415
    from torchmto.lab.bench.outputs import table, write_json, write_plot  # noqa: PLC0415
    from torchmto.lab.bench.peers import missing_peers  # noqa: PLC0415
    from torchmto.lab.bench.timing import Measurement, measure_memory, measure_times  # noqa: PLC0415
    from torchmto.lab.run.build import device_of  # noqa: PLC0415
    from torchmto.lab.terminal import make_console  # noqa: PLC0415

    needed("A benchmark", "matplotlib")  # its plot comes last
    console = make_console(140)
    models = [check_choice("models", name, tuple(CASES)) for name in args.models.split(",")]
    if not re.fullmatch(r"\d{1,4}(,\d{1,4})*", args.tasks):
        raise ValueError(found("tasks", "numbers of tasks, such as 2,4", args.tasks))
    tasks = [check_integer("tasks", int(count), minimum=2) for count in args.tasks.split(",")]
    names = split_names(args.methods) if args.methods else contestant_names(peers=not args.no_peers)
    for name in names:
        bound_of(name, 2)
    device_of(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.no_peers:
        for peer, reason in missing_peers().items():
            console.print(f"{peer} isn't timed: {reason}", style="dim")
    measuring = {name: args[name] for name in ("repeats", "device", "clock")}
    settings = {"models": models, "tasks": tasks, "methods": names, **measuring}
    results: list[Measurement] = []
    began = time.monotonic()
    with console.status("") as status:
        for model in models:
            for num_tasks in tasks:
                fresh = measure_times(model, num_tasks, names, **measuring, tick=status.update)
                for entry in fresh:
                    if not args.no_memory and not entry.failed:
                        status.update(f"{model} K={num_tasks} {entry.name}: memory")
                        memory = measure_memory(model, num_tasks, entry.name, device=args.device)
                        entry.peak_bytes, entry.tensor_bytes = memory
                results += fresh
                # Written after every case, so that an interrupted run leaves what it has measured.
                write_json(args.out / "bench.json", results, settings)
    console.print(table(results))
    write_plot(args.out / "bench.png", results)
    print(f"{args.out}/bench.json, bench.png written; {time.monotonic() - began:.0f} s.")
