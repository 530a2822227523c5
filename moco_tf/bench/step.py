"""A recipe's training step, whole and in parts, for one config or a sweep of a key, beside PyTorch's."""

import collections
import importlib.util
import json
import os
import statistics

import tensorflow as tf

from moco_tf import config as configs
from moco_tf.bench.parts import IMAGES, PRODUCT, share_outside_products, training_step
from moco_tf.bench.timing import in_turns, ratio
from moco_tf.errors import UsageError
from moco_tf.files import write_file
from moco_tf.train import learning_rate, versions, view_names

OURS, THEIRS = "moco_tf", "PyTorch"
# PyTorch's threads otherwise spin while they wait for each other, ten times too slow where a core is not theirs alone.
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}


def bench_step(config, rounds=5, steps=0, vs=None, sweep="", json_file="", plot="", strategy=None):
    """Measures the training step of a config, prints what was found, and returns it.

    Args:
        config: complete, as from `moco_tf.config.load`.
        rounds: turns of each case.
        steps: in a turn; 0: as many as take about three seconds.
        vs: "torch": an equivalent step in PyTorch takes turns with ours; None: none does.
        sweep: "key=value,value ..." of the config, measured side by side; "": the config as it is.
        json_file, plot: files to write; "": none.
        strategy: arguments of `make_strategy`.

    Returns:
        The report, as written to `json_file`.

    Raises:
        UsageError: a sweep of no key, PyTorch missing, or a config that has no equivalent there.
        MocoError: a case failed.
    """
    if not view_names(config):
        raise UsageError(f"bench step takes the recipe of a pre-training. Received: that of {config.method.name}.")
    wanted = {value: _measurable(each) for value, each in swept(config, sweep).items()}
    on_gpu, on_tpu = (bool(tf.config.list_physical_devices(kind)) for kind in ("GPU", "TPU"))
    accelerated = on_gpu or on_tpu
    cases = {value: _cases(each, steps, vs, strategy or {}, on_gpu) for value, each in wanted.items()}
    if not accelerated and any(each.jit_compile for each in wanted.values()):
        print("jit_compile on a CPU makes the step many times slower: XLA's convolutions are slow there", flush=True)
    print(f"setting up {sum(map(len, cases.values()))} case(s), each traced whole and part by part", flush=True)
    load = os.getloadavg()[0]
    # On a CPU all take turns, as its speed is not steady; the memory of an accelerator is for one at a time.
    together = [cases] if not accelerated else [{value: own} for value, own in cases.items()]
    measured = {}
    for some in together:
        flat = {(value, name): case for value, own in some.items() for name, case in own.items()}
        measured.update(in_turns(flat, rounds, environment=None if "OMP_WAIT_POLICY" in os.environ else PASSIVE))
    results = {value: _result(measured[value, OURS], measured.get((value, THEIRS)), config_)
               for value, config_ in wanted.items()}
    report = {"config": config.to_dict(), "sweep": sweep.partition("=")[0], "rounds": rounds,
              "cpus": os.cpu_count(), "load": [load, os.getloadavg()[0]],
              "onednn": os.environ.get("TF_ENABLE_ONEDNN_OPTS"), "versions": versions(), "results": results}
    print("\n\n".join(format_result(value, result) for value, result in results.items()))
    if len(results) > 1:
        print(f"\n{format_sweep(report)}")
    if json_file:
        write_file(json_file, json.dumps(report, indent=1) + "\n")
    if plot:
        _plot(plot, report)
    return report


def swept(config, sweep):
    """{value as written: the config with it} of "key=value,value ..."; {"": config} of "".

    `key` is a dotted key of the config, or the last part of one.

    Raises:
        UsageError: no such key, or one that several sections have; a value of another type; no values.
    """
    if not sweep:
        return {"": config}
    key, _, values = sweep.partition("=")
    flat = configs.flatten(config)
    named = [key] if key in flat else [name for name in flat if name.rpartition(".")[2] == key]
    if len(named) != 1:
        configs.refuse_unknown(config, key) if not named else None
        named = named or [name for name in flat if name.startswith(f"{key}.")]
        raise UsageError(f"--sweep takes one key of the config. Received: {key}, which may be {', '.join(named)}.")
    if isinstance(flat[named[0]], tuple):
        raise UsageError(f"--sweep takes a key of one number or word. Received: {named[0]}, which is a row of them.")
    kind, texts = type(flat[named[0]]), [text for text in values.split(",") if text]
    try:
        typed = {text: {"true": True, "false": False}[text.lower()] if kind is bool else kind(text) for text in texts}
    except (ValueError, KeyError):
        typed = {}
    if not typed:
        raise UsageError("--sweep takes key=value,value, the values as the recipe has them, such as "
                         f"{flat[named[0]]!r}. Received: {sweep}.")
    return {text: configs.override(config, **{named[0]: value}) for text, value in typed.items()}


def _measurable(config):
    """The config as it is trained, with ImageNet's number of images, and a small batch as one group of BatchNorm."""
    counts = {f"method.{count}": IMAGES for count in ("bank_size", "num_images") if config.method.get(count) == 0}
    if config.bn_group_size > config.batch_size:
        counts["bn_group_size"] = 0
    return configs.override(config, **counts)


def _cases(config, steps, vs, strategy, on_gpu):
    cases = {OURS: (training_step, dict(config=configs.to_json(config), strategy=strategy, steps=steps))}
    if vs:
        settings = torch_settings(config, "cuda" if on_gpu else "cpu")
        if strategy.get("cpu_replicas", 0) > 1:
            raise UsageError(f"--vs=torch has one replica. Received: cpu_replicas {strategy['cpu_replicas']}.")
        if importlib.util.find_spec("torch") is None:
            raise UsageError("--vs=torch needs PyTorch: pip install 'moco_tf[torch]'.")
        from moco_tf.bench import torch_step
        cases[THEIRS] = (torch_step.training_step, dict(settings=settings, steps=steps))
    return cases


def torch_settings(config, device="cpu"):
    """What `torch_step.training_step` takes for the same step.

    Raises:
        UsageError: the config asks for something that the equivalent does not have.
    """
    method, backbone, head, optimizer = config.method, config.backbone, config.head, config.optimizer
    group = config.bn_group_size or config.batch_size
    equivalent = {
        "method.name moco": method.name == "moco" and not config.branches,
        "method.loss softmax": method.get("loss", "softmax") == "softmax",
        "method.symmetric False": not method.get("symmetric", False),
        "mixture.name none": config.mixture.name == "none",
        "data.channels 3": config.data.channels == 3 and not backbone.get("stem_channels"),
        "backbone.name resnet without groups": backbone.name == "resnet" and (
            backbone.get("groups", 1), backbone.get("width_per_group", 64)) == (1, 64),
        "head.name linear or mlp": head.name in ("linear", "mlp"),
        "optimizer.name sgd": optimizer.name == "sgd" and not optimizer.get("nesterov", False),
        "optimizer.clip_norm 0": not optimizer.clip_norm,
        "precision float32 or bfloat16": config.precision in ("float32", "bfloat16"),
        "bn_group_size 0 or batch_size": group == config.batch_size}
    lacking = [need for need, met in equivalent.items() if not met]
    if lacking:
        raise UsageError(f"--vs=torch has a step for {', '.join(equivalent)}. Received: other than "
                         f"{'; '.join(lacking)}.")
    depth, width = backbone.get("depth", 50), backbone.get("width", 1)
    features = round(64 * width * 8) * (4 if depth >= 50 else 1)
    hidden = head.get("hidden_dim", None) or features
    hidden = () if head.name == "linear" else hidden if isinstance(hidden, tuple) else (hidden,)
    return dict(encoder=dict(depth=depth, width=width, stem=backbone.get("stem", "imagenet"), hidden=hidden,
                             dim=head.dim),
                moco=dict(dim=head.dim, queue_size=method.queue_size, temperature=method.temperature,
                          momentum=method.momentum),
                optimizer=dict(lr=learning_rate(config), momentum=optimizer.get("momentum", 0.9),
                               weight_decay=optimizer.get("weight_decay", 0.0)),
                batch_size=config.batch_size, size=config.views.get("size", 224), device=device, precision=config.precision,
                threads=config.intra_op_threads or os.cpu_count())


# ---------------------------------------------------------------------------------------------- what was found

def _result(ours, theirs, config):
    """Of one config: medians over the rounds, and for each part those of its share of the same round's step.

    On a CPU shares, and what is compared with the peak, are of CPU time, which holds up when the machine is shared.
    """
    clock = "cpu_s" if ours.facts["device"] == "CPU" else "wall_s"

    def median(of_round):
        return statistics.median(map(of_round, ours.rounds))

    def each(turn, clock=clock):
        return getattr(turn, clock) / turn.units

    parts = {name: {"wall_ms": median(lambda turn: 1e3 * each(turn.parts[name], "wall_s")),
                    "cpu_ms": median(lambda turn: 1e3 * each(turn.parts[name], "cpu_s")),
                    "share": median(lambda turn: each(turn.parts[name]) / each(turn))}
             for name in ours.rounds[0].parts}
    if "EMA" in parts:    # a method updates the momentum encoder where it makes the keys
        for value in parts["keys"]:
            parts["keys"][value] -= parts["EMA"][value]
    operations, kinds = 2 * ours.facts["multiply_adds"], collections.Counter()
    of_product = 2 * ours.facts["product_side"] ** 3 * ours.facts["devices"]
    for turn in ours.rounds:
        kinds.update({kind: 1e3 * seconds / len(ours.rounds) for kind, seconds in turn.operations.items()})
    result = {
        **ours.summary(), "batch_size": config.batch_size, "size": config.views.get("size", 224),
        "precision": config.precision, "bn_group_size": config.bn_group_size, "spread_ms": ours.spread(),
        "images_per_s": 1e3 * config.batch_size / ours.wall_ms, "clock": clock, "parts": parts,
        "explained": median(lambda turn: sum(
            each(part) for name, part in turn.parts.items() if name != "EMA") / each(turn)),
        "operations": operations, "operations_per_s": median(lambda turn: operations / each(turn)),
        "peak_per_s": median(lambda turn: of_product / each(turn.product)),
        "share_of_peak": median(lambda turn: operations / each(turn) * each(turn.product) / of_product),
        "outside_products": median(lambda turn: share_outside_products(turn.operations)) if kinds else None,
        "operations_ms": dict(kinds.most_common())}
    if theirs:
        result["torch"] = {
            **theirs.summary(), "spread_ms": theirs.spread(), "times_ours": ratio(theirs, ours),
            "cpu_times_ours": ratio(theirs, ours, "cpu_s"),
            "times_ours_rounds": [a / b for a, b in zip(theirs.of_units("wall_s"), ours.of_units("wall_s"))]}
    return result


def format_result(value, result):
    (low, high), on_cpu = result["spread_ms"], result["device"] == "CPU"
    lines = [f"{f'{value}: ' if value else ''}batch {result['batch_size']}, {result['size']} px, "
             f"{result['precision']}, {result['replicas']} replica(s) on {result['device']}, "
             f"{result['parameters'] / 1e6:.1f} M parameters",
             f"step {result['wall_ms']:.1f} ms (rounds {low:.1f} to {high:.1f}), {result['images_per_s']:.1f} "
             f"images/s; CPU {result['cpu_ms']:.0f} ms; memory {result['step_peak_mib']:.0f} MiB; first call "
             f"{result['first_call_s']:.1f} s",
             f"{result['operations'] / 1e9:.1f} G operations (2 for each multiply-add of a convolution or a matrix "
             f"product, forwards and backwards), {result['operations_per_s'] / 1e9:.0f} "
             f"G/s{' of a core' if on_cpu else ''}: "
             f"{result['share_of_peak']:.0%} of the {result['peak_per_s'] / 1e9:.0f} G/s of a product of matrices of "
             f"{result['product_side']} rows"]
    if result["outside_products"] is not None:
        total = sum(result["operations_ms"].values())
        others = [(kind, ms) for kind, ms in result["operations_ms"].items() if not PRODUCT.search(kind)][:6]
        lines.append("outside of convolutions and matrix products: "
                     f"{result['outside_products']:.1%} of the operations' time; "
                     + ", ".join(f"{kind} {ms / total:.1%}" for kind, ms in others))
    lines.append(f"{'part, alone':26} {'ms':>9} {'CPU ms':>9} {'of the step' + on_cpu * ', CPU':>17}")
    lines += [f"{name:26} {part['wall_ms']:9.2f} {part['cpu_ms']:9.2f} {part['share']:17.1%}"
              for name, part in result["parts"].items()]
    lines.append(f"{'not explained':26} {'':19} {1 - result['explained']:17.1%}")
    if "torch" in result:
        theirs = result["torch"]
        low, high = theirs["spread_ms"]
        lines.append(f"PyTorch {theirs['version']}: {theirs['wall_ms']:.1f} ms (rounds {low:.1f} to {high:.1f}), CPU "
                     f"{theirs['cpu_ms']:.0f} ms, memory {theirs['step_peak_mib']:.0f} MiB; {theirs['times_ours']:.2f} "
                     f"times our time, {theirs['cpu_times_ours']:.2f} times our CPU time (medians of the rounds' "
                     "ratios)")
        if theirs["outside_products"] is not None:
            lines.append(f"PyTorch outside of convolutions and matrix products: {theirs['outside_products']:.1%}")
    return "\n".join(lines)


def format_sweep(report):
    names = list(next(iter(report["results"].values()))["parts"])
    vs = "torch" in next(iter(report["results"].values()))
    lines = [f"{report['sweep']:>12} {'ms':>9} {'CPU ms':>9} {'images/s':>9} {'MiB':>7}"
             + "".join(f" {name[:9]:>9}" for name in names) + (f" {'PyTorch/ours':>13}" if vs else "")]
    for value, result in report["results"].items():
        lines.append(f"{value:>12} {result['wall_ms']:9.1f} {result['cpu_ms']:9.1f} {result['images_per_s']:9.1f} "
                     f"{result['step_peak_mib']:7.0f}"
                     + "".join(f" {result['parts'][name]['wall_ms']:9.2f}" for name in names)
                     + (f" {result['torch']['times_ours']:13.2f}" if vs else ""))
    return "\n".join(lines)


def _plot(path, report):
    try:
        from moco_tf.visualize.figures import png, step_times
    except UsageError as error:
        print(f"no plot: {error}")
        return
    results = report["results"]
    on_cpu = all(result["device"] == "CPU" for result in results.values())
    clock, unit = ("cpu_ms", "ms of CPU time") if on_cpu else ("wall_ms", "ms")
    parts = {value: {name: part[clock] for name, part in result["parts"].items()} for value, result in results.items()}
    wholes = {"whole step": {value: result[clock] for value, result in results.items()},
              "PyTorch's": {value: result["torch"][clock] for value, result in results.items() if "torch" in result}}
    wholes = {name: times for name, times in wholes.items() if times}
    write_file(path, png(step_times(parts, wholes, report["sweep"], unit)))
    print(path)
