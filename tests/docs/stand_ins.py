"""Just enough of two other codebases to run what their users have written."""

from types import ModuleType

import torch


class PCGrad:
    """The interface of the PCGrad ports: the mean of the projected gradients on parameters that all tasks reach."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def pc_backward(self, losses):
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        rows = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in losses]
        shared = [i for i in range(len(parameters)) if all(row[i] is not None for row in rows)]
        flat = torch.stack([torch.cat([row[i].flatten() for i in shared]) for row in rows])
        projected = flat.clone()
        for i in range(len(losses)):
            for j in range(len(losses)):
                product = projected[i] @ flat[j]
                if i != j and product < 0:
                    projected[i] -= product / flat[j].square().sum() * flat[j]
        pieces = projected.mean(0).split([parameters[i].numel() for i in shared])
        for i, parameter in enumerate(parameters):
            own = [row[i] for row in rows if row[i] is not None]
            parameter.grad = pieces[shared.index(i)].view_as(parameter) if i in shared else sum(own)

    def step(self):
        self.optimizer.step()


class Trainer(torch.nn.Module):
    """LibMTL's trainer for one input and PCGrad."""

    def __init__(self, *, task_dict, encoder_class, decoders, optim_param, **rest):
        super().__init__()
        assert (rest["rep_grad"], rest["multi_input"], rest["scheduler_param"]) == (False, False, None)
        self.tasks, self.encoder, self.decoders = task_dict, encoder_class(), decoders
        options = {name: value for name, value in optim_param.items() if name != "optim"}
        self.optimizer = {"adam": torch.optim.Adam}[optim_param["optim"]](self.parameters(), **options)

    def train(self, train_dataloaders, test_dataloaders, epochs):
        surgery = PCGrad(self.optimizer)
        for x, y in train_dataloaders * epochs:
            features = self.encoder(x)
            surgery.pc_backward([d["loss_fn"][0](self.decoders[t](features), y[t]) for t, d in self.tasks.items()])
            surgery.step()


def module(name, **members):
    made = ModuleType(name)
    vars(made).update(members)
    return made


MODULES = {
    "pcgrad": module("pcgrad", PCGrad=PCGrad),
    "LibMTL": module("LibMTL", Trainer=Trainer),
    "LibMTL.architecture": module("LibMTL.architecture", HPS=object),
    "LibMTL.weighting": module("LibMTL.weighting", PCGrad=object),
}
