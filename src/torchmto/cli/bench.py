"""Time the methods' steps against hand-written bounds and other libraries, and measure their memory.

Every contestant takes one step (or one cycle of refresh_every steps) per round, in random order; ratios are medians over
rounds. Names with a star are hand-written in plain PyTorch: gd*, the plain sum; lb*, the bound for K task gradients (one
forward, K backwards whose gradients nobody adds up, one optimizer step); lbm*, with the rows copied, their Gramian and one
combination. Peak memory is that of three steps in a process of its own, above model and batch.

Set OMP_NUM_THREADS to the number of threads to use. Other libraries: `pip install torchmto[bench]`.
"""

import argparse
import time
from pathlib import Path

from torchmto.cli._errors import wrong_usage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `torchmto bench`."""
    parser.add_argument(
        "--models",
        default="mlp,mlp512,pinn,conv,transformer,segnet",
        metavar="A,B",
        help="of these, and segnet_third (mlp,mlp512,pinn,conv,transformer,segnet)",
    )
    parser.add_argument("--tasks", default="2,4,8,20,40", metavar="K,K", help="numbers of tasks (2,4,8,20,40)")
    parser.add_argument(
        "--methods",
        metavar="A,B",
        help="methods, METHOD@parameters|layerwise|representation, METHOD@NAME=VALUE (refresh_every=10), torchjd/METHOD, "
        "torchjd-gramian/METHOD, LibMTL/METHOD (all methods)",
    )
    parser.add_argument("--repeats", type=int, default=20, metavar="N", help="rounds (20)")
    parser.add_argument("--no-peers", action="store_true", help="leave other libraries out")
    parser.add_argument("--no-memory", action="store_true", help="don't measure memory")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument(
        "--clock",
        default="wall",
        choices=("wall", "cpu"),
        help="cpu: own processor time, for a machine with other work",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), metavar="DIR", help="folder (runs/bench)")


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write bench.json and bench.png."""
    from torchmto.checks import check_choice, check_integer  # noqa: PLC0415  the lab takes seconds to import
    from torchmto.lab.bench.cases import CASES  # noqa: PLC0415
    from torchmto.lab.bench.contestants import bound_of, contestant_names  # noqa: PLC0415
    from torchmto.lab.bench.outputs import table, write_json, write_plot  # noqa: PLC0415
    from torchmto.lab.bench.peers import missing_peers  # noqa: PLC0415
    from torchmto.lab.bench.timing import Measurement, measure_memory, measure_times  # noqa: PLC0415
    from torchmto.lab.terminal import make_console  # noqa: PLC0415

    console = make_console(140)
    with wrong_usage():
        models = [check_choice("models", name, tuple(CASES)) for name in args.models.split(",")]
        tasks = [check_integer("tasks", int(count), minimum=2) for count in args.tasks.split(",")]
        repeats = check_integer("repeats", args.repeats, minimum=1)
        names = args.methods.split(",") if args.methods else contestant_names(peers=not args.no_peers)
        for name in names:
            bound_of(name, 2)
        args.out.mkdir(parents=True, exist_ok=True)
    if not args.no_peers:
        for peer, reason in missing_peers().items():
            console.print(f"{peer} isn't timed: {reason}", style="dim", markup=False)
    settings = {
        "models": models,
        "tasks": tasks,
        "methods": names,
        "repeats": repeats,
        "device": args.device,
        "clock": args.clock,
    }
    results: list[Measurement] = []
    began = time.monotonic()
    with console.status("") as status:

        def tick(what: str) -> None:
            status.update(what)

        for model in models:
            for num_tasks in tasks:
                fresh = measure_times(
                    model, num_tasks, names, repeats=repeats, device=args.device, clock=args.clock, tick=tick
                )
                for entry in fresh:
                    if not args.no_memory and not entry.failed:
                        tick(f"{model} K={num_tasks} {entry.name}: memory")
                        memory = measure_memory(model, num_tasks, entry.name, device=args.device)
                        entry.peak_bytes, entry.tensor_bytes = memory
                results += fresh
                # Written after every case, so that an interrupted run leaves what it has measured.
                write_json(args.out / "bench.json", results, settings)
    console.print(table(results))
    write_plot(args.out / "bench.png", results)
    print(f"{args.out}/bench.json, bench.png written; {time.monotonic() - began:.0f} s.")
    return 0
