"""Run by Lightning's launcher in two processes, which train every case: `python two_lightning.py OUT`."""

import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import lightning.pytorch as L  # noqa: E402
import torch  # noqa: E402
from test_lightning import PROCESSES, Net, batches, loader  # noqa: E402

if __name__ == "__main__":
    torch.set_num_threads(1)
    rank, results = int(os.environ.get("LOCAL_RANK", "0")), []
    for method, strategy, options in PROCESSES:
        net = Net(method)
        run = L.Trainer(
            accelerator="cpu",
            devices=2,
            strategy=strategy,
            max_epochs=1,
            use_distributed_sampler=False,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            default_root_dir=sys.argv[1],
            **options,
        )
        run.fit(net, loader(batches(8)[rank::2]))
        results.append({"model": net.toy.state_dict(), "steps": run.global_step, "losses": dict(net.step_info.losses)})
    torch.save(results, Path(sys.argv[1]) / f"{rank}.pt")
