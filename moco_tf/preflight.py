"""TPU preflight: what the real TPU compiler makes of a recipe's training step, without a TPU.

Three steps. The method's own `train_step` is lowered to HLO as one replica of R, here, with a custom call for each
thing that the replicas exchange; the calls are rewritten to real collectives; and jax with libtpu, in an environment of
their own (their numpy excludes TensorFlow's), compiles the program for a slice (tpu_scripts/preflight_compile.py).
"""

import dataclasses
import datetime
import gzip
import hashlib
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

import tensorflow as tf
from absl import flags
from tensorflow.compiler.tf2xla.ops import gen_xla_ops
from tensorflow.compiler.xla import xla_data_pb2
from tensorflow.compiler.xla.service import hlo_pb2

from moco_tf import cli
from moco_tf import config as configs
from moco_tf.data.pipeline import training_batches
from moco_tf.data.sources import Black
from moco_tf.distribute import ReplicaOfMany
from moco_tf.errors import UsageError
from moco_tf.files import write_file
from moco_tf.train import (bn_group, build_method, check, image_mixture, input_recipe, normalizer, set_precision,
                           versions, view_names, view_recipe)

REQUIREMENTS = ("jax==0.10.2", "jaxlib==0.10.2", "libtpu==0.0.52")    # tried together
COMPILER = pathlib.Path(__file__).resolve().parents[1] / "tpu_scripts" / "preflight_compile.py"
HOME = "~/.cache/moco_tf/preflight"
IMAGENET = 1281167
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all")    # that a step asks for; the compiler may choose others
# "%name = RESULT kind(" in a compiled program: a plain collective, or the end of one that runs beside other work.
COLLECTIVE = re.compile(r"^\s*(?:ROOT )?%?\S+ = (.*?) "
                        r"(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-done)?\((.*)$", re.M)
# One that is spread over several fusions stands in each of them, with the same name in its metadata.
SPREAD = re.compile(r'chain_id=.*op_name="([^"]*)"')
ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\](?:\{([^}]*)\})?")    # the layout last: S(...) is not HBM
COMPUTATION = re.compile(r"^(ENTRY )?%?(\S+) \([^\n]*\{\n(.*?)^\}", re.M | re.S)
INSTRUCTION = re.compile(r"^ +(ROOT )?%(\S+) = (.*?) ([a-z][\w-]*)\((.*?)\)(.*)$", re.M)
CALLED = re.compile(r"\b(?:calls|body|to_apply|(?:branch|true|false)_computations?)=\{?(%[^\s,}]+(?:, %[^\s,}]+)*)")
WITHOUT_TRAFFIC = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all")
CUTS = ("slice", "dynamic-slice", "gather")                 # read as much as they give
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}         # in place; write as much as this operand has


@dataclasses.dataclass(frozen=True)
class Chip:
    """Bytes of HBM, bfloat16 operations a second and bytes a second from and to HBM, all at the most."""

    memory: float
    flops: float
    bandwidth: float


# Google's pages "TPU v3" to "TPU v6e" (docs.cloud.google.com/tpu/docs/v3 and so on, read in November 2026), which for
# v2 point to "A Domain-Specific Supercomputer for Training Deep Neural Networks" (doi 10.1145/3360307).
CHIPS = {"v2": Chip(16 * 2 ** 30, 46e12, 700e9), "v3": Chip(32 * 2 ** 30, 123e12, 900e9),
         "v4": Chip(32 * 2 ** 30, 275e12, 1200e9), "v5e": Chip(16e9, 197e12, 819e9),
         "v5p": Chip(95e9, 459e12, 2765e9), "v6e": Chip(32e9, 918e12, 1638e9)}


# ---------------------------------------------------------------------------------------------- a step as HLO

def lower(config, replicas, images=IMAGENET):
    """The training step of a config as one of `replicas` runs it: serialized HLO, with the collectives.

    Args:
        config: complete, as from `moco_tf.config.load`.
        replicas: that share the batch.
        images: in the training data, for a memory bank.

    Raises:
        UsageError: a config that cannot be trained so, or a step that XLA cannot compile; the message has its reason.
    """
    config = configs.override(config, jit_compile=False, **{
        f"method.{count}": images for count in ("bank_size", "num_images") if config.method.get(count) == 0})
    check(config, max(images, config.batch_size), replicas, view_names(config))
    set_precision(config.precision)
    recipe, strategy = view_recipe(config), ReplicaOfMany(replicas, _stand_in)
    with strategy.scope():
        method = build_method(config, steps_per_epoch=images // config.batch_size or 1,
                              normalize_views=normalizer(recipe))
    # The views of any source have the shapes of these.
    views = training_batches(Black(max(images, config.batch_size), config.data.channels), input_recipe(config, recipe),
                             config.batch_size, steps_per_epoch=1, seed=0, shuffle=config.shuffle_bn == "input",
                             bn_group_size=bn_group(config, replicas), repeats=config.data.repeats,
                             mixture=image_mixture(config), replicas=replicas).element_spec

    @tf.function(jit_compile=True)
    def step(replica, *values):
        return strategy.trace(method.train_step, replica, dict(zip(views, values)))

    try:
        lowered = step.experimental_get_compiler_ir(tf.TensorSpec([], tf.int32), *views.values())
        module = hlo_pb2.HloModuleProto.FromString(lowered(stage="hlo_serialized"))
    except (ValueError, tf.errors.OpError) as error:
        raise UsageError(f"The step must be one that XLA compiles. Received: {_reason(error)}.") from None
    rewrite(module, replicas)
    return module.SerializeToString(deterministic=True)


def _stand_in(kind, value, shape):
    # TensorFlow's XLA for CPUs has no kernels for collectives, but lowers any custom call.
    return gen_xla_ops.xla_custom_call_v2(
        operands=[value], call_target_name=kind, backend_config="", has_side_effect=False,
        result_dtypes=[value.dtype], result_shapes=[tf.TensorShape(shape)])[0]


def rewrite(module, replicas):
    """Turns the custom calls of an HloModuleProto into collectives over all replicas, in place.

    Where a line came from and what a function was called, which differ from one process to the next, go too.
    """
    module.ClearField("id")
    sums = {}
    for computation in module.computations:
        computation.name = f"computation.{computation.id}"
        if computation.id == module.entry_computation_id:
            module.name = module.entry_computation_name = computation.name
        for instruction in computation.instructions:
            instruction.ClearField("metadata")
            if instruction.opcode == "copy":    # which the importer of the second environment does not know
                instruction.opcode = "reshape"
            if instruction.custom_call_target in COLLECTIVES:
                instruction.opcode = instruction.custom_call_target
                for field in ("custom_call_target", "custom_call_api_version", "constrain_layout",
                              "operand_shapes_with_layout"):
                    instruction.ClearField(field)
                instruction.replica_groups.add(replica_ids=range(replicas))
                if instruction.opcode == "all-reduce":
                    kind = instruction.shape.element_type
                    sums[kind] = sums.get(kind) or _sum_computation(module, kind, len(sums))
                    instruction.called_computation_ids.append(sums[kind].id)
                else:
                    instruction.dimensions.append(0)
    others = list(module.computations)
    del module.computations[:]
    module.computations.extend([*sums.values(), *others])    # a called computation stands before its caller


def _sum_computation(module, element_type, made):
    """(x, y) -> x + y on scalars, with ids that `module`, and the `made` computations before this one, do not have."""
    first = max(i.id for c in module.computations for i in c.instructions) + 1 + 3 * made
    number = max(c.id for c in module.computations) + 1 + made
    computation = hlo_pb2.HloComputationProto(name=f"sum.{number}", id=number, root_id=first + 2)
    scalar = xla_data_pb2.ShapeProto(element_type=element_type)
    scalar.layout.SetInParent()
    for place, name in enumerate("xy"):
        computation.instructions.add(name=f"{name}.{first + place}", opcode="parameter", parameter_number=place,
                                     shape=scalar, id=first + place)
        computation.program_shape.parameters.add().CopyFrom(scalar)
        computation.program_shape.parameter_names.append(name)
    computation.instructions.add(name=f"add.{first + 2}", opcode="add", shape=scalar, id=first + 2,
                                 operand_ids=[first, first + 1])
    computation.program_shape.result.CopyFrom(scalar)
    return computation


# ---------------------------------------------------------------------------------------------- the second environment

def make_environment(folder, say):
    """The Python of a virtual environment with REQUIREMENTS in `folder`, which is made where it is not there yet.

    Raises:
        UsageError: no Python that jax takes, or the packages cannot be installed.
    """
    folder = pathlib.Path(folder).expanduser()
    python, finished = folder / "bin" / "python", folder / "requirements.txt"
    wanted = "\n".join(REQUIREMENTS)
    if finished.is_file() and finished.read_text() == wanted:
        return python
    candidates = [sys.executable, *(f"python3.{minor}" for minor in (13, 12, 11))]
    base = next((path for path in map(shutil.which, candidates) if path and _version_of(path) >= (3, 11)), None)
    if not base:
        raise UsageError("The TPU compiler's environment needs Python 3.11 or newer. Received: none on the PATH. "
                         "Install one beside this Python, such as python3.11.")
    say(f"making the TPU compiler's environment in {folder}: {', '.join(REQUIREMENTS)}, about 1.1 GB")
    for command in ([base, "-m", "venv", "--clear", folder],
                    [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *REQUIREMENTS]):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise UsageError(f"The TPU compiler's environment must install. Received: {_last_line(done.stdout)}. Try "
                             f"by hand: {' '.join(map(str, command))}")
    finished.write_text(wanted)
    return python


def _version_of(python):
    said = subprocess.run([python, "-c", "import sys; print(*sys.version_info[:2])"], capture_output=True, text=True)
    return tuple(map(int, said.stdout.split())) if said.returncode == 0 else (0, 0)


def ask_compiler(python, topology, hlo=None, cache=None, say=print):
    """What tpu_scripts/preflight_compile.py reports of a topology, or of a program compiled for it.

    Args:
        python: of the second environment.
        topology: such as "v5e:4x8".
        hlo: the serialized program; None: only the topology is looked at.
        cache: folder where the reports of programs are kept, and the compiled programs.
        say: hears a line every half minute.
    """
    asked = "\n".join([topology, *REQUIREMENTS]).encode() + COMPILER.read_bytes() + (hlo or b"")
    kept = pathlib.Path(cache, f"{hashlib.sha256(asked).hexdigest()[:32]}.json") if cache and hlo else None
    text = kept and kept.with_suffix(".txt.gz")
    if kept and text.is_file():
        return _with_program(dict(json.loads(kept.read_text()), reused=True), gzip.decompress(text.read_bytes()))
    began = time.time()
    with tempfile.TemporaryDirectory() as folder:
        out, log, program, result = (pathlib.Path(folder, name) for name in ("out.json", "log", "step.hlo", "out.txt"))
        program.write_bytes(hlo or b"")
        with open(log, "w") as file:
            process = subprocess.Popen([python, COMPILER, topology, out, *([program, result] if hlo else [])],
                                       stdout=file, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    say(f"compiling for {topology}: {time.time() - began:.0f} s")
        finally:
            process.kill()
        if not out.is_file():
            raise UsageError(f"The TPU compiler must finish. Received: exit code {process.returncode}, "
                             f"{_last_line(log.read_text())}. Exit code -9 means that memory ran out.")
        report = json.loads(out.read_text())
        compiled = result.read_bytes() if result.is_file() else b""
    report["compile_seconds"] = round(time.time() - began, 1)
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_file(str(kept), json.dumps(report))
        write_file(str(text), gzip.compress(compiled))    # last: where it is, the report is
    return _with_program(report, compiled)


def _with_program(report, compiled):
    text = compiled.decode()
    if text:
        return {**report, "collectives": collectives(text), "hbm_bytes": hbm_bytes(text)}
    if "memory" in report:    # it was compiled, and then could not be printed: libtpu's fault, seen on v5p and v6e
        return {"unprinted" if key == "error" else key: value for key, value in report.items()}
    return report


# ---------------------------------------------------------------------------------------------- a compiled program

def collectives(text):
    """The collectives of a compiled program, in order: kind, and shapes and bytes of their results.

    Args:
        text: HLO, as XLA prints it.
    """
    found, seen = [], set()
    for result, kind, rest in COLLECTIVE.findall(text):
        spread = SPREAD.search(rest)
        if spread and spread[1] in seen:
            continue
        seen.add(spread and spread[1])
        found.append({"kind": kind, "shapes": [f"{name}[{sizes}]" for name, _, sizes, _ in ARRAY.findall(result)],
                      "bytes": sum(size for size, _ in _arrays(result))})
    return found


def hbm_bytes(text):
    """Bytes that a compiled program reads from HBM and writes to it.

    Each operation counts the arrays that it reads and writes there, whole, and once; one that cuts a piece out of an
    array, or puts one in, the piece. What stays on the chip, within a fusion or between operations, counts nothing. Of
    the branches of a condition the one that moves most counts, the body of a loop once.

    Args:
        text: HLO, as XLA prints it.
    """
    return _Program(text).traffic()


def _arrays(text):
    """[(bytes, whether in HBM)] of the arrays that a shape consists of."""
    return [(int(bits or 8) * math.prod(int(size) for size in sizes.split(",") if size) // 8, "S(" not in layout)
            for _, bits, sizes, layout in ARRAY.findall(text)]


@dataclasses.dataclass(frozen=True)
class _Instruction:
    opcode: str
    arrays: list      # of the result: [(bytes, whether in HBM)]
    operands: list    # names; of a parameter its number
    called: list      # names of computations

    @property
    def size(self):
        return sum(size for size, _ in self.arrays)

    @property
    def in_hbm(self):
        return sum(size for size, here in self.arrays if here)


class _Program:
    def __init__(self, text):
        self.computations, self.roots = {}, {}    # {name: {name: instruction}}, {name: instruction}
        for entry, name, body in COMPUTATION.findall(text):
            self.computations[name] = {}
            for root, label, shape, opcode, operands, rest in INSTRUCTION.findall(body):
                called = ", ".join(CALLED.findall(rest))
                instruction = self.computations[name][label] = _Instruction(
                    opcode, _arrays(shape), re.findall(r"%([^\s,)]+)", operands) or [operands],
                    called.replace("%", "").split(", ") if called else [])
                if root:
                    self.roots[name] = instruction
            if entry:
                self.entry = name

    def traffic(self, name=None):
        body = self.computations[name or self.entry]
        return sum(self._of(instruction, body) for instruction in body.values())

    def _of(self, it, body):
        opcode, operands = it.opcode, it.operands
        if opcode.endswith("-start") or opcode in WITHOUT_TRAFFIC:
            return 0
        if opcode.endswith("-done"):    # what the start of its name has been given
            opcode, operands = opcode[:-len("-done")], body[operands[0]].operands
        if opcode in ("while", "call"):
            return self.traffic(it.called[0])
        if opcode == "conditional":
            return max(map(self.traffic, it.called))
        if opcode == "fusion":
            inner = self.computations[it.called[0]]
            return self._written(self.roots[it.called[0]], inner) + sum(
                min(given.in_hbm, self._needed(label, it.called[0]))
                for label, given in inner.items() if given.opcode == "parameter")
        given = [body[operand] for operand in operands if operand in body]
        if opcode in CUTS:
            return it.in_hbm + (it.size if given[0].in_hbm else 0) + sum(other.in_hbm for other in given[1:])
        if opcode in UPDATES:
            return self._written(it, body) + sum(other.in_hbm for other in given[1:])
        return it.in_hbm + sum(each.in_hbm for each in given)

    def _needed(self, label, name):
        """Bytes of an array that a fused computation uses."""
        body = self.computations[name]
        whole = body[label].size
        needed = whole if self.roots[name] is body[label] else 0
        for other, it in body.items():
            for place in [place for place, operand in enumerate(it.operands) if operand == label]:
                if it.opcode in CUTS and place == 0:
                    needed += it.size
                elif it.opcode in ("bitcast", "reshape", "transpose"):
                    needed += self._needed(other, name)
                elif it.opcode == "fusion":
                    inner = self.computations[it.called[0]]
                    needed += self._needed(next(label for label, given in inner.items() if given.opcode == "parameter"
                                                and given.operands == [str(place)]), it.called[0])
                elif it.opcode not in UPDATES or place > 0:
                    needed += whole
        return min(needed, whole)

    def _written(self, it, body):
        """Bytes of an instruction's result in HBM that are new."""
        if it.opcode == "tuple":
            return sum(self._written(body[operand], body) for operand in it.operands)
        if not it.in_hbm:
            return 0
        if it.opcode == "bitcast":
            return self._written(body[it.operands[0]], body)
        if it.opcode == "fusion":
            return self._written(self.roots[it.called[0]], self.computations[it.called[0]])
        return body[it.operands[UPDATES[it.opcode]]].size if it.opcode in UPDATES else it.in_hbm


# ---------------------------------------------------------------------------------------------- what it means

def preflight(config, topology, images=IMAGENET, home=HOME, environment=None, largest=False, say=print):
    """Compiles the training step of a config for a TPU slice, one replica on each core.

    Args:
        config: complete; `batch_size` is that of all cores.
        topology: generation and shape in chips: v2:2x2, v3:4x4, v4:2x2x1, v5e:4x8, v5p:2x2x2, v6e:8x8.
        images: in the training data, for a memory bank.
        home: folder for the reports of programs compiled before, and for the second environment.
        environment: folder of the second environment; None: in `home`.
        largest: also find the largest batch per core that fits, at some five to ten more compilations.
        say: hears what is going on, line by line.

    Returns:
        The report, which JSON can hold; with the key "error" where the step does not compile.

    Raises:
        UsageError: an unknown topology, or what `lower` and `make_environment` raise.
    """
    generation = topology.split(":")[0]
    if not re.fullmatch(rf"({'|'.join(CHIPS)}):\d+(x\d+){{1,2}}", topology):
        raise UsageError(f"--topology is one of {', '.join(CHIPS)} and the shape of the slice in chips, such as "
                         f"v5e:4x8 or v4:2x2x4. Received: {topology!r}.")
    home = pathlib.Path(home).expanduser()
    python = make_environment(environment or home / "environment", say)
    slice_ = ask_compiler(python, topology, say=say)
    if "error" in slice_:
        raise UsageError(f"--topology must be a slice that the TPU compiler knows. Received: {topology!r}: "
                         f"{_first_line(slice_['error'])}.")
    cores = slice_["cores"]

    def compiled(batch_size):
        sized = configs.override(config, batch_size=batch_size)
        say(f"lowering the step for {cores} replicas of {batch_size // cores} images")
        hlo = lower(sized, cores, images)
        say(f"compiling {len(hlo) / 1e6:.1f} MB of HLO for {topology}; ResNet-50 takes ten minutes of a core")
        return ask_compiler(python, topology, hlo, home / "reports", say)

    report = {
        "topology": topology, **{key: slice_[key] for key in ("cores", "chips", "hosts", "kind")},
        "batch_size": config.batch_size, "batch_per_core": config.batch_size // cores, "precision": config.precision,
        "method": config.method.name, "config_hash": configs.digest(config),
        "date": datetime.date.today().isoformat(),
        "versions": {**versions(), **dict(requirement.split("==") for requirement in REQUIREMENTS)}}
    report.update(interpreted(compiled(config.batch_size), CHIPS[generation], slice_, config.batch_size))
    if largest and out_of_memory(report.get("error", "RESOURCE_EXHAUSTED")):
        group = max(config.bn_group_size, 0) or 8

        def fits(groups):
            try:
                error = compiled(groups * group * cores).get("error")
            except UsageError as refused:    # no longer than the queue, say
                error = str(refused)
            say(f"{groups * group} images per core: {_first_line(error) if error else 'compiles'}")
            return not error

        likely = report["batch_per_core"]
        if "error" not in report:    # what the batch needs grows with it
            memory = report["memory"]
            likely *= 1 + (memory["capacity"] - memory["total"]) / memory["temporaries"]
        report["largest_batch_per_core"] = group * bisect(fits, max(1, int(likely) // group))
    return report


def interpreted(answer, chip, slice_, batch_size):
    """The compiler's answer and what follows from it, for one core.

    Args:
        answer: of `ask_compiler`, for a program.
        chip: a `Chip`.
        slice_: of `ask_compiler`, for the topology.
        batch_size: of all cores.
    """
    result = {key: answer[key] for key in ("compile_seconds", "reused", "unprinted") if key in answer}
    if "error" in answer:
        return {**result, "error": answer["error"]}
    cores, share = slice_["cores"], slice_["chips"] / slice_["cores"]    # of a chip that a core has
    memory = dict(answer["memory"])
    memory["total"] = sum(memory.values()) - 2 * memory["aliased"]    # outputs in the place of arguments count once
    memory["capacity"] = chip.memory * share
    seconds = {"arithmetic": answer["flops"] / (chip.flops * share)}
    if "hbm_bytes" in answer:
        seconds["memory"] = answer["hbm_bytes"] / (chip.bandwidth * share)
    fastest = max(seconds.values())
    moved = [dict(collective, sent=sent_per_core(collective["kind"], collective["bytes"], cores))
             for collective in answer.get("collectives", [])]
    return {**result, "memory": memory, "operations": answer["flops"], "hbm_bytes": answer.get("hbm_bytes"),
            "least_seconds": seconds, "bound": max(seconds, key=seconds.get),
            "most_images_per_s": {"core": batch_size / cores / fastest, "slice": batch_size / fastest},
            "collectives": moved}


def sent_per_core(kind, size, cores):
    """Bytes that a core sends, and receives, round a ring of all cores; `size`: bytes of the collective's result."""
    rounds = {"all-reduce": 2, "reduce-scatter": cores, "collective-permute": cores / (cores - 1) if cores > 1 else 1}
    return rounds.get(kind, 1) * (cores - 1) / cores * size


def out_of_memory(error):
    """Whether a compiler's error says that the program does not fit into a core's memory."""
    return "RESOURCE_EXHAUSTED" in error or "Ran out of memory" in error


def bisect(fits, start):
    """The largest positive integer that `fits`, which holds up to some number and then no more, or one that is less by
    a sixteenth of it at most; 0: none does.

    Steps away from `start`, which is near it, by an eighth and then by twice as much each time; halves what is left.
    """
    low, high = 0, None
    candidate, step = start, max(1, start // 8)
    while high is None or high - low > max(1, low // 16):
        if fits(candidate):
            low = candidate
        else:
            high = candidate
        if high is None:
            candidate = low + step
        elif low or high <= step:
            candidate = (low + high) // 2
        else:
            candidate = high - step
        step *= 2
    return low


# ---------------------------------------------------------------------------------------------- on screen

def table(name, report):
    """The report as a table in Markdown: what is of one core, but for the last column."""
    titles = ("recipe", "slice", "batch, per core", "memory, of GB", "operations", "HBM bytes",
              "least ms: arithmetic, memory", "all-reduce, all-gather MB", "most images/s: core, slice")
    if "error" in report:
        row = [_first_line(report["error"]), *[""] * (len(titles) - 4)]
    elif "unprinted" in report:
        memory, least, most = report["memory"], report["least_seconds"], report["most_images_per_s"]
        row = [f"{memory['total'] / 1e9:.2f}, {memory['capacity'] / 1e9:.1f}", f"{report['operations']:.3g}", "?",
               f"{1e3 * least['arithmetic']:.3g}, ?", "?", f"{most['core']:,.0f}, {most['slice']:,.0f}"]
    else:
        memory, least, most = report["memory"], report["least_seconds"], report["most_images_per_s"]
        moved = [sum(c["bytes"] for c in report["collectives"] if c["kind"] == kind) / 1e6
                 for kind in ("all-reduce", "all-gather")]
        row = [f"{memory['total'] / 1e9:.2f}, {memory['capacity'] / 1e9:.1f}", f"{report['operations']:.3g}",
               f"{report['hbm_bytes']:.3g}", f"{1e3 * least['arithmetic']:.3g}, {1e3 * least['memory']:.3g}",
               f"{moved[0]:.1f}, {moved[1]:.2f}", f"{most['core']:,.0f}, {most['slice']:,.0f}"]
    row = [f"`{name}` {report['precision']}", report["topology"],
           f"{report['batch_size']}, {report['batch_per_core']}", *row]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (titles, ["---"] * len(titles), row))


def text(name, report):
    """The report in words."""
    lines = [f"{name}, {report['precision']}, {report['batch_size']} images on {report['topology']} "
             f"({report['kind']}): {report['cores']} cores, {report['chips']} chips, {report['hosts']} host(s)"]
    lines += [f"does not compile: {_first_line(report['error'])}"] if "error" in report else _figures(report)
    if "largest_batch_per_core" in report:
        lines.append(f"  largest batch that compiles, to a sixteenth: {report['largest_batch_per_core']} per core, "
                     f"{report['largest_batch_per_core'] * report['cores']} on the slice")
    return "\n".join(lines)


def _figures(report):
    memory, least, most = report["memory"], report["least_seconds"], report["most_images_per_s"]
    lines = [
        f"per core, {report['batch_per_core']} images a step:",
        f"  memory      {memory['total'] / 1e9:.2f} of {memory['capacity'] / 1e9:.1f} GB: "
        + ", ".join(f"{name} {memory[name] / 1e9:.3f}" for name in ("arguments", "outputs", "temporaries", "code"))
        + f"; of the outputs {memory['aliased'] / 1e9:.3f} in place of arguments",
        f"  operations  {report['operations']:.3g}, at least {1e3 * least['arithmetic']:.3g} ms",
        "  HBM         " + (
            f"not known, nor the collectives: {_first_line(report['unprinted'])}" if "unprinted" in report else
            f"{report['hbm_bytes']:.3g} bytes, at least {1e3 * least['memory']:.3g} ms"),
        f"  so at most  {most['core']:,.0f} images/s, {most['slice']:,.0f} on the slice; the limit is "
        f"{'arithmetic' if report['bound'] == 'arithmetic' else 'memory traffic'}"]
    for kind in sorted({collective["kind"] for collective in report["collectives"]}):
        alike = [collective for collective in report["collectives"] if collective["kind"] == kind]
        largest = max((shape for collective in alike for shape in collective["shapes"]), key=_numbers)
        tensors, size, sent = (sum(values) for values in zip(*(
            (len(collective["shapes"]), collective["bytes"], collective["sent"]) for collective in alike)))
        lines.append(f"  {kind}  {len(alike)} of {tensors} tensor(s), the largest {largest}: {size / 1e6:.3g} MB, for "
                     f"which a core sends and receives {sent / 1e6:.3g} MB")
    return lines


def _numbers(shape):
    """How many numbers a tensor of a shape such as f32[4,8] has."""
    return math.prod(int(size) for size in re.findall(r"\d+", shape.split("[")[1]))


def _reason(error):
    """The line of a Python error that says why: below a traceback of user code the last one that names an error."""
    named = re.findall(r"^ *\w+Error: (.+)$", str(error), re.M)
    return _first_line(named[-1] if named else str(error))


def _first_line(message):
    return " ".join(message.strip().split("\n")[0].split())[:300] or "an error without a message"


def _last_line(message):
    return (message.strip().splitlines() or ["nothing was said"])[-1][:300]


def command(argv):
    """Compiles a recipe's training step with the real TPU compiler, without a TPU: memory, operations, bounds of speed.

    tpu_scripts/preflight --config=quickstart --topology=v5e:2x2 --batch_size=128
    tpu_scripts/preflight --config=moco_v2_r50 --topology=v5e:4x8 --batch_size=4096 --config.precision=bfloat16
    tpu_scripts/preflight --config=moco_v3_vit_small --topology=v4:2x2x4 --out=report.json --markdown --largest
    """
    values = cli._flags()
    flags.DEFINE_string("topology", None, "Generation and shape of the slice in chips: v2:2x2, v4:2x2x4, v5e:4x8, "
                        "v6e:8x8.", flag_values=values)
    flags.DEFINE_integer("batch_size", 0, "Of all cores; 0: the recipe's.", lower_bound=0, flag_values=values)
    flags.DEFINE_integer("images", IMAGENET, "In the training data, for a memory bank.", lower_bound=1,
                         flag_values=values)
    flags.DEFINE_string("env", None, "Folder of the TPU compiler's environment (default: in --home).",
                        flag_values=values)
    flags.DEFINE_string("home", HOME, "Folder for reports of programs compiled before.", flag_values=values)
    flags.DEFINE_string("out", None, "File for the report as JSON.", flag_values=values)
    flags.DEFINE_bool("markdown", False, "Prints the report as a table.", flag_values=values)
    flags.DEFINE_bool("largest", False, "Also finds the largest batch per core that fits; some five to ten more "
                      "compilations.", flag_values=values)
    config, _ = cli._parse(argv, values, config=True, required=("config", "topology"))
    if "backbone" not in config:
        raise UsageError(f"preflight takes a recipe of a pre-training. Received: {values.config}.")
    if values.out and not os.path.isdir(os.path.dirname(values.out) or "."):
        raise UsageError(f"--out must be a file in a folder that there is. Received: {values.out}.")
    if values.batch_size:
        config = configs.override(config, batch_size=values.batch_size)
    tf.config.set_visible_devices([], "GPU")    # the program is lowered for one CPU device
    name = os.path.splitext(os.path.basename(values.config))[0]
    report = preflight(config, values.topology, values.images, values.home, values.env, values.largest,
                       say=lambda line: print(line, file=sys.stderr, flush=True))
    print(table(name, report) if values.markdown else text(name, report))
    if values.out:
        write_file(values.out, json.dumps({"recipe": name, **report}, indent=2) + "\n")
    if "error" in report:
        raise UsageError(f"The step must compile for {values.topology}. Received: {_first_line(report['error'])}. "
                         + ("Lower --batch_size or take more cores." if out_of_memory(report["error"]) else
                            "A file of --out has the whole message."))


if __name__ == "__main__":
    cli.COMMANDS["preflight"] = command
    sys.exit(cli.main(["preflight", *sys.argv[1:]]))
