"""PEFT: the adapters of a pretrained trunk are what eight tasks share."""

import pytest
import torch
from torch import nn

import torchmto

peft = pytest.importorskip("peft")
TASKS = tuple("abcdefgh")


class Net(nn.Module):
    """A trunk of two layers, of which a pretrained model would have more, and eight heads."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.ModuleDict({"query": nn.Linear(6, 12), "value": nn.Linear(12, 12)})
        self.heads = nn.ModuleDict({task: nn.Linear(12, 1) for task in TASKS})

    def forward(self, x, tasks=TASKS):
        features = self.trunk["value"](self.trunk["query"](x).tanh()).tanh()
        return {task: self.heads[task](features) for task in tasks}


@pytest.mark.parametrize("method", ["pcgrad", "cagrad", "uw"])
def test_adapters_are_the_shared_parameters(method):
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=2, target_modules=["query", "value"], modules_to_save=[f"heads.{t}" for t in TASKS], init_lora_weights=False
    )
    model = peft.get_peft_model(Net(), config)
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    mt = torchmto.MultiTask(model, torch.optim.AdamW(trained, lr=0.05), tasks=TASKS, method=method)
    x, targets = torch.randn(32, 6), {task: torch.randn(32, 1) for task in TASKS}

    def closure(tasks):
        outputs = model(x, tasks=tasks)
        return {task: (outputs[task] - targets[task]).square().mean() for task in tasks}

    losses = [sum(mt.step(closure).losses.values()) for _ in range(30)]
    assert losses[-1] < 0.9 * losses[0]
    shared = {name for name in mt.network.names() if mt.network.roles.is_shared(name)}
    assert shared == {name for name, p in model.named_parameters() if p.requires_grad and "lora_" in name}
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
