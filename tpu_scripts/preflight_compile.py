"""Compiles a program for a TPU slice with the real TPU compiler, without a TPU; moco_tf/preflight.py calls it.

    python preflight_compile.py TOPOLOGY OUT.json [FILE.hlo OUT.txt]

Writes to OUT.json what the slice is, and what the compiler says of the serialized HLO with one replica on each core; to
OUT.txt the compiled program. It uses private modules of jax, whose version moco_tf/preflight.py therefore pins.
"""

import json
import os
import sys

# No TPU is used: libtpu has no neighbours to ask for, and no need to be the only one that is loaded.
os.environ.update(TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost", ALLOW_MULTIPLE_LIBTPU_LOAD="1",
                  JAX_PLATFORMS="cpu")

import numpy as np
from jax._src import compiler
from jax._src.interpreters import mlir
from jax._src.lib.mlir import ir
from jax.experimental import topologies
from jaxlib import _jax, xla_client

MEMORY = {"arguments": "argument_size_in_bytes", "outputs": "output_size_in_bytes", "aliased": "alias_size_in_bytes",
          "temporaries": "temp_size_in_bytes", "code": "generated_code_size_in_bytes"}


def main(topology, out, path=None, text=None):
    report = {}
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
        report = {"cores": len(devices), "chips": len({tuple(device.coords) for device in devices}),
                  "hosts": len({device.process_index for device in devices}), "kind": devices[0].device_kind}
        if path:
            with open(path, "rb") as file:
                executable = compiled(file.read(), devices)
            report.update(told(executable))
            with open(text, "w") as file:
                file.write("\n".join(module.to_string() for module in executable.hlo_modules()))
    except Exception as error:    # whatever the compiler raises is what the report is about
        report["error"] = str(error) or type(error).__name__
    with open(out, "w") as file:
        json.dump(report, file)


def compiled(hlo, devices):
    options = compiler.get_compile_options(
        num_replicas=len(devices), num_partitions=1, device_assignment=np.arange(len(devices)).reshape(-1, 1))
    with mlir.make_ir_context():
        module = ir.Module.parse(_jax.mlir.hlo_to_stablehlo(hlo))
        return devices[0].client.compile(module, xla_client.DeviceList(tuple(devices)), options)


def told(executable):
    """Of one core: bytes of memory by their use, operations, and bytes from and to memory."""
    memory, cost = executable.get_compiled_memory_stats(), executable.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    return {"memory": {name: getattr(memory, attribute) for name, attribute in MEMORY.items()},
            "flops": cost["flops"], "bytes_accessed": cost["bytes accessed"]}


if __name__ == "__main__":
    main(*sys.argv[1:])
