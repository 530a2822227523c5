"""moco-tf: a sub-command parses its flags and calls one library function. Help and parsing do not import TensorFlow."""

import difflib
import logging
import os
import sys
import types

from absl import flags

from moco_tf import config as configs
from moco_tf.errors import DataError, MocoError, UsageError


def pretrain(argv):
    """Pre-trains an encoder; a workdir that holds the same run is resumed.

    moco-tf pretrain --config=quickstart --workdir=runs/quickstart [--config.batch_size=256 ...]
    """
    values = _flags()
    flags.DEFINE_string("workdir", None, "Folder, local or gs://, for everything of the run.", flag_values=values)
    flags.DEFINE_string("data_service", "", "Address of a tf.data service that makes the views, grpc://HOST:PORT (see "
                        "`moco-tf data serve`).", flag_values=values)
    _strategy_flags(values)
    config, _ = _parse(argv, values, config=True, required=("workdir",))
    print_onednn()
    from moco_tf.distribute import make_strategy, set_intra_op_threads
    from moco_tf.train import pretrain as run
    set_intra_op_threads(config.intra_op_threads)
    strategy, reason = make_strategy(values.strategy, values.cpu_replicas, values.tpu)
    results = run(config, values.workdir, strategy, reason, values.data_service)
    for name, title in (("knn_top1", "kNN accuracy"), ("view_retrieval", "view retrieval")):
        if results[f"{name}_final"] is not None:
            print(f"{title}: {results[f'{name}_initial']:.2%} before training, {results[f'{name}_final']:.2%} after")
    print(f"{results['steps']} steps in {results['seconds']:.0f} s; everything is in {values.workdir}")


def linear(argv):
    """Accuracy of a linear classifier on an encoder's frozen features.

    moco-tf linear --encoder=runs/quickstart                                   # the papers' protocol, linear_v1v2
    moco-tf linear --encoder=runs/quickstart --fast                            # features once, then a grid in one pass
    moco-tf linear --encoder=export/ --config.data.name=folder --config.data.path=/data/photos --workdir=runs/probe
    moco-tf linear --encoder=runs/cmc_alexnet --config=linear_cmc --layers=1,2,3,4,5    # layer by layer
    """
    _train_classifier(argv, "linear_v1v2", fast=True)


def finetune(argv):
    """Trains an encoder further on labels, all of them or a part.

    moco-tf finetune --encoder=runs/moco_v2 --config=finetune_r50_1pct
    """
    _train_classifier(argv, "finetune_r50")


def _train_classifier(argv, recipe, fast=False):
    values = _flags()
    flags.DEFINE_string("encoder", None, "A run's workdir, a .pth, .pt or .safetensors file, or a SavedModel's folder.",
                        flag_values=values)
    flags.DEFINE_enum("side", None, ["query", "key"], "Encoder of a run to take (default: query).", flag_values=values)
    flags.DEFINE_string("workdir", None, "Folder for everything of this run (default: a folder of the recipe's name in the "
                        "encoder's workdir).", flag_values=values)
    if fast:
        flags.DEFINE_bool("fast", False, "Compute the features once and train a grid of learning rates and decays on them, "
                          "instead of the protocol.", flag_values=values)
        flags.DEFINE_string("cache", None, "fast: folder for the features (default: in the encoder's workdir).",
                            flag_values=values)
        flags.DEFINE_list("layers", None, "Numbers of the layers to probe one after the other, each in a folder of its own "
                          "(default: the config's layer). For recipes that have one, such as linear_cmc.",
                          flag_values=values)
    _strategy_flags(values)
    config, _ = _parse(argv, values, config=True, default=recipe)
    if "encoder" not in config:
        raise UsageError(f"{argv[0]} needs a config of its own kind, such as {recipe}. Received: "
                         f"{values.config or f'the workdir {values.workdir}, which holds another run'}. Give --config={recipe}, or "
                         "another --workdir.")
    print_onednn()
    from moco_tf.distribute import Hosts, make_strategy, set_intra_op_threads
    from moco_tf.evaluation.classifier import complete_config, train_classifier
    config = configs.override(config, encoder=values.encoder or config.encoder, side=values.side or config.side)
    config = complete_config(config)
    fast = fast and values.fast
    workdir = values.workdir or _beside(config.encoder, f"{values.config or recipe}{'_fast' if fast else ''}")
    set_intra_op_threads(config.intra_op_threads)
    strategy, reason = (None, "") if fast else make_strategy(values.strategy, values.cpu_replicas, values.tpu)
    if not fast and Hosts(strategy).count > 1:
        raise UsageError(f"{argv[0]} takes one host. Received: the {Hosts(strategy).count} of TF_CONFIG. Unset it, or use "
                         "--strategy=mirrored.")
    for folder, own in _layer_by_layer(config, workdir, values).items():
        if fast:
            from moco_tf.evaluation.probe import fast_linear
            results = fast_linear(own, folder, values.cache)
            print(f"top-1 {results['top1']:.2%}, top-5 {results['top5']:.2%}; everything is in {folder}")
        else:
            results = train_classifier(own, folder, strategy, reason)
            print(f"top-1 {results['top1']:.2%}, top-5 {results['top5']:.2%} at the end; best top-1 "
                  f"{results['best_top1']:.2%} at step {results['best_step']}; everything is in {folder}")


def _layer_by_layer(config, workdir, values):
    """{folder: config} of the runs that a command asks for: one for each of --layers, or just one."""
    layers = "layers" in values and values.layers
    if layers and "layer" not in config:
        raise UsageError("--layers belongs to recipes that probe a layer, such as linear_cmc. Received: "
                         f"--layers={','.join(layers)} with another.")
    if layers:
        numbers = _numbers(layers, int, "--layers")
    elif "layer" in config and not values.workdir:
        numbers = [config.layer]
    else:
        return {workdir: config}
    return {f"{workdir}/layer{number}": configs.override(config, layer=number) for number in numbers}


def _beside(encoder, name):
    """The default folder for results on an encoder: in its workdir."""
    if "://" not in encoder and not os.path.isfile(f"{encoder}/config.json"):
        raise UsageError(f"--workdir is needed where the encoder is no run's workdir. Received: encoder {encoder}.")
    return f"{encoder}/{os.path.splitext(os.path.basename(name))[0]}"


def knn(argv):
    """Accuracy of the nearest neighbours' vote on held-out images, for a pre-trained encoder.

    moco-tf knn --workdir=runs/quickstart [--k=20,200] [--config.data.path=/other/images]
    moco-tf knn --encoder=export/ --config.data.name=folder --config.data.path=/data/photos
    """
    values = _flags()
    flags.DEFINE_string("encoder", None, "A run's workdir, a .pth, .pt or .safetensors file, or a SavedModel's folder "
                        "(default: the workdir).", flag_values=values)
    flags.DEFINE_enum("side", "query", ["query", "key"], "Encoder of a run to take.", flag_values=values)
    flags.DEFINE_string("workdir", None, "Folder for knn.json (default: that of the encoder, if it is a run's).",
                        flag_values=values)
    flags.DEFINE_list("k", ["20", "200"], "Neighbours that vote, one or more.", flag_values=values)
    flags.DEFINE_list("temperature", ["0.07", "0.1"], "Of the votes, one or more.", flag_values=values)
    flags.DEFINE_enum("features", "backbone", ["backbone", "embedding"], "Rows to compare.", flag_values=values)
    flags.DEFINE_string("cache", None, "Folder for the features (default: features/ in a run's workdir; else they are "
                        "not kept).", flag_values=values)
    config, _ = _parse(argv, values, config=True, default="linear_v1v2")
    path = values.encoder or values.workdir
    if not path:
        raise UsageError("knn needs --encoder, or the --workdir of a run. `moco-tf knn --help` shows an example.")
    ks, temperatures = _numbers(values.k, int, "--k"), _numbers(values.temperature, float, "--temperature")
    print_onednn()
    from moco_tf.evaluation.report import evaluate_knn
    report, file = evaluate_knn(config, path, values.side, values.workdir or "", ks=ks, temperatures=temperatures,
                                features=values.features, cache=values.cache or "")
    for row in report["grid"]:
        print(f"k {row['k']:4d}  temperature {row['temperature']:<5g}  "
              f"top-1 {row['top1']:.2%}  top-5 {row['top5']:.2%}")
    print(f"{report['encoder']}; {report['bank']} images of {report['image_size']} pixels vote on {report['queries']}"
          + (f"; it is in {file}" if file else ""))


def export(argv):
    """Writes an encoder as a SavedModel, a Keras file, weights or TFLite, for use without this package.

    moco-tf export --encoder=runs/moco_v2 [--out=DIR] [--side=key] [--precision=bfloat16]
    moco-tf export --encoder=runs/moco_v2 --formats=saved_model,keras,weights,tflite
    """
    values = _flags()
    flags.DEFINE_string("encoder", None, "A run's workdir, or a .pth, .pt or .safetensors file.", flag_values=values)
    flags.DEFINE_string("out", "", "Folder to write, local or gs:// (default: export in the encoder's workdir).",
                        flag_values=values)
    flags.DEFINE_enum("side", "query", ["query", "key"], "Encoder of the run to take.", flag_values=values)
    flags.DEFINE_enum("precision", "float32", ["float32", "bfloat16"], "Of the computation.", flag_values=values)
    flags.DEFINE_integer("size", 0, "Side of the images in pixels; 0: the one the encoder was made for.", lower_bound=0,
                         flag_values=values)
    flags.DEFINE_list("formats", ["saved_model"], "One or more of saved_model, keras, weights, tflite.",
                      flag_values=values)
    flags.DEFINE_bool("overwrite", False, "Replace an export that lies there.", flag_values=values)
    _, rest = _parse(argv, values, required=("encoder",))
    if rest:
        raise UsageError(f"export takes flags only. Received besides: {' '.join(rest)}.")
    print_onednn()
    from moco_tf.export.saved_model import export as write
    write(values.encoder, values.out, values.side, values.precision, values.size, values.formats, values.overwrite)


def show(argv):
    """Draws a recipe's views, runs' curves, an encoder's neighbours or map, or writes a page with all of a run.

    moco-tf show views moco_v2_r50 --config.data.name=folder --config.data.path=/data/photos
    moco-tf show curves runs/a runs/b
    moco-tf show neighbours runs/a --queries=10 --k=8
    moco-tf show map runs/a --points=2000
    moco-tf show map encoder.pth --config.data.name=folder --config.data.path=/data/photos
    moco-tf show report runs/a
    """
    values = _flags()
    flags.DEFINE_string("out", None, "File to write (default: figures/SUBJECT.png or report.html in the workdir; without a "
                        "workdir, or with several: in the current folder).", flag_values=values)
    flags.DEFINE_integer("queries", 10, "neighbours: images to find some for.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("k", 8, "neighbours: how many for each.", lower_bound=1, flag_values=values)
    flags.DEFINE_enum("split", "held-out", ["held-out", "train"], "neighbours: where the queries are from.",
                      flag_values=values)
    flags.DEFINE_integer("bank", 10000, "neighbours: training images to look among, drawn; 0: all.", lower_bound=0,
                         flag_values=values)
    flags.DEFINE_integer("points", 2000, "map: images, drawn.", lower_bound=1, flag_values=values)
    overrides = [argument for argument in argv if argument.lstrip("-").startswith("config.")]
    _, rest = _parse([argument for argument in argv if argument not in overrides], values)
    subject, paths = rest[0] if rest else "nothing", rest[1:]
    if subject not in SUBJECTS:
        near = difflib.get_close_matches(subject, SUBJECTS, n=1)
        raise UsageError(f"show takes one of {', '.join(SUBJECTS)}. Received: {subject}."
                         + (f" Did you mean {near[0]!r}?" if near else ""))
    if len(paths) != 1 and not (paths and subject == "curves") or overrides and subject == "curves":
        raise UsageError(f"show {subject} takes {SUBJECTS[subject]}. Received: {' '.join(paths + overrides) or 'nothing'}.")
    path, run = paths[0], _is_run(paths[0])
    if not run and (subject == "report" or subject == "views" and os.path.isdir(path)):
        raise UsageError(f"The workdir must hold a run. Received: {path}, without a config.json.")
    config = None
    if subject != "curves":
        named = path if subject == "views" and not run else None
        config = _config(types.SimpleNamespace(config=named, workdir=path), overrides, "linear_v1v2")
        print_onednn()
    name = "report.html" if subject == "report" else f"figures/{subject}.png"
    out = values.out or os.path.join(path if run and len(paths) == 1 else ".", name)
    from moco_tf.visualize import draw
    draw(subject, paths, config, out, values.points, queries=values.queries, k=values.k, split=values.split,
         bank=values.bank)
    print(out)


SUBJECTS = {"views": "one recipe's name or file, or one workdir", "curves": "one or more workdirs, and no config",
            "neighbours": "one workdir, file of weights or SavedModel", "map": "one workdir, file of weights or SavedModel",
            "report": "one workdir"}


def _is_run(path):
    if "://" in path:
        import tensorflow as tf
        return tf.io.gfile.exists(f"{path}/config.json")
    return os.path.isfile(f"{path}/config.json")


def data(argv):
    """Looks at images, packs them, cuts photographs into patches, or makes views for other machines.

    moco-tf data check PATH [--split=val]
    moco-tf data pack PATH OUT [--split=train] [--shards=N] [--overwrite]
    moco-tf data cut PATH OUT [--side=32] [--shorter_side=512]
    moco-tf data serve --role=dispatcher --port=5050
    moco-tf data serve --role=worker --port=5051 --dispatcher=HOST:5050
    """
    values = _flags()
    flags.DEFINE_string("split", None, "check: sub-folder of PATH to look at; left out: all below PATH. pack: sub-folder "
                        "to pack, if there is such (default: train).", flag_values=values)
    flags.DEFINE_integer("shards", 0, "pack: number of files; 0: files of about 150 MB.", flag_values=values)
    flags.DEFINE_bool("overwrite", False, "pack: replace a finished pack.", flag_values=values)
    flags.DEFINE_integer("side", 32, "cut: side of a patch in pixels.", flag_values=values)
    flags.DEFINE_integer("shorter_side", 512, "cut: larger photographs are reduced to it first; 0: none is.",
                         flag_values=values)
    flags.DEFINE_enum("role", "worker", ["dispatcher", "worker"], "serve: part to run.", flag_values=values)
    flags.DEFINE_integer("port", 5050, "serve: to listen on.", lower_bound=1, upper_bound=65535, flag_values=values)
    flags.DEFINE_string("dispatcher", "", "serve: a worker's dispatcher, HOST:PORT.", flag_values=values)
    flags.DEFINE_string("host", "", "serve: the name by which the other machines reach this one (default: its own).",
                        flag_values=values)
    _, rest = _parse(argv, values)
    wanted = {"check": 2, "pack": 3, "cut": 3, "serve": 1}
    if not rest or rest[0] not in wanted or len(rest) != wanted[rest[0]]:
        raise UsageError("data takes `check PATH`, `pack PATH OUT`, `cut PATH OUT` or `serve`. Received: "
                         f"{' '.join(rest) or 'nothing'}.")
    if rest[0] == "serve":
        from moco_tf.data.service import serve
        serve(values.role, values.port, values.dispatcher, values.host)
        return
    from moco_tf.data import patches, tools
    if rest[0] == "cut":
        print(patches.format_cut(rest[2], patches.cut(rest[1], rest[2], values.side, values.shorter_side)))
    elif rest[0] == "check":
        report = tools.check(rest[1], split=values.split)
        print(tools.format_report(report))
        if report.unreadable:
            raise DataError(f"Every image should be readable. Found {len(report.unreadable)} that are not (listed above); "
                            "training skips them up to data.max_unreadable.")
    else:
        print(tools.format_packed(tools.pack(rest[1], rest[2], values.split or "train", shards=values.shards or None,
                                             overwrite=values.overwrite)))


def convert(argv):
    """Exchanges weights with PyTorch: a run's workdir into a file, a file into a workdir, or a file into a file.

    moco-tf convert runs/moco_v2 moco_v2.pth.tar                        # official MoCo layout
    moco-tf convert runs/moco_v2 resnet50.safetensors --layout=torchvision
    moco-tf convert runs/moco_v2 resnet50.pkl --layout=detectron2
    moco-tf convert runs/cmc ckpt.pth --layout=cmc                      # CMC and InsDis, with their banks
    moco-tf convert moco_v2_200ep_pretrain.pth.tar runs/imported
    moco-tf convert vit-s-300ep.pth.tar deit.pth --layout=deit
    moco-tf convert deit_small.pth runs/imported --allow_probe --heads=6
    """
    values = _flags()
    flags.DEFINE_enum("layout", "official", ["official", "cmc", "torchvision", "deit", "detectron2"],
                      "Names in the file written.", flag_values=values)
    flags.DEFINE_bool("allow_probe", False, "Take the backbone of a file that holds no pre-training: a linear probe's, "
                      "or a plain network's.", flag_values=values)
    flags.DEFINE_integer("heads", 0, "Attention heads of a vision transformer's file, which does not say; 0: those of "
                         "MoCo v3 where they are known.", lower_bound=0, flag_values=values)
    _, rest = _parse(argv, values)
    if len(rest) != 2:
        raise UsageError(f"convert takes SOURCE and TARGET. Received: {' '.join(rest) or 'nothing'}.")
    from moco_tf.export.exchange import exchange
    exchange(rest[0], rest[1], values.layout, values.allow_probe, values.heads)


def recipes(argv):
    """Lists the recipes, or shows one.

    moco-tf recipes [NAME]
    """
    _, rest = _parse(argv, _flags())
    known = configs.recipes()
    for name in rest:
        if name not in known:
            configs.load(name)    # says what is near
        print(f"{configs.describe(known[name])}\n\nFile: {known[name]}\n")
        print(configs.to_json(configs.load(name)), end="")
    if not rest:
        width = max(map(len, known))
        for name, path in known.items():
            print(f"{name:{width}}  {configs.describe(path).splitlines()[0]}")


def doctor(argv):
    """Shows versions, devices and the strategy that would be chosen, compiles two steps, and says how to mend what fails.

    moco-tf doctor
    """
    values = _flags()
    _strategy_flags(values)
    _parse(argv, values)
    from moco_tf.doctor import examine
    examine(values.strategy, values.cpu_replicas, values.tpu)


def bench(argv):
    """Measures a recipe's training step or input pipeline, part by part, beside their limits and their peers.

    moco-tf bench step --config=moco_v2_r50 [--config.batch_size=8 --vs=torch]
    moco-tf bench data --config=moco_v2_r50 --config.data.path=/data/imagenet [--vs=torchvision]
    """
    name = " ".join(argv[:2])
    if name in BENCHES:
        BENCHES[name]([name, *argv[2:]])
    elif argv[1:] and argv[1].lstrip("-") in ("h", "help"):
        raise _Help("\n".join(line.strip() for line in bench.__doc__.splitlines()))
    else:
        raise UsageError(f"bench takes one of {', '.join(each.split()[1] for each in BENCHES)}. Received: "
                         f"{' '.join(argv[1:2]) or 'nothing'}.")


def _bench_step(argv):
    """Times a recipe's training step on made-up images: the whole, its parts, and operations against the device's peak.

    moco-tf bench step --config=moco_v2_r50 --config.batch_size=8
    moco-tf bench step --config=moco_v2_r50 --config.batch_size=8 --vs=torch --json=step.json
    moco-tf bench step --config=moco_v2_r50 --sweep=queue_size=4096,65536,1048576 --plot=queue.png
    """
    values = _flags()
    flags.DEFINE_integer("rounds", 5, "Turns of each case; medians are of so many.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("steps", 0, "Steps in a turn; 0: as many as take about three seconds.", lower_bound=0,
                         flag_values=values)
    flags.DEFINE_enum("vs", None, ["torch"], "Also run an equivalent step of this library, in turns with ours.",
                      flag_values=values)
    flags.DEFINE_string("sweep", "", "A key of the config and its values: batch_size=8,16,32; precision, jit_compile and "
                        "queue_size as well as any key of a recipe.", flag_values=values)
    flags.DEFINE_string("json", "", "File for all figures.", flag_values=values)
    flags.DEFINE_string("plot", "", "File for a picture, .png.", flag_values=values)
    _strategy_flags(values)
    config, _ = _parse(argv, values, config=True, required=("config",))
    print_onednn()
    from moco_tf.bench.step import bench_step
    bench_step(config, values.rounds, values.steps, values.vs, values.sweep, values.json, values.plot,
               dict(name=values.strategy, cpu_replicas=values.cpu_replicas, tpu=values.tpu))


def _bench_data(argv):
    """Times a recipe's input pipeline on your data, stage by stage, and says what it takes to feed a training step.

    moco-tf bench data --config=moco_v2_r50 --config.data.path=/data/imagenet
    moco-tf bench data --config=moco_v2_r50 --config.data.path=/data/imagenet --step_images_per_s=1000
    moco-tf bench data --config=moco_v2_r50 --config.data.path=/data/imagenet --vs=torchvision --plot=data.png
    """
    values = _flags()
    flags.DEFINE_integer("images", 512, "In a round; so many are drawn from the data.", lower_bound=32,
                         flag_values=values)
    flags.DEFINE_integer("rounds", 5, "Turns of each case; medians are of so many.", lower_bound=1, flag_values=values)
    flags.DEFINE_list("vs", [], "Other libraries' pipelines, on the same files, in turns with ours: torchvision "
                      "(Pillow), albumentations (OpenCV).", flag_values=values)
    flags.DEFINE_list("step_images_per_s", [], "Images/s of training steps to feed, from `moco-tf bench step` or "
                      "preflight; one or more.", flag_values=values)
    flags.DEFINE_string("json", "", "File for all figures.", flag_values=values)
    flags.DEFINE_string("plot", "", "File for a picture, .png.", flag_values=values)
    config, _ = _parse(argv, values, config=True, required=("config",))
    rates = _numbers(values.step_images_per_s, float, "--step_images_per_s") if values.step_images_per_s else []
    print_onednn()
    from moco_tf.bench.data import bench_data
    bench_data(config, values.images, values.rounds, values.vs, rates, values.json, values.plot)


BENCHES = {"bench step": _bench_step, "bench data": _bench_data}


COMMANDS = {"pretrain": pretrain, "linear": linear, "finetune": finetune, "knn": knn, "export": export,
            "convert": convert, "show": show, "data": data, "recipes": recipes, "doctor": doctor, "bench": bench}


def main(argv=None):
    """Runs a sub-command; returns the exit code: 0 done, 2 usage or config, 3 data, 4 diverged, 75 preempted and saved."""
    argv = sys.argv[1:] if argv is None else argv
    # oneDNN's convolutions are up to four times faster, and off by default on processors without VNNI.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")    # TensorFlow says at level 2 that it registers cuDNN twice
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    if not argv or argv[0] in ("help", "-h", "--help", "-help"):
        print(_overview())
        return 0 if argv else 2
    try:
        if argv[0] not in COMMANDS:
            near = difflib.get_close_matches(argv[0], COMMANDS, n=1)
            raise UsageError(f"The command must be one of {', '.join(COMMANDS)}. Received: {argv[0]!r}."
                             + (f" Did you mean {near[0]!r}?" if near else ""))
        COMMANDS[argv[0]](argv)
        return 0
    except _Help as text:
        print(text)
        return 0
    except MocoError as error:
        print(f"moco-tf: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:    # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


class _Help(Exception):
    """Text asked for by --help."""


def _overview():
    lines = ["moco-tf: momentum-contrast self-supervised learning in TensorFlow", "", "Commands:"]
    lines += [f"  {name:10s}{command.__doc__.splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join([*lines, "", "moco-tf COMMAND --help shows a command's flags."])


def _flags():
    values = flags.FlagValues()
    flags.DEFINE_bool("help", False, "Shows this.", short_name="h", flag_values=values)
    return values


def _strategy_flags(values):
    flags.DEFINE_enum("strategy", "auto", ["auto", "default", "mirrored", "multi_worker", "tpu"],
                      "Devices to train on; auto picks by what is there: the hosts of TF_CONFIG, a TPU, several GPUs, one "
                      "device.", flag_values=values)
    flags.DEFINE_string("tpu", "", "local, or the name of a slice (default: the environment's TPU_NAME, or local).",
                        flag_values=values)
    flags.DEFINE_integer("cpu_replicas", 0, "Splits the CPU into so many replicas, to try out several devices.",
                         lower_bound=0, flag_values=values)


def _parse(argv, values, config=False, required=(), default=None):
    """Fills `values` from argv; with `config`, --config and --config.key=value make the config.

    Where there is no --config, the workdir's config.json counts, or else the recipe `default`.

    Returns:
        (config or None, positional arguments).
    """
    command = {**COMMANDS, **BENCHES}[argv[0]]
    if config:
        flags.DEFINE_string("config", None, "A recipe's name, a .py file or a config.json; --config.key=value "
                            "overrides. Left out: that of the workdir.", flag_values=values)
    plain = [a for a in argv if not a.lstrip("-").startswith("config.")]
    overrides = [a for a in argv if a.lstrip("-").startswith("config.")]
    try:
        rest = values(plain)[1:]
    except flags.Error as error:
        raise UsageError(f"{error} (moco-tf {argv[0]} --help lists the flags)") from None
    if values.help:
        raise _Help(_command_help(command, values))
    if overrides and not config:
        raise UsageError(f"{argv[0]} takes no config. Received: {overrides[0]}.")
    for name in required:
        if not values[name].value:
            raise UsageError(f"{argv[0]} needs --{name}. `moco-tf {argv[0]} --help` shows an example.")
    if config and rest:
        raise UsageError(f"{argv[0]} takes flags only. Received besides: {' '.join(rest)}.")
    return (_config(values, overrides, default) if config else None), rest


def _config(values, overrides, default):
    if values.config:
        config = configs.load(values.config)
    else:
        path = f"{values.workdir}/config.json"
        if "://" in path:
            from moco_tf.train import read_config
            config = read_config(values.workdir)
        elif os.path.isfile(path):
            config = configs.load(path)
        elif default:
            config = configs.load(default)
        else:
            raise UsageError(f"--config is needed where the workdir holds no run yet. Received: workdir "
                             f"{values.workdir}. `moco-tf recipes` lists the recipes.")
    config = _with_options(config, overrides)
    from ml_collections import config_flags
    parsed = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=parsed, sys_argv=["moco-tf", *overrides])
        parsed(["moco-tf", *overrides])
    except (flags.Error, TypeError, ValueError) as error:
        raise UsageError(f"{str(error).splitlines()[0]}. The key keeps the type it has in the recipe.") from None
    return parsed.config


def _with_options(config, overrides):
    """The config with keys, at their values, that its recipe leaves out and its parts take all the same.

    Raises:
        UsageError: an override that is none; a key that no part takes.
    """
    given = [override.lstrip("-")[len("config."):].partition("=") for override in overrides]
    for key, equals, value in given:
        if not equals:
            configs.refuse_unknown(config, key)
            raise UsageError(f"An override is --config.key=value. Received: --config.{key}.")
        if key.endswith(".name") and key in configs.flatten(config):    # which part it is says what it takes
            config = configs.override(config, **{key: value})
    for key, _, value in given:
        if key not in configs.flatten(config):
            from moco_tf.train import is_option
            if is_option(config, key):
                config = configs.with_option(config, key, value)
        configs.refuse_unknown(config, key)
    return config


def _command_help(command, values):
    lines = [" ".join(command.__doc__.splitlines()[0].split()), ""]
    lines += [line.strip() and f"  {line.strip()}" for line in command.__doc__.splitlines()[2:]]
    lines += ["Flags:"]
    for name in sorted(values):
        flag = values[name]
        if name == flag.name:
            default = "" if flag.default in (None, False) else f" (default: {flag.default_as_str})"
            lines.append(f"  --{name}: {flag.help}{default}")
    return "\n".join(lines)


def _numbers(texts, kind, flag):
    try:
        numbers = [kind(text) for text in texts]
        if min(numbers) > 0:
            return numbers
    except ValueError:
        pass
    raise UsageError(f"{flag} takes positive numbers, separated by commas. Received: {','.join(texts)}.")


def print_onednn():
    state = "on" if os.environ["TF_ENABLE_ONEDNN_OPTS"] == "1" else "off"
    print(f"oneDNN is {state} (TF_ENABLE_ONEDNN_OPTS); on and off differ in the last bits of results")


if __name__ == "__main__":
    sys.exit(main())
