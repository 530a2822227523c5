"""`moco-tf convert`: between workdirs and files of weights."""

import tensorflow as tf

from moco_tf import config as configs
from moco_tf.callbacks import Checkpoints
from moco_tf.errors import DataError, UsageError
from moco_tf.export import torch_files, torch_weights
from moco_tf.train import build_method, open_workdir, restore_method, set_precision, view_recipe

FILES = (*torch_files.TORCH_FILES, torch_files.SAFETENSORS_FILE, torch_files.PICKLE_FILE)


def exchange(source, target, layout="official", allow_probe=False, heads=0):
    """Converts, and prints what the source is, how its names fitted, and how far PyTorch's features lie from ours.

    Args:
        source: a run's workdir, or a .pth, .pth.tar, .pt or .safetensors file.
        target: a file of one of these kinds or .pkl (Detectron2); anything else is a workdir to be made.
        layout: of a target file, in `torch_weights.LAYOUTS`.
        allow_probe: into a workdir: accept a file without pre-training, for its backbone.
        heads: number of attention heads of a vision transformer's file; 0: that of MoCo v3's or DeiT's of its width.

    Raises:
        UsageError, DataError: what does not go together, cannot be read, or cannot be written; nothing is left then.
    """
    if source.endswith(FILES):
        checkpoint = torch_weights.parse(torch_files.read_state_dict(source), heads)
        report = torch_weights.fit(checkpoint)
    else:
        method, config, _ = restore_method(source)
        checkpoint, report = torch_weights.checkpoint_of(method, view_recipe(config).space), None
    print(f"{source}: {torch_weights.describe(checkpoint)}")
    if report:
        print(report.table())
        if not report.complete:
            raise DataError(f"Every name and shape must fit the model that the file is of. Received: {source}, with "
                            f"{len(report.missing)} missing, {len(report.unexpected)} unexpected and "
                            f"{len(report.misshapen)} of another shape (listed above).")
    if target.endswith(FILES):
        torch_weights.write(target, checkpoint, layout)
        print(f"wrote {target} in layout {layout}")
    else:
        _into_workdir(checkpoint, target, allow_probe)
        print(f"made the workdir {target}")
    _compare(checkpoint)


def imported_config(checkpoint):
    """The config of a run with the checkpoint's encoder: the nearest recipe, the rest by the file."""
    built = torch_weights.architecture(checkpoint)
    backbone, head = dict(built["backbone"]), built["head"] if checkpoint.kind == "pretraining" else None
    config = configs.load(_nearest_recipe(checkpoint, backbone, head))
    config.unlock()
    config.branches = built["branches"]
    config.data.channels = backbone.pop("channels", 0) or sum(channels for _, channels in built["branches"])
    config.views.size = backbone.pop("size", config.views.size)
    if checkpoint.method == "CMC":
        config.views.space = checkpoint.space or "Lab"
    if backbone["name"] == "vit":
        backbone["freeze_patch"] = config.backbone.get("freeze_patch", False)    # a recipe's choice: no file tells
    config.backbone = backbone
    if head:
        config.head = head
    elif config.head.name == "mlp" and backbone.get("depth", 50) < 50:
        config.head.hidden_dim = 512
    if built["predictor"]:
        config.predictor = {name: value for name, value in built["predictor"].items() if name != "dim"}
    if checkpoint.queue is not None:
        config.method.queue_size = len(checkpoint.queue)
    banks = checkpoint.banks
    if banks and banks.rows:
        loss = "nce" if max(banks.partitions) > 0 else "softmax" if banks.num_negatives else "full"
        config.method.update(bank_size=len(banks.rows[0]), loss=loss, num_negatives=banks.num_negatives,
                             temperature=banks.temperature, momentum=banks.momentum)
    return config.lock()


def _nearest_recipe(checkpoint, backbone, head):
    if checkpoint.method == "CMC":
        return "cmc_alexnet" if backbone["name"] == "alexnet" else "cmc_r50_v1"
    if checkpoint.method == "InsDis":
        return "insdis_r50"
    if backbone["name"] == "vit" and checkpoint.queue is None:
        return "moco_v3_vit_base" if backbone["dim"] >= 768 else "moco_v3_vit_small"
    if head and checkpoint.method == "MoCo v3":
        return "moco_v3_r50"
    return "moco_v1_r50" if head and head["name"] == "linear" else "moco_v2_r50"


def _into_workdir(checkpoint, workdir, allow_probe):
    if checkpoint.kind != "pretraining" and not allow_probe:
        raise DataError(f"A workdir takes a pre-training checkpoint. Received: {torch_weights.describe(checkpoint)}. "
                        "To start from its backbone, with a new head, add --allow_probe.")
    if tf.io.gfile.exists(f"{workdir}/config.json"):
        raise UsageError(f"The target must be a new workdir. Received: {workdir}, which holds a run. Name another.")
    config = imported_config(checkpoint)
    if config.method.get("bank_size") == 0:
        raise DataError(f"A workdir of {checkpoint.method} goes on with its memory bank. Received: "
                        f"{torch_weights.describe(checkpoint)}. Evaluation and export take the file as it is.")
    set_precision(config.precision)
    method = build_method(config, steps_per_epoch=1)
    torch_weights.restore(method, checkpoint, backbone_only=checkpoint.kind != "pretraining")
    open_workdir(config, workdir)
    Checkpoints(method, f"{workdir}/checkpoints").save(0)


def _compare(checkpoint):
    model = torch_weights.backbone_model(torch_weights.architecture(checkpoint))
    torch_weights.load_backbone(model, checkpoint, allow_probe=True)
    difference = torch_weights.difference_from_torchvision(model, checkpoint)
    print("torch and torchvision are not both here, or have no such network: outputs were not compared"
          if difference is None else
          f"features of a fixed batch differ from PyTorch's by {difference:.1e} of their largest value")
