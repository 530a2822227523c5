"""A step lowered for replicas that are not there, and what is said of a compiled program. One test compiles (slow)."""

import hashlib
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.compiler.xla import xla_data_pb2
from tensorflow.compiler.xla.service import hlo_pb2

import hosts
from conftest import ROOT
from moco_tf import cli, preflight
from moco_tf import config as configs
from moco_tf.distribute import ReplicaOfMany, gather_rows
from moco_tf.errors import UsageError
from moco_tf.methods.moco import MoCo
from moco_tf.optim.sgd import SGD
from moco_tf.train import build_encoder, set_precision

REPLICAS, BATCH, DIM, SIZE = 4, 32, 16, 16
SMALL = {"batch_size": BATCH, "bn_group_size": 8, "views.size": SIZE, "method.queue_size": 100}
TRANSFORMER = dict(name="vit", dim=16, depth=1, heads=2, stem="conv")    # soon traced, and with BatchNorm
TYPE = {number: name for name, number in xla_data_pb2.PrimitiveType.items()}


def small(recipe="smoke", **changes):
    config = configs.recipe(recipe)
    config.backbone = TRANSFORMER
    return configs.override(configs.complete(config), **{**SMALL, **changes})


@pytest.fixture(scope="module")
def lowered():
    return preflight.lower(small(), REPLICAS)


@pytest.fixture(scope="module")
def module(lowered):
    return hlo_pb2.HloModuleProto.FromString(lowered)


def instructions(module, *opcodes):
    return [i for computation in module.computations for i in computation.instructions if i.opcode in opcodes]


def shapes(found):
    return [(TYPE[i.shape.element_type], tuple(i.shape.dimensions)) for i in found]


# ---------------------------------------------------------------------------------------------- the lowered step

def test_only_keys_and_their_positions_are_gathered(module):
    assert sorted(shapes(instructions(module, "all-gather"))) == [("F32", (BATCH, DIM)), ("S32", (BATCH,))]


def test_images_are_gathered_where_the_step_itself_shuffles_them():
    step = hlo_pb2.HloModuleProto.FromString(preflight.lower(small(shuffle_bn="cross_replica"), REPLICAS))
    assert ("F32", (BATCH, SIZE, SIZE, 3)) in shapes(instructions(step, "all-gather"))


def test_gradients_and_statistics_are_summed_over_the_replicas(module):
    encoder = build_encoder(small())
    learned = sum(math.prod(v.shape) for v in encoder.trainable_variables)
    moving = sum(math.prod(v.shape) for v in encoder.non_trainable_variables if "moving" in v.name)
    summed = [math.prod(shape) for _, shape in shapes(instructions(module, "all-reduce")) if shape]
    assert sum(summed) == learned + 2 * moving    # both encoders have moving statistics
    assert shapes(instructions(module, "all-reduce")).count(("F32", ())) >= 2    # the loss and the metrics


def test_statistics_of_synchronised_batchnorm_cross_in_each_pass():
    config = configs.recipe("moco_v3_vit_tiny_quickstart")
    config.backbone = TRANSFORMER
    config = configs.override(configs.complete(config), **{
        "head.hidden_dim": 24, "predictor.hidden_dim": 24, "head.dim": DIM, "batch_size": BATCH, "views.size": SIZE})
    step = hlo_pb2.HloModuleProto.FromString(preflight.lower(config, REPLICAS))
    assert shapes(instructions(step, "all-gather")) == [("F32", (BATCH, 2, DIM))]
    # Mean and square of the 24 hidden units of the head: 2 views x (keys, queries, and back from the queries).
    assert shapes(instructions(step, "all-reduce")).count(("F32", (2, 24))) >= 6


def test_collectives_are_over_all_replicas_and_nothing_else_is_left(module):
    found = instructions(module, "all-gather", "all-reduce", "all-to-all")
    assert all([list(group.replica_ids) for group in i.replica_groups] == [[0, 1, 2, 3]] for i in found)
    assert not instructions(module, "custom-call", "copy")
    computations = {c.id: c for c in module.computations}
    for i in instructions(module, "all-reduce"):
        root, = (x for x in computations[i.called_computation_ids[0]].instructions if x.opcode == "add")
        assert root.shape.element_type == i.shape.element_type


def test_identifiers_are_unique(module):
    numbers = [i.id for computation in module.computations for i in computation.instructions]
    assert len(numbers) == len(set(numbers))
    for names in ({c.id for c in module.computations}, {c.name for c in module.computations}):
        assert len(names) == len(module.computations)


def test_shapes_are_static(module):
    assert not instructions(module, "set-dimension-size", "get-dimension-size")


def test_variables_are_updated_in_place(module):
    """All that the step writes: weights of both encoders, momenta, statistics, queue, counters."""
    updated = {entry.parameter_number for entry in module.input_output_alias.entries}
    parameters = module.host_program_shape.parameters
    learned = [tuple(v.shape) for v in build_encoder(small()).trainable_variables]
    aliased = [tuple(parameters[number].dimensions) for number in updated]
    assert (100, DIM) in aliased
    assert all(aliased.count(shape) >= 3 * learned.count(shape) for shape in learned)


def test_the_same_step_is_the_same_program(lowered):
    """In another process too, or a second run would compile again."""
    script = ("import sys, hashlib; sys.path.insert(0, 'tests'); import test_preflight as t;"
              "print(hashlib.sha256(t.preflight.lower(t.small(), t.REPLICAS)).hexdigest())")
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert other.stdout.strip() == hashlib.sha256(lowered).hexdigest()


def test_settings_that_cannot_train_are_refused():
    with pytest.raises(UsageError, match="bn_group_size must divide"):
        preflight.lower(small(bn_group_size=3), REPLICAS)


# ---------------------------------------------------------------------------------------------- one replica of many

def alike(kind, value, shape):
    """What collectives give where all replicas hold the same."""
    if kind == "all-gather":
        return tf.tile(value, [REPLICAS] + [1] * (len(value.shape) - 1))
    return value * tf.cast(REPLICAS, value.dtype) if kind == "all-reduce" else value


def trained(strategy, trace):
    tf.keras.utils.set_random_seed(0)
    set_precision("float64")
    with strategy.scope():
        method = MoCo(hosts.encoder(hidden=8), queue_size=64, shuffle_bn="input", **hosts.MOMENTUM)
        method.compile(optimizer=SGD(1.0, momentum=0.9))
    random = np.random.default_rng(0)
    views = {name: tf.constant(random.normal(size=(8, 8, 8, 3))) for name in ("query", "key")}
    views = {**views, "key_position": tf.range(8), "index": tf.range(8, dtype=tf.int64)}
    told = tf.function(lambda: trace(method, views))()
    set_precision("float32")
    return told, method


def test_replicas_with_the_same_images_train_as_one_with_them():
    one, alone = trained(tf.distribute.get_strategy(), lambda method, views: method.train_step(views))
    strategy = ReplicaOfMany(REPLICAS, alike)
    many, together = trained(strategy, lambda method, views: strategy.trace(
        method.train_step, tf.constant(0), views))
    for name, value in one.items():
        np.testing.assert_allclose(many[name], value, rtol=1e-12, err_msg=name)
    for ours, theirs in zip(together.encoder.weights, alone.encoder.weights):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12, err_msg=ours.name)
    np.testing.assert_allclose(together.queue.keys[8:32], np.tile(alone.queue.keys[:8], (3, 1)), atol=1e-12)
    assert together.queue.pointer == 32 and alone.queue.pointer == 8


@pytest.mark.parametrize("replica", [0, 2])
def test_the_gradient_of_gathered_rows_is_the_sum_of_all_replicas_shares(replica):
    """loss = sum(weights * gathered), equal on all R replicas: a row's gradient is R times its weight."""
    weights = np.arange(24.0).reshape(8, 3)
    rows = tf.ones([2, 3], tf.float64)

    def gradient():
        with tf.GradientTape() as tape:
            tape.watch(rows)
            loss = tf.reduce_sum(weights * gather_rows(rows))
        return tape.gradient(loss, rows)

    strategy = ReplicaOfMany(REPLICAS, alike)
    found = tf.function(lambda replica: strategy.trace(gradient, replica))(tf.constant(replica))
    np.testing.assert_allclose(found, REPLICAS * weights[2 * replica:2 * replica + 2])


# ---------------------------------------------------------------------------------------------- what the compiler says

COMPILED = """
ENTRY %main (x: f32[9]) -> u32[4,1,1] {
  %x = f32[9]{0} parameter(0)
  %all-gather.4 = f32[4096,2,256]{2,0,1:T(8,128)S(1)} all-gather(%copy-done.658), replica_groups={{0,1}}, dimensions={0}
  %all-reduce.9 = (f32[]{:T(128)}, bf16[3,4]{1,0:T(8,128)}, /*index=5*/pred[7]{0}) all-reduce(%a, %b, %c), to_apply=%add
  %gather.2 = f32[9]{0} gather(%x, %y), offset_dims={}
  %ags = (f32[8]{0}, f32[16]{0}) all-gather-start(%p), dimensions={0}
  %agd = f32[16]{0} all-gather-done(%ags)
  %all-gather.6 = f32[512,16]{0,1} all-gather(%param_0), frontend_attributes={chain_id="0"}, metadata={op_name="call.3"}
  %all-gather.8 = f32[512,16]{0,1} all-gather(%param_1), frontend_attributes={chain_id="0"}, metadata={op_name="call.3"}
  ROOT %t.1 = u32[4,1,1]{2,1,0} all-to-all(%broadcast), dimensions={0}, metadata={op_name="call.5"}
  %t.2 = u32[4,1,1]{2,1,0} all-to-all(%broadcast), dimensions={0}, metadata={op_name="call.5"}
}
"""


def test_collectives_of_a_compiled_program():
    assert preflight.collectives(COMPILED) == [
        {"kind": "all-gather", "shapes": ["f32[4096,2,256]"], "bytes": 8388608},
        {"kind": "all-reduce", "shapes": ["f32[]", "bf16[3,4]", "pred[7]"], "bytes": 4 + 24 + 7},
        {"kind": "all-gather", "shapes": ["f32[16]"], "bytes": 64},
        {"kind": "all-gather", "shapes": ["f32[512,16]"], "bytes": 32768},
        {"kind": "all-to-all", "shapes": ["u32[4,1,1]"], "bytes": 16},
        {"kind": "all-to-all", "shapes": ["u32[4,1,1]"], "bytes": 16}]


KIB, MIB = 2 ** 10, 2 ** 20
# As the compiler prints: layouts with S(1) are on the chip. Each entry with the bytes that must go over the HBM.
TRAFFIC = {
    # Weights are fetched in advance, the hidden layer stays on the chip: x, w and the result cross, 2 MiB each.
    "fetched": ("""
%inside (p0: bf16[1024,1024], p1: bf16[1024,1024]) -> bf16[1024,1024] {
  %p0 = bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %p1 = bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %c = bf16[1024,1024]{1,0:T(8,128)(2,1)} convolution(%p0, %p1), dim_labels=bf_io->bf
}

%layer (q0: bf16[1024,1024], q1: bf16[1024,1024]) -> bf16[1024,1024] {
  %q0 = bf16[1024,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %r0 = bf16[1024,1024]{1,0:T(8,128)(2,1)} fusion(%q0), kind=kLoop, calls=%as_it_is
  %q1 = bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %d = f32[1024,1024]{1,0:T(8,128)} convolution(%r0, %q1), dim_labels=bf_io->bf
  ROOT %e = bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)} convert(%d)
}

%as_it_is (s0: bf16[1024,1024]) -> bf16[1024,1024] {
  %s0 = bf16[1024,1024]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %b = bf16[1024,1024]{1,0:T(8,128)(2,1)} bitcast(%s0)
}

ENTRY %main (x: bf16[1024,1024], w: bf16[1024,1024]) -> bf16[1024,1024] {
  %w = bf16[1024,1024]{1,0:T(8,128)(2,1)} parameter(1)
  %start = (bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)}, bf16[1024,1024]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%w)
  %x = bf16[1024,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %here = bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)} copy-done(%start)
  %hidden = bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)} fusion(%x, %here), kind=kOutput, calls=%layer
  ROOT %y = bf16[1024,1024]{1,0:T(8,128)(2,1)} fusion(%hidden, %here), kind=kOutput, calls=%inside
}
""", 3 * 2 * MIB),
    # 256 rows of 512 bytes drawn from a bank, and 8 rows written into it; the row numbers stay on the chip.
    "rows": ("""
%draw (p: f32[1281167,128], i: s32[256]) -> f32[256,128] {
  %p = f32[1281167,128]{1,0:T(8,128)} parameter(0)
  %i = s32[256]{0:T(256)S(1)} parameter(1)
  %t = s32[256]{0:T(256)} transpose(%i), dimensions={0}
  ROOT %g = f32[256,128]{1,0:T(8,128)} gather(%p, %t), offset_dims={1}, slice_sizes={1,128}
}

%put (p.1: f32[1281167,128], r: f32[8,128]) -> f32[1281167,128] {
  %p.1 = f32[1281167,128]{1,0:T(8,128)} parameter(0)
  %r = f32[8,128]{1,0:T(8,128)S(1)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %u = f32[1281167,128]{1,0:T(8,128)} dynamic-update-slice(%p.1, %r, %zero, %zero)
  ROOT %same = f32[1281167,128]{1,0:T(8,128)} bitcast(%u)
}

ENTRY %main (bank: f32[1281167,128], n: s32[256], new: f32[8,128]) -> (f32[256,128], f32[1281167,128]) {
  %bank = f32[1281167,128]{1,0:T(8,128)} parameter(0)
  %n = s32[256]{0:T(256)S(1)} parameter(1)
  %new = f32[8,128]{1,0:T(8,128)S(1)} parameter(2)
  %drawn = f32[256,128]{1,0:T(8,128)} fusion(%bank, %n), kind=kCustom, calls=%draw
  %after = f32[1281167,128]{1,0:T(8,128)} fusion(%bank, %new), kind=kLoop, calls=%put
  ROOT %both = (f32[256,128]{1,0:T(8,128)}, f32[1281167,128]{1,0:T(8,128)}) tuple(%drawn, %after)
}
""", (2 * 256 + 8) * KIB // 2),
    # The branch that adds reads 2 x 1 KiB and writes one, the other one moves nothing; their condition is 1 byte.
    "branches": ("""
%nothing (a: (f32[256])) -> (f32[256]) {
  ROOT %a = (f32[256]{0:T(256)}) parameter(0)
}

%sum (b: (f32[256], f32[256])) -> (f32[256]) {
  %b = (f32[256]{0:T(256)}, f32[256]{0:T(256)}) parameter(0)
  %b0 = f32[256]{0:T(256)} get-tuple-element(%b), index=0
  %b1 = f32[256]{0:T(256)} get-tuple-element(%b), index=1
  %s = f32[256]{0:T(256)} add(%b0, %b1)
  ROOT %out = (f32[256]{0:T(256)}) tuple(%s)
}

ENTRY %main (c: pred[], x: f32[256], y: f32[256]) -> (f32[256]) {
  %c = pred[]{:T(512)} parameter(0)
  %x = f32[256]{0:T(256)} parameter(1)
  %y = f32[256]{0:T(256)} parameter(2)
  %which = pred[]{:T(512)S(6)} copy(%c)
  %one = (f32[256]{0:T(256)}) tuple(%x)
  %two = (f32[256]{0:T(256)}, f32[256]{0:T(256)}) tuple(%x, %y)
  ROOT %z = (f32[256]{0:T(256)}) conditional(%which, %one, %two), branch_computations={%nothing, %sum}
}
""", 3 * KIB + 1)}


@pytest.mark.parametrize("name", TRAFFIC)
def test_what_goes_over_the_memory_bus(name):
    text, expected = TRAFFIC[name]
    assert preflight.hbm_bytes(text) == expected


ANSWER = {"memory": {"arguments": 53e7, "outputs": 51e7, "aliased": 50e7, "temporaries": 466e7, "code": 5e7},
          "flops": 3.85e12, "hbm_bytes": 6.3e10, "compile_seconds": 1.0,
          "collectives": [{"kind": "all-reduce", "shapes": ["f32[25]"], "bytes": 100}]}


def test_bounds_of_the_speed():
    """3.85e12 operations and 6.3e10 bytes for 128 images on v5e, at 197e12 and 8.19e11 a second: 19.5 ms, 77 ms."""
    report = preflight.interpreted(ANSWER, preflight.CHIPS["v5e"], {"cores": 4, "chips": 4}, 512)
    assert report["least_seconds"]["arithmetic"] == pytest.approx(0.0195, abs=5e-5)
    assert report["least_seconds"]["memory"] == pytest.approx(0.077, abs=1e-4)
    assert report["most_images_per_s"] == pytest.approx({"core": 1664, "slice": 6656})
    assert report["bound"] == "memory"
    assert report["memory"]["total"] == 525e7 and report["memory"]["capacity"] == 16e9
    assert report["collectives"][0]["sent"] == 150


def test_a_core_has_its_share_of_the_chip():
    report = preflight.interpreted(ANSWER, preflight.CHIPS["v3"], {"cores": 8, "chips": 4}, 512)
    assert report["memory"]["capacity"] == 16 * 2 ** 30
    assert report["least_seconds"]["arithmetic"] == 3.85e12 / 61.5e12


@pytest.mark.parametrize("kind, sent", [("all-reduce", 150), ("all-gather", 75), ("all-to-all", 75),
                                        ("reduce-scatter", 300), ("collective-permute", 100)])
def test_bytes_round_a_ring_of_four(kind, sent):
    assert preflight.sent_per_core(kind, 100, 4) == pytest.approx(sent)


@pytest.mark.parametrize("limit", [0, 1, 2, 7, 16, 31, 32, 33, 100])
@pytest.mark.parametrize("start", [1, 5, 16, 64])
def test_bisection_finds_the_last_that_fits_or_one_near_it(limit, start):
    tried = []
    assert limit * 15 / 16 <= preflight.bisect(lambda n: not tried.append(n) and n <= limit, start) <= limit
    assert len(tried) == len(set(tried)) and min(tried) >= 1


# ---------------------------------------------------------------------------------------------- the command

COMPILER = """
import json, sys
topology, out, *program = sys.argv[1:]
report = {"cores": 4, "chips": 4, "hosts": 1, "kind": "TPU of paper"}
if program:
    config = json.load(open(program[0]))
    report.update({"error": %r} if config["batch_size"] > 4 * %d else %s)
    open(program[1], "w").write(%r)
    open(%r, "a").write("compiled\\n")
json.dump(report, open(out, "w"))
"""


NO_ROOM = ("RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
           "temporaries (27.39G) exceeds available HBM (15.75G). HLO module: computation.22.\nSee more")


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A compiler that takes so many images per core, and is told of in the attributes of this function."""
    calls, script = tmp_path / "calls", tmp_path / "compiler.py"

    def answers(largest, error=NO_ROOM, unprinted=""):
        told = {key: ANSWER[key] for key in ("memory", "flops")}
        if unprinted:
            told["error"] = unprinted
        script.write_text(COMPILER % (error, largest, told, "" if unprinted else COMPILED, str(calls)))

    answers(largest=1000)
    monkeypatch.setattr(preflight, "COMPILER", script)
    monkeypatch.setattr(preflight, "make_environment", lambda folder, say: sys.executable)
    monkeypatch.setattr(preflight, "lower", lambda config, *_: configs.to_json(config).encode())
    monkeypatch.setitem(cli.COMMANDS, "preflight", preflight.command)
    answers.count = lambda: len(calls.read_text().splitlines()) if calls.exists() else 0
    answers.run = lambda *arguments: cli.main(["preflight", "--config=smoke", "--topology=v5e:2x2", "--batch_size=32",
                                               f"--home={tmp_path}", f"--out={tmp_path}/out.json", *arguments,
                                               *[f"--config.{key}={value}" for key, value in SMALL.items()
                                                 if key != "batch_size"]])
    answers.report = lambda: json.loads((tmp_path / "out.json").read_text())
    return answers


def test_the_command_tells_and_writes_a_report(compiler, capsys):
    assert compiler.run() == 0
    said = capsys.readouterr().out
    assert "4 cores" in said and "at most  " in said and "the limit is arithmetic" in said and "all-gather" in said
    report = compiler.report()
    assert report["recipe"] == "smoke" and report["batch_per_core"] == 8 and report["versions"]["libtpu"]
    assert report["collectives"][0]["shapes"] == ["f32[4096,2,256]"]
    assert report["hbm_bytes"] == preflight.hbm_bytes(COMPILED)


def test_a_program_is_compiled_once(compiler, capsys):
    assert compiler.run() == compiler.run("--markdown") == 0
    assert compiler.count() == 1 and compiler.report()["reused"]
    assert compiler.report()["collectives"] and compiler.report()["hbm_bytes"]
    header, rule, row = capsys.readouterr().out.splitlines()[-3:]
    assert header.count("|") == rule.count("|") == row.count("|") and "`smoke`" in row
    assert compiler.run("--config.method.temperature=0.3") == 0 and compiler.count() == 2


def test_a_step_that_compiles_but_cannot_be_printed(compiler, capsys):
    compiler(largest=1000, unprinted="INTERNAL: RET_CHECK failure\nmore")
    assert compiler.run() == 0 and compiler.run("--markdown") == 0
    said = capsys.readouterr().out
    assert "not known, nor the collectives: INTERNAL: RET_CHECK failure" in said and "19.5, ?" in said
    report = compiler.report()
    assert report["bound"] == "arithmetic" and report["hbm_bytes"] is None and not report["collectives"]
    assert compiler.count() == 1


def test_a_step_that_does_not_compile(compiler, capsys):
    compiler(largest=0)
    assert compiler.run() == 2
    streams = capsys.readouterr()
    assert "does not compile: RESOURCE_EXHAUSTED" in streams.out and "Lower --batch_size" in streams.err
    assert compiler.report()["error"].endswith("more")


@pytest.mark.parametrize("fit, told", [(30, 24), (8, 8), (7, 0)])
def test_the_largest_batch_that_fits(compiler, capsys, fit, told):
    """In whole BatchNorm groups, of 8."""
    compiler(largest=fit)
    assert compiler.run("--largest", "--config.method.queue_size=1000") == (0 if told else 2)
    assert compiler.report()["largest_batch_per_core"] == told
    said = capsys.readouterr().out
    assert f"largest batch that compiles, to a sixteenth: {told} per core, {4 * told} on the slice" in said


def test_no_batch_is_looked_for_where_the_reason_is_another(compiler):
    compiler(largest=0, error="UNIMPLEMENTED: no such thing")
    assert compiler.run("--largest") == 2
    assert compiler.count() == 1 and "largest_batch_per_core" not in compiler.report()


def test_a_folder_that_is_not_there_is_told_of_at_once(compiler, tmp_path, capsys):
    assert compiler.run(f"--out={tmp_path}/none/out.json") == 2
    assert compiler.count() == 0 and "--out must be" in capsys.readouterr().err


@pytest.mark.parametrize("topology", ["v9:2x2", "v5e", "v5e:2by2"])
def test_an_unknown_topology_is_refused(compiler, capsys, topology):
    assert compiler.run(f"--topology={topology}") == 2
    assert "--topology is one of v2, v3" in capsys.readouterr().err


def test_a_recipe_that_pretrains_nothing_is_refused(compiler, capsys):
    assert cli.main(["preflight", "--config=linear_v1v2", "--topology=v5e:2x2"]) == 2
    assert "a recipe of a pre-training" in capsys.readouterr().err


def test_a_compiler_that_dies_is_told_of(compiler, capsys, tmp_path):
    (tmp_path / "compiler.py").write_text("import sys; sys.exit('no room')")
    assert compiler.run() == 2
    assert "exit code 1, no room" in capsys.readouterr().err


def test_a_finished_environment_is_used(tmp_path):
    (tmp_path / "requirements.txt").write_text("\n".join(preflight.REQUIREMENTS))
    assert preflight.make_environment(tmp_path, say=pytest.fail) == tmp_path / "bin" / "python"


def test_the_script_shows_its_flags():
    done = subprocess.run([ROOT / "tpu_scripts" / "preflight", "--help"], capture_output=True, text=True,
                          env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable})
    assert done.returncode == 0 and "--topology" in done.stdout, done.stderr


@pytest.mark.slow
def test_the_tpu_compiler_takes_the_step(tmp_path):
    """Makes the second environment in the user's cache if it is not there: 1.1 GB."""
    report = preflight.preflight(small(), "v5e:2x2", home=preflight.HOME)
    found = {(c["kind"], shape) for c in report["collectives"] for shape in c["shapes"]}
    assert ("all-gather", f"f32[{BATCH},{DIM}]") in found
    assert {kind for kind, _ in found} >= {"all-gather", "all-reduce"}
    assert not [shape for _, shape in found if shape.count(",") == 3 and f"[{BATCH}," in shape]    # no images
    assert 0 < report["memory"]["total"] < report["memory"]["capacity"]
