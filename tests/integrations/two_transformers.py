"""Run in each of two processes by torch.distributed.run: `two_transformers.py OUT`."""

import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import torch  # noqa: E402
from test_transformers import samples, trainer  # noqa: E402

if __name__ == "__main__":
    torch.set_num_threads(1)
    settings = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.4, "ddp_backend": "gloo"}
    run = trainer(sys.argv[1], "cagrad", data=samples(16), save_strategy="epoch", **settings)
    run.train()
    result = {"model": run.model.state_dict(), "steps": run.state.global_step, "evaluation": run.evaluate()}
    run.args.per_device_eval_batch_size = 2
    result["repeats"] = {count: run.evaluate(samples(count)) for count in (9, 10)}
    torch.save(result, Path(sys.argv[1]) / f"{os.environ['RANK']}.pt")
