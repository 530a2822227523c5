"""`moco-tf bench data`: a recipe's input pipeline, stage by stage, beside decoding alone and other libraries' ones.

A stage is what the run's own pipeline costs more with it than without. The figure to compare is CPU time, of all
threads and worker processes: other work on the machine changes it little, and the images in a second a lot.
"""

import functools
import json
import os

import tensorflow as tf

from moco_tf import config as configs
from moco_tf.bench import peers
from moco_tf.bench.timing import Measured, in_turns, ratio, settle, timed
from moco_tf.data.pipeline import Unreadable, training_batches
from moco_tf.data.sources import Black, Folder, Source, Subset, epoch_key, permutation
from moco_tf.data.tools import reason
from moco_tf.errors import DataError, UsageError
from moco_tf.files import write_file
from moco_tf.methods import METHODS
from moco_tf.train import image_mixture, input_recipe, normalized_in_input, open_data, versions, view_recipe
from moco_tf.views import ops
from moco_tf.views.recipes import Recipe, View

BATCH = 32          # images; larger batches are copied once more, as the pipeline joins them of parts
AHEAD = 8 + 2 * (os.cpu_count() or 1)    # batches ready when a round begins, at most: tf.data keeps some for each core
USABLE = 0.7        # of a host's cores: the runtime, the network and the system have the rest
OURS, READ, DECODE, BATCHED, CROP = "moco_tf", "read", "decode alone", "batches of nothing", "decode, crop, resize"
COLOURS = ("jitter", "grayscale", "solarize")
NOTABLE = 0.1       # share of a stage that it is worth to do something about
TOO_LARGE = 2.0     # shorter side of the files, in sides of the views, from which decoding reads much for nothing


def bench_data(config, images=512, rounds=5, vs=(), step_rates=(), json_file="", plot=""):
    """Measures the input pipeline of a config, prints what was found, and returns it.

    Args:
        config: complete, as from `moco_tf.config.load`.
        images: that a round goes over; drawn from the data, where they can be.
        rounds: turns of each case.
        vs: names of `peers.PEERS`, which load the same files, in turns with ours.
        step_rates: images/s of training steps that are to be fed.
        json_file, plot: files to write; "": none.

    Returns:
        The report, as written to `json_file`.

    Raises:
        UsageError: a peer that is not installed, or that cannot do the same; data that no peer reads.
        DataError: data that cannot be opened.
        MocoError: a case failed, perhaps for images that cannot be read.
    """
    if not config.views.get("size", 224):
        raise UsageError("The views need a size. Received: views.size 0, for the encoder's. Set it: --config.views.size=224.")
    cases = {OURS: (ours, dict(config=configs.to_json(config), images=images))}
    source = sample(open_data(config)[0], images)
    if vs:
        arguments = dict(files=files_of(source), batch_size=BATCH, batches=-(-images // BATCH), workers=os.cpu_count(),
                         **peers.arguments(vs, config))
        cases.update({name: (peers.PEERS[name], arguments) for name in vs})
    load = os.getloadavg()[0]
    print(f"setting up {', '.join(cases)}; then {rounds} rounds of {images} images", flush=True)
    measured = in_turns(cases, rounds)
    together = measured.pop(OURS)
    cases = {name: Measured({}, together.setup_s, [turn[name] for turn in together.rounds], together.peak_mib)
             for name in together.rounds[0]}
    report = {"config": config.to_dict(), "cpus": os.cpu_count(), "load": [load, os.getloadavg()[0]], "rounds": rounds,
              "versions": versions(), "data": together.facts, **_results(cases, measured)}
    print(format_report(report))
    for rate in step_rates:
        print("\n".join(advice(report, rate)))
    if json_file:
        write_file(json_file, json.dumps(report, indent=1) + "\n")
    if plot:
        _plot(plot, report)
    return report


def _results(cases, others):
    whole = cases[list(cases)[-1]]
    limit = cases[DECODE]
    return {
        "cpu_ms": whole.cpu_ms, "images_per_s": 1e3 / whole.wall_ms, "spread_cpu_ms": whole.spread("cpu_s"),
        "stages": stages_of({name: case.cpu_ms for name, case in cases.items()}),
        "of_limit": ratio(limit, whole, "cpu_s"),
        "host_ms": cases[CROP].cpu_ms,
        "cases": {name: case.summary() for name, case in cases.items()},
        "peers": {name: {**case.summary(), "images_per_s": 1e3 / case.wall_ms,
                         "times_ours": ratio(case, whole, "cpu_s"), "times_ours_wall": ratio(case, whole),
                         "times_host": ratio(case, cases[CROP], "cpu_s")}
                  for name, case in others.items()}}


def stages_of(cpu_ms):
    """{stage: CPU ms of an image} from those of the cases, each the one before it with a stage more; the sum is that of
    the last case. What noise makes negative stays so."""
    names = [name for name in cpu_ms if name not in (READ, DECODE, BATCHED)]
    stages = {READ: cpu_ms[READ], CROP: cpu_ms[CROP] - cpu_ms[READ] - cpu_ms[BATCHED]}
    stages.update({name: cpu_ms[name] - cpu_ms[before] for before, name in zip(names, names[1:])})
    return {**stages, "order and batch": cpu_ms[BATCHED]}


# ---------------------------------------------------------------------------------------------- pipelines

def ours(config, images):
    """A case for `timing.in_turns`, of all `pipelines` in one process: its rounds are {name: Round}."""
    config = configs.from_json(config)
    source = sample(open_data(config)[0], images)
    unreadable = Unreadable(source, config.data.max_unreadable)
    batch_size = min(BATCH, source.size)
    batches = -(-images // batch_size)

    def draw(iterator, count):
        for _ in range(count):
            next(iterator)

    try:
        running = {name: iter(built) for name, built in pipelines(config, source, batch_size, unreadable).items()}
        for iterator in reversed(running.values()):    # the whole first: it says what is wrong with the images
            next(iterator)
        yield {"source": config.data.name, "images": source.size, **looks_of(source)}
        while True:
            rounds = {}
            for name, iterator in running.items():
                settle()
                draw(iterator, AHEAD)
                rounds[name] = timed(functools.partial(draw, iterator, batches), batches * batch_size)
            yield rounds
    except tf.errors.OpError as error:
        raise unreadable.over_limit() or DataError(
            f"The images must be readable. Received: {reason(error)}. `moco-tf data check` looks at all.") from None


def pipelines(config, source, batch_size, unreadable=None):
    """{name: batches without end}: of bytes, of decoded images, of nothing; then the recipe's, from its crop alone to
    all of its stages, each with one more than the one before it."""
    recipe, mixture = view_recipe(config), image_mixture(config)

    def draw(source, recipe, mixture=None):
        return training_batches(
            source, recipe, batch_size, max(1, source.size // batch_size), config.seed, mixture=mixture,
            shuffle=config.shuffle_bn == "input", repeats=config.data.repeats, workers=config.data.workers,
            unreadable=unreadable)

    def each(stage):
        examples = source.examples(config.seed, 0).repeat().map(stage, config.data.workers or tf.data.AUTOTUNE)
        batches = examples.ignore_errors().batch(batch_size, drop_remainder=True).prefetch(2)
        options = tf.data.Options()
        options.experimental_optimization.inject_prefetch = False    # as in `training_batches`
        return batches.with_options(options)

    def read(example):
        return tf.strings.length(source.encoded(example)) if stores_bytes(source) else source.index_of(example)

    names = stage_names(recipe)
    built = {READ: each(read), DECODE: each(lambda example: source.image(example)[0, 0, 0]),
             BATCHED: draw(Black(source.size, source.channels), Blank(recipe)), CROP: draw(source, with_stages(recipe, ()))}
    drawn = input_recipe(config, recipe)
    if config.data.device_views:
        built[CROP] = draw(source, drawn)
    else:
        built.update({name: draw(source, with_stages(recipe, names[:count])) for count, name in enumerate(names, 1)})
    if normalized_in_input(config):
        built["normalize"] = draw(source, drawn)
    if mixture:
        built["mixture"] = draw(source, drawn, mixture)
    return built


def stage_names(recipe):
    """Of the stages of all its views, in order."""
    views = sorted(recipe.views.values(), key=lambda view: -len(view.stages))
    return list(dict.fromkeys(name_of(stage) for view in views for stage in view.stages))


def name_of(stage):
    """What a table calls it: the colour stages are one, as XLA computes neighbours together."""
    name = getattr(stage, "name", "augment")
    return "colour" if name in COLOURS else name


def with_stages(recipe, names):
    """The recipe without the stages of other names."""
    def cut(view):
        stages = [stage for stage in view.stages if name_of(stage) in names]
        return View(view.size, view.crop, stages, view.interpolation)

    return _with_views(recipe, cut)


def _with_views(recipe, change):
    changed = {view: change(view) for view in set(recipe.views.values())}
    return Recipe({name: changed[view] for name, view in recipe.views.items()}, recipe.mean, recipe.std, recipe.xla,
                  recipe.space, recipe.channels)


class Blank(Recipe):
    """As many views as another recipe's, which are black and cost nothing."""

    def __init__(self, recipe):
        nothing = ops.Crop(1, None)
        views = {name: View(view.size, nothing) for name, view in recipe.views.items()}
        super().__init__(views, xla=recipe.xla, channels=recipe.channels, cropped=True)

    def crop(self, image, numbers):
        return {name: tf.zeros([view.size, image.shape[-1], view.size], tf.uint8) for name, view in self.views.items()}


# ---------------------------------------------------------------------------------------------- data

def sample(source, images):
    """So many images of a source, drawn by their number alone; all, where there are no more, and of a stream."""
    if not source.random_access or images >= source.size:
        return source
    with tf.device("CPU:0"):
        return Subset(source, permutation(source.size, epoch_key(0, 0))[:images].numpy())


def whole(source):
    """The source that a part is of, or itself."""
    return whole(source.source) if isinstance(source, Subset) else source


def stores_bytes(source):
    """Whether the images are decoded from files or records, and not stored as they are."""
    return type(whole(source)).image is Source.image


def files_of(source):
    """The paths of a folder's images.

    Raises:
        UsageError: another source, or one that is not local.
    """
    if not isinstance(whole(source), Folder) or "://" in whole(source).root:
        raise UsageError("--vs needs a local folder of images, which other libraries read as well. Received: the data "
                         f"source {type(whole(source)).__name__.lower()}. Set data.name=folder and data.path.")
    return [source.describe(index) for index in range(source.size)]


def looks_of(source, count=64):
    """Mean height, width and bytes of some images."""
    def look(example):
        size = tf.strings.length(source.encoded(example)) if stores_bytes(source) else 0
        return tf.concat([tf.shape(source.image(example))[:2], [size]], 0)

    looked = list(source.examples(0, 0).map(look).ignore_errors().take(count).as_numpy_iterator())
    return {name: float(sum(column) / len(looked)) for name, column in zip(("height", "width", "bytes"), zip(*looked))}


# ---------------------------------------------------------------------------------------------- what it says

def format_report(report):
    """The report as text for the terminal."""
    views, data, total = report["config"]["views"], report["data"], report["cpu_ms"]
    low, high = report["spread_cpu_ms"]
    size = f", {data['bytes'] / 1e3:.0f} kB" if data["bytes"] else ""
    lines = [f"{views['name']} at {views.get('size', 'its')} px from {data['images']} images of {data['width']:.0f} x "
             f"{data['height']:.0f} pixels{size} on average; {report['cpus']} cores, load {report['load'][0]:.1f} "
             f"before, {report['load'][1]:.1f} after; medians of {report['rounds']} rounds in turns",
             f"{'stage':22} {'CPU ms/image':>13} {'share':>7}"]
    lines += [f"{name:22} {ms:13.2f} {ms / total:7.1%}" for name, ms in report["stages"].items()]
    lines += [f"{'all':22} {total:13.2f} {'':7} ({low:.2f} to {high:.2f})", "",
              f"{'pipeline':22} {'CPU ms/image':>13} {'a core':>10} {'here':>8}   images/s"]
    lines += [_pipeline_line(name, report["cases"][case]["cpu_ms"], 1e3 / report["cases"][case]["wall_ms"], note)
              for name, case, note in ((DECODE, DECODE, "the limit"),
                                       (CROP, CROP, "left to the host by data.device_views"),
                                       (OURS, list(report["cases"])[-1], f"{report['of_limit']:.0%} of the limit"))]
    lines += [_pipeline_line(name, peer["cpu_ms"], peer["images_per_s"],
                             f"{peer['times_ours']:.1f} times our CPU time, {peer['times_ours_wall']:.1f} times our "
                             f"time; {peer['made by']}, {peer['workers']} workers")
              for name, peer in report["peers"].items()]
    return "\n".join(lines)


def _pipeline_line(name, cpu_ms, images_per_s, note):
    return f"{name:22} {cpu_ms:13.2f} {1e3 / cpu_ms:10.0f} {images_per_s:8.0f}   {note}"


def advice(report, rate):
    """Whether this host feeds a step of so many images/s, and what helps where it does not; lines."""
    config, data, stages = report["config"], report["data"], report["stages"]

    def cores(cpu_ms):
        return rate * cpu_ms / 1e3 / USABLE

    needed, here = cores(report["cpu_ms"]), report["cpus"]
    line = (f"a step of {rate:g} images/s takes {needed:.1f} cores ({USABLE:.0%} of them for this); here are {here}, "
            f"which make {1e3 * here * USABLE / report['cpu_ms']:.0f} images/s")
    if needed <= here:
        return [f"{line}: the data keep up"]
    lines = [f"{line}: the step waits. {-(-needed // here):.0f} such hosts feed it, or:"]
    if (config["method"]["name"] in METHODS and not config["data"]["device_views"]
            and config["data"]["normalize"] == "step" and config["mixture"]["name"] in ("none", "unmix")):
        lines.append("  --config.data.device_views=True: colours and blur in the step; "
                     f"{cores(report['host_ms']):.1f} cores")
    size = config["views"].get("size", 224)
    if data["bytes"] and min(data["height"], data["width"]) > TOO_LARGE * size:
        lines.append(f"  smaller files: these are of {data['width']:.0f} x {data['height']:.0f} pixels; about "
                     f"{8 * size // 7} on the shorter side are enough")
    if stages[READ] > NOTABLE * report["cpu_ms"] and config["data"]["name"] == "folder":
        lines.append("  moco-tf data pack: records are read in long runs, small files one by one")
    if config["data"]["normalize"] == "input" and config["mixture"]["name"] == "none":
        lines.append("  --config.data.normalize=step: a quarter of the bytes leave the host")
    return [*lines, f"  moco-tf data serve: {needed - here:.0f} cores on other machines (docs/hosts.md)"]


def _plot(path, report):
    try:
        from moco_tf.visualize.figures import pipeline_times, png
    except UsageError as error:
        print(f"no plot: {error}")
        return
    bars = {OURS: report["stages"], **{name: {name: peer["cpu_ms"]} for name, peer in report["peers"].items()}}
    views = report["config"]["views"]
    title = f"{views['name']}, {views.get('size')} px"
    write_file(path, png(pipeline_times(bars, report["cases"][DECODE]["cpu_ms"], title)))
    print(path)
